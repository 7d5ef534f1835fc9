"""`UploadedBatch`: the state of one batch, from the upload of its file to its results."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from typing import Literal

from moondream_cv.server.apis.uploaded_batches.files import FileClosedError, RandomAccessFile
from moondream_cv.server.apis.uploaded_batches.uploads import BLOCK, Upload, split_lines
from moondream_cv.server.errors import ServerError
from moondream_cv.server.runtime.engine_loop import Usage

MAX_LINES = 100_000
MAX_NEWLINES = 2 * MAX_LINES  # blank lines included
MAX_LINE_BYTES = 10 * 2**20

Status = Literal["uploading", "chunking", "processing", "completed", "failed"]


class UploadedBatch:
    """A file of requests, and the results of its lines.

    Attributes:
        id: Random ID with 122 bits.
        upload_id: ID of the upload.
        upload: The uploaded file; it is deleted when the batch ends.
        status: Status, as Moondream's API names it; "uploading" until the upload is complete.
        size: Size of the file in bytes; 0 until the upload is complete.
        total: Number of lines; 0 until they are counted.
        num_completed: Number of lines with a result.
        num_failed: Number of lines with an error.
        usage: Token counts of all lines.
        error: Error of a batch that has failed.
        created_at: Time at which the upload was created.
        ended_at: Time at which the batch was completed or failed; None before.
        expires_at: Time at which the batch is deleted.
        task: Task that runs the lines; None until the upload is complete.
    """

    def __init__(self) -> None:
        """Create a batch without content.

        Raises:
            OSError: The files cannot be created.
        """
        self.id, self.upload_id = str(uuid.uuid4()), secrets.token_urlsafe(24)
        self.upload, self._output, self._output_size = Upload(), RandomAccessFile(), 0
        self.status: Status = "uploading"
        self.size = self.total = self.num_completed = self.num_failed = 0
        self.usage = Usage()
        self.error: ServerError | None = None
        self.created_at = self.expires_at = datetime.now(timezone.utc)
        self.ended_at: datetime | None = None
        self.task: asyncio.Task[None] | None = None
        self._expiry: asyncio.TimerHandle | None = None

    def count_lines(self) -> int:
        """Return the number of lines of the file. Takes seconds for a large file.

        Raises:
            ServerError: 400, the file has no lines; 413, it has too many lines.
            FileClosedError: The batch was deleted.
            OSError: The file cannot be read.
        """
        count = sum(1 for _ in split_lines(_limit_newlines(self.upload.blocks()), MAX_LINE_BYTES))
        if not count:
            raise ServerError(400, "the file must not be empty; write one JSON object per line")
        if count > MAX_LINES:
            raise ServerError(413, f"the file must have at most {MAX_LINES:,} lines, got {count:,}")
        return count

    def lines(self) -> Iterator[bytes | None]:
        """Yield the lines of the file that are not blank; None in place of a line that is too long.

        Raises:
            FileClosedError: The batch was deleted.
            OSError: The file cannot be read.
        """
        return split_lines(self.upload.blocks(), MAX_LINE_BYTES)

    def write_result(self, content: bytes, is_error: bool, usage: Usage) -> None:
        """Append the result of a line.

        Args:
            content: Line of JSON with the result or the error.
            is_error: Whether the line failed.
            usage: Token counts of the line.

        Raises:
            FileClosedError: The batch was deleted.
            OSError: The result cannot be written.
        """
        self._output.write(self._output_size, content)
        self._output_size += len(content)
        self.usage = Usage(*(sum(counts) for counts in zip(self.usage, usage, strict=True)))
        if is_error:
            self.num_failed += 1
        else:
            self.num_completed += 1

    def output(self) -> Iterator[bytes]:
        """Yield the results of the lines, one JSON object per line.

        Raises:
            ServerError: 404; the batch was deleted.
        """
        for start in range(0, self._output_size, BLOCK):
            try:
                yield self._output.read(start, BLOCK)
            except FileClosedError:
                raise ServerError(404, "the batch was deleted") from None

    @property
    def output_size(self) -> int:
        """Size of the results in bytes."""
        return self._output_size

    def end(self, error: ServerError | None) -> None:
        """Set the final status and delete the uploaded file.

        Args:
            error: Error of a batch that has failed; None: the batch is completed.
        """
        self.error, self.status = error, "completed" if error is None else "failed"
        self.ended_at = datetime.now(timezone.utc)
        self.upload.close()

    def expire_after(self, seconds: float, expire: Callable[[UploadedBatch], None]) -> None:
        """Set the time at which the batch expires. An earlier time is dropped.

        Args:
            seconds: Time in seconds from now.
            expire: Called with the batch at that time.
        """
        self.keep()
        self.expires_at = datetime.now(timezone.utc) + timedelta(seconds=seconds)
        self._expiry = asyncio.get_running_loop().call_later(seconds, expire, self)

    def keep(self) -> None:
        """Keep the batch until `expire_after` is called."""
        if self._expiry is not None:
            self._expiry.cancel()

    def close(self) -> None:
        """Cancel the work and delete the files."""
        self.keep()
        if self.task is not None:
            self.task.cancel()
        self.upload.close()
        self._output.close()


def _limit_newlines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield blocks unless they have too many line breaks, which would take long to split."""
    count = 0
    for block in blocks:
        count += block.count(b"\n")
        if count > MAX_NEWLINES:
            raise ServerError(413, f"the file must have at most {MAX_NEWLINES:,} line breaks")
        yield block
