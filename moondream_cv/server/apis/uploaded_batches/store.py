"""`BatchStore`: the uploaded batches of one server, with their limits and their expiry."""

from __future__ import annotations

import asyncio

from moondream_cv.durable_files import is_disk_full
from moondream_cv.server.apis.uploaded_batches.batches import UploadedBatch
from moondream_cv.server.apis.uploaded_batches.files import FileClosedError
from moondream_cv.server.apis.uploaded_batches.processing import BatchProcessor
from moondream_cv.server.errors import ServerError, to_server_error
from moondream_cv.server.service import Service

MAX_OPEN = 8  # batches that are uploaded or run
MAX_ENDED = 100
UPLOAD_SECONDS = 3600.0
RESULT_SECONDS = 7 * 24 * 3600.0


class BatchStore:
    """The uploaded batches of one server. They are lost when the server stops."""

    def __init__(
        self, service: Service, upload_seconds: float = UPLOAD_SECONDS, result_seconds: float = RESULT_SECONDS
    ) -> None:
        """Create an empty store.

        Args:
            service: Service that runs the lines.
            upload_seconds: Time in seconds after which an upload without a further part expires.
            result_seconds: Time in seconds to keep the results of a batch.
        """
        self._service, self._processor = service, BatchProcessor(service)
        self._upload_seconds, self._result_seconds = upload_seconds, result_seconds
        self._batches: dict[str, UploadedBatch] = {}

    def create(self) -> UploadedBatch:
        """Create a batch, whose file can be uploaded.

        Raises:
            ServerError: 503, the service is not ready; 429, too many batches are uploaded or run; 507, the disk is
                full.
        """
        self._service.check_ready()
        num_open = sum(batch.ended_at is None for batch in self._batches.values())
        if num_open >= MAX_OPEN:
            message = f"{num_open} batches are uploaded or run; wait for one of them, or delete one"
            raise ServerError(429, message, retry_after=60)
        try:
            batch = UploadedBatch()
        except OSError as error:
            raise storage_error(error) from error
        self._batches[batch.id] = batch
        self.touch(batch)
        return batch

    def find(self, batch_id: str) -> UploadedBatch:
        """Return the batch with an ID.

        Raises:
            ServerError: 404; the batch does not exist, has expired, or was deleted.
        """
        batch = self._batches.get(batch_id)
        if batch is None:
            days = self._result_seconds / (24 * 3600)
            message = (
                f"there is no batch {batch_id!r:.80}; results are kept for {days:g} days, uploads for"
                f" {self._upload_seconds / 60:g} minutes after the last part, and a restart of the server deletes all"
            )
            raise ServerError(404, message)
        return batch

    def find_upload(self, batch_id: str, upload_id: str) -> UploadedBatch:
        """Return the batch of an upload.

        Raises:
            ServerError: 404; the batch or the upload does not exist.
        """
        batch = self.find(batch_id)
        if batch.upload_id != upload_id:
            raise ServerError(404, f"batch {batch_id!r:.80} has no upload {upload_id!r:.80}", param="uploadId")
        return batch

    def touch(self, batch: UploadedBatch) -> None:
        """Start the time again after which an upload expires."""
        if batch.status == "uploading":
            batch.expire_after(self._upload_seconds, self.delete)

    def start(self, batch: UploadedBatch, etags: dict[int, str]) -> None:
        """Complete an upload and run its lines in the background. Does nothing if the upload is complete.

        Args:
            batch: The batch.
            etags: ETag of each part, by number.

        Raises:
            ServerError: 503, the service is not ready; 400, a part is missing or has another ETag.
        """
        if batch.status != "uploading":  # a client that did not receive the response tries again
            return
        self._service.check_ready()
        batch.size = batch.upload.complete(etags)
        batch.status = "chunking"
        batch.keep()
        batch.task = self._service.spawn(self._run(batch))

    def delete(self, batch: UploadedBatch) -> None:
        """Delete a batch. Its lines are cancelled if it runs."""
        self._batches.pop(batch.id, None)
        batch.close()

    def close(self) -> None:
        """Delete all batches."""
        for batch in list(self._batches.values()):
            self.delete(batch)

    async def _run(self, batch: UploadedBatch) -> None:
        error = None
        try:
            batch.total = await asyncio.to_thread(batch.count_lines)
            batch.status = "processing"
            await self._processor.run(batch)
        except FileClosedError:  # the batch was deleted
            return
        except Exception as caught:
            error = storage_error(caught) if isinstance(caught, OSError) else to_server_error(caught)
        batch.end(error)
        batch.expire_after(self._result_seconds, self.delete)
        self._drop_oldest()

    def _drop_oldest(self) -> None:
        ended = [batch for batch in self._batches.values() if batch.ended_at is not None]
        ended.sort(key=lambda batch: batch.expires_at)
        for batch in ended[: max(0, len(ended) - MAX_ENDED)]:
            self.delete(batch)


def storage_error(error: OSError) -> ServerError:
    """Return the error response for a file that cannot be written or read."""
    if is_disk_full(error):
        message = "the disk of the server is full; delete batches, or try again later"
        return ServerError(507, message, kind="storage_error")
    return to_server_error(error)
