"""Many requests in one HTTP request, as JSON lines. Each line gets a separate response.

A line is a body of Moondream's API with `skill` and, optionally, `custom_id`:

    {"custom_id": "a", "skill": "detect", "image_url": "data:image/png;base64,...", "object": "dog"}

The response line is `{"index": 0, "custom_id": "a", "result": {...}}` or `{"index": 0, "custom_id": "a", "error":
{...}}`. Responses keep the order of the lines, and each is sent as soon as it and all earlier ones are complete. An
invalid line does not affect the others.
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
    Context,
    DetectBody,
    GazeBody,
    PointBody,
    QueryBody,
    check_model,
    error_body,
    result_body,
)
from moondream_cv.server.bodies import parse_json
from moondream_cv.server.errors import ServerError, to_server_error, validation_error
from moondream_cv.server.service import Service

MAX_LINES = 10_000
MAX_NEWLINES = 2 * MAX_LINES  # blank lines included
MAX_IN_FLIGHT = 16  # lines that run, or wait for earlier lines to be sent
LARGEST_ID = 2**53  # the largest integer that every JSON parser represents exactly
BODIES: dict[str, type[Body]] = {
    "caption": CaptionBody,
    "query": QueryBody,
    "detect": DetectBody,
    "point": PointBody,
    "gaze": GazeBody,
}
_LINES = "application/x-ndjson"
_EXAMPLE = '{"custom_id": "a", "skill": "detect", "image_url": "https://example.com/dog.jpg", "object": "dog"}\n'

router = APIRouter(tags=["moondream"])


class BatchImages:
    """The images of one batch; the most recently used ones are kept.

    Concurrent lines with the same image get the same object, which the engine encodes once.
    """

    def __init__(self, service: Service, max_images: int = MAX_IN_FLIGHT) -> None:
        self._service, self._max_images = service, max_images
        self._images: OrderedDict[str, asyncio.Future[Any]] = OrderedDict()

    async def open(self, value: str) -> Any:
        """Return an image of the client, like `ImageLoader.open`."""
        opening = self._images.get(value)
        if opening is None:
            opening = self._images[value] = asyncio.ensure_future(self._service.images.open(value))
            while len(self._images) > self._max_images:
                self._images.popitem(last=False)
        self._images.move_to_end(value)
        return await asyncio.shield(opening)  # other lines may use the image after this one is cancelled

    def close(self) -> None:
        """Cancel all downloads and drop all images."""
        for opening in self._images.values():
            opening.cancel()
        self._images.clear()


class Batch:
    """The lines of one HTTP request and their responses.

    One line at a time runs in the queue slot of the HTTP request. Further lines run concurrently in free slots, which
    they release when they end. Responses that wait to be sent count as in flight, so memory is bounded whatever the
    client does.
    """

    def __init__(self, lines: Iterator[bytes], service: Service) -> None:
        """Create a batch; `answers` starts the lines.

        Args:
            lines: Lines of the body, without blank ones.
            service: Service in which the HTTP request holds a queue slot until the batch is closed.
        """
        self._lines = enumerate(lines)
        self._service, self._images = service, BatchImages(service)
        self._in_flight: deque[asyncio.Task[bytes]] = deque()
        self._own: asyncio.Task[bytes] | None = None  # latest line in the slot of the HTTP request
        self._next = next(self._lines, None)

    async def answers(self) -> AsyncIterator[bytes]:
        """Yield one line of JSON for each line, in order."""
        while self._next is not None or self._in_flight:
            self._start_lines()
            if self._in_flight[0].done():
                yield self._in_flight.popleft().result()
            else:
                running = [task for task in self._in_flight if not task.done()]
                await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)

    def close(self) -> None:
        """Cancel the lines that are still running."""
        for task in self._in_flight:
            task.cancel()
        self._in_flight.clear()
        self._images.close()

    def _start_lines(self) -> None:
        """Start lines while there are free slots. At least one line is running afterwards."""
        while self._next is not None and len(self._in_flight) < MAX_IN_FLIGHT:
            own_slot_free = self._own is None or self._own.done()
            if not own_slot_free and not self._service.try_acquire_slot():
                return
            task = asyncio.ensure_future(self._answer(*self._next))
            if own_slot_free:
                self._own = task
            else:
                task.add_done_callback(lambda _: self._service.release_slot())
            self._in_flight.append(task)
            self._next = next(self._lines, None)

    async def _answer(self, index: int, line: bytes) -> bytes:
        """Return the response to one line. All errors become part of the response."""
        answer: dict[str, Any] = {"index": index, "custom_id": None}
        limit = self._service.settings.timeout
        try:
            values = await _parse_line(line)
            answer["custom_id"] = _pop_custom_id(values)
            answer["result"] = await asyncio.wait_for(self._result(values), limit)
        except (asyncio.TimeoutError, TimeoutError):
            message = f"the line took longer than {limit:g} seconds; try again or send a smaller request"
            answer |= error_body(ServerError(504, message))
        except Exception as error:
            answer |= error_body(to_server_error(error))
        # ASCII, because many parsers treat U+2028 and similar characters, which JSON need not escape, as line breaks
        return json.dumps(answer, separators=(",", ":")).encode() + b"\n"

    async def _result(self, values: dict[str, Any]) -> dict[str, Any]:
        body = _parse_body(values)
        check_model(body, self._service)
        image = None if body.image_url is None else await self._images.open(body.image_url)
        return result_body(await self._run(body.request(image)))

    async def _run(self, request: Request) -> Any:
        call = self._service.submit(request)
        try:
            result = await asyncio.shield(call.done)
        finally:
            self._service.release_call(call)
        if isinstance(result, ErrorResult):
            raise result.error
        return result


async def read_lines(http: HttpRequest) -> Iterator[bytes]:
    """Return the lines of the body, without blank ones. This is a FastAPI dependency.

    The body is read before the request acquires a queue slot.

    Raises:
        ServerError: 400, the body has no lines; 413, it has too many lines.
    """
    body = await http.body()
    if body.count(b"\n") > MAX_NEWLINES:
        raise ServerError(413, f"the batch must have at most {MAX_NEWLINES:,} line breaks")
    count = sum(1 for _ in _lines(body))
    if not count:
        raise ServerError(400, "the batch must not be empty; send one JSON object per line")
    if count > MAX_LINES:
        raise ServerError(413, f"the batch must have at most {MAX_LINES:,} lines, got {count:,}; send several batches")
    return _lines(body)


async def open_batch(lines: Annotated[Iterator[bytes], Depends(read_lines)], context: Context) -> AsyncIterator[Batch]:
    """Yield a batch, which is closed after the last byte of the response. This is a FastAPI dependency."""
    batch = Batch(lines, context.service)
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
        200: {"description": "One response per line.", "content": {_LINES: {"schema": {"type": "string"}}}},
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
    """Answer many requests, one JSON object per line, in order and as soon as each is complete.

    A line has `skill` ("detect", "point", "query", "caption" or "gaze"), the fields of the route of that skill, and
    optionally `custom_id`, which the response repeats. An invalid line gets an `error` and does not affect the others.
    The time limit applies to each line. Blank lines are skipped.
    """
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(batch.answers(), media_type=_LINES, headers=headers)


def _lines(body: bytes) -> Iterator[bytes]:
    """Yield the lines that are not blank, without a second copy of the body."""
    start = 3 if body.startswith(b"\xef\xbb\xbf") else 0
    while start < len(body):
        end = body.find(b"\n", start)
        end = len(body) if end < 0 else end
        line = body[start:end].strip()
        start = end + 1
        if line:
            yield line


async def _parse_line(line: bytes) -> dict[str, Any]:
    try:
        values = await parse_json(line)
    except ValueError as error:
        raise ServerError(400, f"the line is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ServerError(400, f"a line must be a JSON object, got {type(values).__name__}: {line[:60]!r}")
    return values


def _pop_custom_id(values: dict[str, Any]) -> str | int | None:
    custom_id = values.pop("custom_id", None)
    if custom_id is None or isinstance(custom_id, str) or (type(custom_id) is int and abs(custom_id) <= LARGEST_ID):
        return custom_id
    raise ServerError(400, f"custom_id must be a string or an integer, got {custom_id!r:.100}", param="custom_id")


def _parse_body(values: dict[str, Any]) -> Body:
    skill = values.pop("skill", None)
    kind = BODIES.get(skill) if isinstance(skill, str) else None
    if kind is None:
        raise ServerError(400, f"skill must be one of {', '.join(BODIES)}, got {skill!r:.100}", param="skill")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise validation_error(error.errors(include_url=False, include_input=False), 422) from error
