"""fal's request queue: requests that continue after their submission has been answered, kept in memory.

A request holds a queue slot of the service from its submission until it ends. It is IN_QUEUE until its image is loaded,
then IN_PROGRESS: the engine batches requests, so none waits for others to end. Finished requests are kept for a limited
time, and are lost when the server stops. The routes are in `queue_routes.py`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import datetime, timezone
from typing import Any, Literal

from moondream_cv.server.errors import ServerError, to_server_error
from moondream_cv.server.request_context import RequestContext, run_in_background
from moondream_cv.server.service import Service

Work = Callable[[RequestContext, Callable[[], None]], Coroutine[Any, Any, dict[str, Any]]]
State = Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]
CANCELLED = "cancelled"


class QueuedRequest:
    """A request in the queue.

    Attributes:
        id: Random ID with 122 bits; any client that has it can read the result.
        state: State, as fal names it.
        result: Result of a request that has succeeded.
        error: Error of a request that has failed.
        logs: Log lines in fal's format.
        seconds: Time from submission to the end, once the request has ended.
    """

    def __init__(self, description: str) -> None:
        self.id = str(uuid.uuid4())
        self.state: State = "IN_QUEUE"
        self.result: dict[str, Any] | None = None
        self.error: ServerError | None = None
        self.logs: list[dict[str, str]] = []
        self.seconds: float | None = None
        self._description, self._submitted = description, time.monotonic()
        self._changed = asyncio.Event()
        self._log(f"queued: {description}")

    @property
    def finished_at(self) -> float:
        """Time of the end on the monotonic clock. The request must have ended."""
        assert self.seconds is not None
        return self._submitted + self.seconds

    def start(self) -> None:
        """Set the state to IN_PROGRESS, when the request is submitted to the model."""
        self._change("IN_PROGRESS", f"started: {self._description}")

    def end(self, result: dict[str, Any] | None, error: ServerError | None) -> None:
        """Set the state to COMPLETED, with a result or an error."""
        self.result, self.error = result, error
        self.seconds = time.monotonic() - self._submitted
        if error is None:
            self._change("COMPLETED", f"finished in {self.seconds:.2f} s")
        else:
            self._change("COMPLETED", f"failed after {self.seconds:.2f} s: {error.message}", "ERROR")

    async def changes(self) -> AsyncIterator[None]:
        """Yield immediately, then after every change until the request has ended."""
        while True:
            changed = self._changed
            yield
            if self.state == "COMPLETED" and changed is self._changed:
                return
            await changed.wait()

    def _change(self, state: State, message: str, level: str = "INFO") -> None:
        self.state = state
        self._log(message, level)
        self._changed.set()
        self._changed = asyncio.Event()

    def _log(self, message: str, level: str = "INFO") -> None:
        now = datetime.now(timezone.utc).isoformat()
        self.logs.append({"message": message, "level": level, "source": "moondream-cv", "timestamp": now})


class RequestQueue:
    """The queued requests of one service."""

    def __init__(self, service: Service, keep: int = 1000, seconds: float = 600.0) -> None:
        """Create an empty queue.

        Args:
            service: Service that runs the requests.
            keep: Maximum number of finished requests to keep; the oldest are dropped first.
            seconds: Time in seconds to keep a finished request.
        """
        self._service, self._keep, self._seconds = service, keep, seconds
        self._running: dict[str, tuple[QueuedRequest, asyncio.Task[None]]] = {}
        self._finished: dict[str, QueuedRequest] = {}  # oldest end first

    def submit(self, work: Work, description: str) -> QueuedRequest:
        """Start a request.

        Args:
            work: Returns the result. It gets a request context, and a function to call when it submits the request to
                the model.
            description: Description for the log lines.

        Raises:
            ServerError: 503 if the service is not ready, 429 if the queue is full.
        """
        request = QueuedRequest(description)

        async def run(context: RequestContext) -> None:
            result, error = None, ServerError(400, "the request was cancelled", kind=CANCELLED)
            try:
                result = await work(context, request.start)
            except Exception as caught:
                error = to_server_error(caught)
            finally:  # also if the task is cancelled
                request.end(result, error if result is None else None)
                del self._running[request.id]
                self._finished[request.id] = request
                self._drop_old()

        self._running[request.id] = request, run_in_background(self._service, run)
        return request

    def find(self, id: str) -> QueuedRequest:
        """Return the request with an ID.

        Raises:
            ServerError: 404; the request does not exist or has been dropped.
        """
        self._drop_old()
        if id in self._running:
            return self._running[id][0]
        if id in self._finished:
            return self._finished[id]
        raise ServerError(
            404,
            f"there is no request {id!r:.80}; finished requests are kept for {self._seconds / 60:g} minutes,"
            f" up to {self._keep} of them",
        )

    def position(self, request: QueuedRequest) -> int:
        """Return the number of earlier requests that are IN_QUEUE."""
        waiting = [other.id for other, _ in self._running.values() if other.state == "IN_QUEUE"]
        return waiting.index(request.id) if request.id in waiting else 0

    async def cancel(self, request: QueuedRequest) -> None:
        """Cancel a request and release its queue slot; does nothing if the request has ended.

        Its state is COMPLETED afterwards, with an error.
        """
        if request.id in self._running:
            _, task = self._running[request.id]
            task.cancel()
            await asyncio.wait([task])

    def _drop_old(self) -> None:
        oldest = time.monotonic() - self._seconds
        for request in list(self._finished.values()):
            if len(self._finished) <= self._keep and request.finished_at >= oldest:
                return
            del self._finished[request.id]
