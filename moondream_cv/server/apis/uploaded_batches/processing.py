"""Runs the lines of uploaded batches in the background, without delaying interactive requests."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import deque
from collections.abc import Coroutine
from typing import Any, NamedTuple

from moondream_cv.server.apis.batch_lines import MAX_IN_FLIGHT, LineRunner, parse_line, pop_id
from moondream_cv.server.apis.uploaded_batches.batches import MAX_LINE_BYTES, UploadedBatch
from moondream_cv.server.errors import ServerError, to_server_error
from moondream_cv.server.image_decoding import FairSlots
from moondream_cv.server.runtime.engine_loop import Usage
from moondream_cv.server.service import Service


class LineResult(NamedTuple):
    """The result of a line.

    Attributes:
        content: Line of JSON with the result or the error.
        is_error: Whether the line failed.
        usage: Token counts of the line.
    """

    content: bytes
    is_error: bool
    usage: Usage


class BatchProcessor:
    """Runs the lines of batches.

    Each line holds a queue slot of the service while it runs. At most `MAX_IN_FLIGHT` lines of all batches run at the
    same time, in at most half of the queue slots. Batches that run at the same time take turns.
    """

    def __init__(self, service: Service) -> None:
        self._service, self._turns = service, FairSlots(MAX_IN_FLIGHT)

    async def run(self, batch: UploadedBatch) -> None:
        """Run all lines of a batch, and write their results in the order of the lines.

        Args:
            batch: The batch.

        Raises:
            FileClosedError: The batch was deleted.
            OSError: The lines cannot be read, or a result cannot be written.
        """
        runner, lines = LineRunner(self._service), batch.lines()
        in_flight: deque[asyncio.Task[LineResult]] = deque()
        try:
            index = 0
            while following := await asyncio.to_thread(list, itertools.islice(lines, 1)):
                in_flight.append(await self._start(batch.id, self._result(runner, index, following[0])))
                index += 1
                while in_flight and (len(in_flight) >= MAX_IN_FLIGHT or in_flight[0].done()):
                    await _write(batch, in_flight)
            while in_flight:
                await _write(batch, in_flight)
        finally:
            for task in in_flight:
                task.cancel()
            runner.close()

    async def _start(self, batch_id: str, work: Coroutine[Any, Any, LineResult]) -> asyncio.Task[LineResult]:
        """Start a line as soon as it is the turn of the batch and a queue slot is free."""
        try:
            await self._turns.acquire(batch_id)
            try:
                await self._service.wait_for_slot()
            except BaseException:
                self._turns.release(batch_id)
                raise
        except BaseException:
            work.close()
            raise
        task = asyncio.ensure_future(work)

        def release(_: object) -> None:
            self._service.release_slot()
            self._turns.release(batch_id)

        task.add_done_callback(release)
        return task

    async def _result(self, runner: LineRunner, index: int, line: bytes | None) -> LineResult:
        """Return the result of one line. All errors become part of the result."""
        values: dict[str, Any] = {"line_index": index, "id": None}
        usage = Usage()
        try:
            if line is None:
                raise ServerError(413, f"a line must have at most {MAX_LINE_BYTES:,} bytes")
            fields = await parse_line(line)
            values["id"] = pop_id(fields, "id")
            if "image" in fields:
                fields["image_url"] = fields.pop("image")
            result, usage = await runner.run(fields)
            values |= {"status": "ok", "result": result, "usage": usage_body(usage)}
        except Exception as caught:
            values |= {"status": "error", "error": error_detail(to_server_error(caught))}
        # ASCII, because many parsers treat U+2028 and similar characters, which JSON need not escape, as line breaks
        content = json.dumps(values, separators=(",", ":")).encode() + b"\n"
        return LineResult(content, values["status"] == "error", usage)


def usage_body(usage: Usage) -> dict[str, int]:
    """Return token counts in the format of Moondream's batch API."""
    return {"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens}


def error_detail(error: ServerError) -> dict[str, str]:
    """Return an error in the format of Moondream's batch API."""
    return {"code": error.kind, "message": error.message}


async def _write(batch: UploadedBatch, in_flight: deque[asyncio.Task[LineResult]]) -> None:
    """Write the result of the first line when it is complete."""
    await asyncio.wait([in_flight[0]])
    await asyncio.to_thread(batch.write_result, *in_flight.popleft().result())
