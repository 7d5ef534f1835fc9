"""Many requests in one: JSON lines in, JSON lines out, each answered by itself.

A line is a body of Moondream's dialect with `skill`, and with `custom_id` where the client wants one back:

    {"custom_id": "a", "skill": "detect", "image_url": "data:image/png;base64,...", "object": "dog"}

Its answer is `{"index": 0, "custom_id": "a", "result": {...}}` or `{"index": 0, "custom_id": "a", "error": {...}}`.
Answers come in the order of the lines, each as soon as it and all before it are there. A line that is wrong spoils no
other. What bodies mean is left to `moondream.py`.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from fastapi.responses import StreamingResponse
from pydantic import ValidationError

from moondream_cv.requests import ErrorResult, Request
from moondream_cv.server.apis.moondream import (
    ERRORS,
    Body,
    CaptionBody,
    DetectBody,
    GazeBody,
    Open,
    PointBody,
    QueryBody,
    check_model,
    described,
    error_body,
)
from moondream_cv.server.bodies import parse_json
from moondream_cv.server.errors import ServerError, explain, invalid
from moondream_cv.server.service import Service

MAX_LINES = 10_000
MAX_NEWLINES = 2 * MAX_LINES  # blank lines included
IN_FLIGHT = 16  # lines that are computed, or have been and wait for those before them
LARGEST_ID = 2**53  # what every JSON reader keeps exactly
BODIES: dict[str, type[Body]] = {
    "caption": CaptionBody,
    "query": QueryBody,
    "detect": DetectBody,
    "point": PointBody,
    "gaze": GazeBody,
}
_LINES = "application/x-ndjson"
_ERRORS = {status: ERRORS[status] for status in (400, 401, 403, 413, 415, 429, 503)}  # others are those of a line
_EXAMPLE = '{"custom_id": "a", "skill": "detect", "image_url": "https://example.com/dog.jpg", "object": "dog"}\n'

router = APIRouter(tags=["moondream"])


class Images:
    """The pictures that lines of one batch name, of which the ones named last are kept.

    Lines in flight that name the same one get the same object, which the engine encodes once.
    """

    def __init__(self, service: Service, most: int = IN_FLIGHT) -> None:
        self._service, self._most = service, most
        self._opened: OrderedDict[str, asyncio.Future[Any]] = OrderedDict()

    async def open(self, value: str) -> Any:
        """The image that a client sent; errors as in `Pictures.open`."""
        opening = self._opened.get(value)
        if opening is None:
            opening = self._opened[value] = asyncio.ensure_future(self._service.pictures.open(value))
            while len(self._opened) > self._most:
                self._opened.popitem(last=False)
        self._opened.move_to_end(value)
        return await asyncio.shield(opening)  # a line that is given up leaves it to the others

    def close(self) -> None:
        """Forget all of them."""
        for opening in self._opened.values():
            opening.cancel()
        self._opened.clear()


class Batch:
    """The lines of one HTTP request and what they have come to.

    One line at a time is computed on the place that the request has in the queue. Others join it on places that nobody
    needs, and give them back at their end. Results that cannot be sent yet count among those in flight, so that memory
    is bounded whatever a client does.
    """

    def __init__(self, lines: Iterator[bytes], service: Service) -> None:
        """Start nothing yet.

        Args:
            lines: Without blank ones.
            service: In whose queue the request has a place, until the batch is closed.
        """
        self._lines = enumerate(lines)
        self._service, self._images = service, Images(service)
        self._flight: deque[asyncio.Task[bytes]] = deque()
        self._own: asyncio.Task[bytes] | None = None  # what runs, or ran, on the request's own place
        self._next = next(self._lines, None)

    async def answers(self) -> AsyncIterator[bytes]:
        """One line of JSON for each line, in order."""
        while self._next is not None or self._flight:
            self._start()
            if self._flight[0].done():
                yield self._flight.popleft().result()
            else:
                running = [task for task in self._flight if not task.done()]
                await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)

    def close(self) -> None:
        """Give up whatever is still running."""
        for task in self._flight:
            task.cancel()
        self._flight.clear()
        self._images.close()

    def _start(self) -> None:
        """Start as many lines as there is room for: one at least, unless others run."""
        while self._next is not None and len(self._flight) < IN_FLIGHT:
            own = self._own is None or self._own.done()
            if not own and not self._service.try_place():
                return
            task = asyncio.ensure_future(self._line(*self._next))
            if own:
                self._own = task
            else:
                task.add_done_callback(lambda _: self._service.give_place_back())
            self._flight.append(task)
            self._next = next(self._lines, None)

    async def _line(self, index: int, line: bytes) -> bytes:
        """The answer to one line, whatever happens."""
        answer: dict[str, Any] = {"index": index, "custom_id": None}
        limit = self._service.options.timeout
        try:
            values = await _parsed(line)
            answer["custom_id"] = _custom_id(values)
            answer["result"] = await asyncio.wait_for(self._result(values), limit)
        except (asyncio.TimeoutError, TimeoutError):
            late = ServerError(504, f"the line took longer than {limit:g} seconds; try it again, or ask for less")
            answer |= error_body(late)
        except Exception as error:
            answer |= error_body(explain(error))
        # In ASCII: many readers take U+2028 and its like, which JSON need not escape, for the end of a line.
        return json.dumps(answer, separators=(",", ":")).encode() + b"\n"

    async def _result(self, values: dict[str, Any]) -> dict[str, Any]:
        body = _body(values)
        check_model(body, self._service)
        image = None if body.image_url is None else await self._images.open(body.image_url)
        return described(await self._computed(body.request(image)))

    async def _computed(self, request: Request) -> Any:
        call = self._service.submit(request)
        try:
            result = await asyncio.shield(call.done)
        finally:
            self._service.let_go(call)
        if isinstance(result, ErrorResult):
            raise result.error
        return result


async def read_lines(http: HttpRequest) -> Iterator[bytes]:
    """A FastAPI dependency: the lines of the body, without blank ones. It is read before a place is taken.

    Raises:
        ServerError: There are none, or too many.
    """
    body = await http.body()
    if body.count(b"\n") > MAX_NEWLINES:
        raise ServerError(413, f"the batch must have at most {MAX_NEWLINES:,} line breaks")
    count = sum(1 for _ in _lines(body))
    if not count:
        raise ServerError(400, "the batch is empty; send one JSON object a line")
    if count > MAX_LINES:
        raise ServerError(413, f"the batch has {count:,} lines; send at most {MAX_LINES:,} at a time")
    return _lines(body)


async def open_batch(lines: Annotated[Iterator[bytes], Depends(read_lines)], exchange: Open) -> AsyncIterator[Batch]:
    """A FastAPI dependency: a batch, closed after the last byte of the answer, or when the client has left."""
    batch = Batch(lines, exchange.service)
    try:
        yield batch
    finally:
        batch.close()


@router.post(
    "/v1/batch",
    summary="Many requests in one",
    response_class=StreamingResponse,
    responses={
        **ERRORS,
        200: {"description": "An answer a line.", "content": {_LINES: {"schema": {"type": "string"}}}},
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                kind: {"schema": {"type": "string"}, "example": _EXAMPLE} for kind in (_LINES, "application/jsonl")
            },
        }
    },
)
async def batch(batch: Annotated[Batch, Depends(open_batch)]) -> StreamingResponse:
    """Answer many requests, one JSON object a line, in their order and as soon as they are there.

    A line has `skill` ("detect", "point", "query", "caption" or "gaze"), the keys that the skill's own route takes, and
    `custom_id` if you like, which comes back. Lines are answered by themselves: one that is wrong gets an `error` in
    its place. The time limit is one for each line. Blank lines are skipped.
    """
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(batch.answers(), media_type=_LINES, headers=headers)


def _lines(body: bytes) -> Iterator[bytes]:
    """The lines that hold something, one by one, so that the body is not in memory twice."""
    start = 3 if body.startswith(b"\xef\xbb\xbf") else 0
    while start < len(body):
        end = body.find(b"\n", start)
        end = len(body) if end < 0 else end
        line = body[start:end].strip()
        start = end + 1
        if line:
            yield line


async def _parsed(line: bytes) -> dict[str, Any]:
    try:
        values = await parse_json(line)
    except ValueError as error:
        raise ServerError(400, f"the line is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ServerError(400, f"a line is a JSON object, not {type(values).__name__}: {line[:60]!r}")
    return values


def _custom_id(values: dict[str, Any]) -> str | int | None:
    given = values.pop("custom_id", None)
    if given is None or isinstance(given, str) or (type(given) is int and abs(given) <= LARGEST_ID):
        return given
    raise ServerError(400, f"custom_id must be a string or an integer, not {given!r:.100}", param="custom_id")


def _body(values: dict[str, Any]) -> Body:
    skill = values.pop("skill", None)
    kind = BODIES.get(skill) if isinstance(skill, str) else None
    if kind is None:
        raise ServerError(400, f"skill must be one of {', '.join(BODIES)}, not {skill!r:.100}", param="skill")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False, include_input=False), 422) from error
