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
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from fastapi.responses import StreamingResponse

from moondream_cv.server.apis.batch_lines import MAX_IN_FLIGHT, LineRunner, parse_line, pop_id
from moondream_cv.server.apis.moondream import ERRORS, Context, error_body
from moondream_cv.server.apis.uploaded_batches.routes import CreatedUpload
from moondream_cv.server.errors import ServerError, to_server_error
from moondream_cv.server.service import Service

MAX_LINES = 10_000
MAX_NEWLINES = 2 * MAX_LINES  # blank lines included
_LINES = "application/x-ndjson"
_EXAMPLE = '{"custom_id": "a", "skill": "detect", "image_url": "https://example.com/dog.jpg", "object": "dog"}\n'

router = APIRouter(tags=["moondream"])


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
        self._service, self._runner = service, LineRunner(service)
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
        self._runner.close()

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
        try:
            values = await parse_line(line)
            answer["custom_id"] = pop_id(values, "custom_id")
            answer["result"], _ = await self._runner.run(values)
        except Exception as error:
            answer |= error_body(to_server_error(error))
        # ASCII, because many parsers treat U+2028 and similar characters, which JSON need not escape, as line breaks
        return json.dumps(answer, separators=(",", ":")).encode() + b"\n"


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
        200: {
            "description": "One response per line; with `action`, a new upload.",
            "content": {
                _LINES: {"schema": {"type": "string"}},
                "application/json": {"schema": CreatedUpload.model_json_schema()},
            },
        },
    },
    openapi_extra={
        "parameters": [
            {
                "name": "action",
                "in": "query",
                "description": "Create an upload for Moondream's batch API instead; the body must be empty.",
                "schema": {"type": "string", "enum": ["mpu-create"]},
            }
        ],
        "requestBody": {
            "required": True,
            "content": {
                kind: {"schema": {"type": "string"}, "example": _EXAMPLE} for kind in (_LINES, "application/jsonl")
            },
        },
    },
)
async def batch(batch: Annotated[Batch, Depends(open_batch)]) -> StreamingResponse:
    """Answer many requests, one JSON object per line, in order and as soon as each is complete.

    A line has `skill` ("detect", "point", "query", "caption" or "gaze"), the fields of the route of that skill, and
    optionally `custom_id`, which the response repeats. An invalid line gets an `error` and does not affect the others.
    The time limit applies to each line. Blank lines are skipped. With `action=mpu-create`, the route creates an upload
    for Moondream's batch API.
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
