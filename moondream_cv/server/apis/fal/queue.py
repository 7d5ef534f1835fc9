"""Requests that go on after their submission was answered, as fal's queue has them: their states, kept in memory.

A request holds a place of the service from its submission to its end. Until its image is there it is IN_QUEUE; once the
model has it, IN_PROGRESS: the engine computes requests together, so none waits for others to end. Finished ones are
kept for a while, and lost when the server stops. It knows nothing of HTTP; that is `fal_queue_routes`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import datetime, timezone
from typing import Any, Literal

from moondream_cv.server.errors import ServerError, explain
from moondream_cv.server.service import Exchange, Service

Work = Callable[[Exchange, Callable[[], None]], Coroutine[Any, Any, dict[str, Any]]]
State = Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]
CANCELLED = "cancelled"


class QueuedRequest:
    """One request.

    Attributes:
        id: 122 random bits: who knows it may see the answer.
        state: What fal calls it.
        result: The answer, once there is one.
        error: Why there is none.
        logs: Lines as fal's clients show them.
        seconds: From submission to the end, once there is one.
    """

    def __init__(self, what: str) -> None:
        self.id = str(uuid.uuid4())
        self.state: State = "IN_QUEUE"
        self.result: dict[str, Any] | None = None
        self.error: ServerError | None = None
        self.logs: list[dict[str, str]] = []
        self.seconds: float | None = None
        self._what, self._submitted = what, time.monotonic()
        self._changed = asyncio.Event()
        self._say(f"queued: {what}")

    @property
    def finished_at(self) -> float:
        """On the monotonic clock; only for one that has ended."""
        assert self.seconds is not None
        return self._submitted + self.seconds

    def start(self) -> None:
        """Note that the model has the request."""
        self._change("IN_PROGRESS", f"started: {self._what}")

    def end(self, result: dict[str, Any] | None, error: ServerError | None) -> None:
        """Note the answer, or why there is none."""
        self.result, self.error = result, error
        self.seconds = time.monotonic() - self._submitted
        if error is None:
            self._change("COMPLETED", f"finished in {self.seconds:.2f} s")
        else:
            self._change("COMPLETED", f"failed after {self.seconds:.2f} s: {error.message}", "ERROR")

    async def changes(self) -> AsyncIterator[None]:
        """One value now, and one whenever something has changed, up to the end."""
        while True:
            changed = self._changed
            yield
            if self.state == "COMPLETED" and changed is self._changed:
                return
            await changed.wait()

    def _change(self, state: State, message: str, level: str = "INFO") -> None:
        self.state = state
        self._say(message, level)
        self._changed.set()
        self._changed = asyncio.Event()

    def _say(self, message: str, level: str = "INFO") -> None:
        now = datetime.now(timezone.utc).isoformat()
        self.logs.append({"message": message, "level": level, "source": "moondream-cv", "timestamp": now})


class RequestQueue:
    """The requests of one service."""

    def __init__(self, service: Service, keep: int = 1000, seconds: float = 600.0) -> None:
        """Start with none.

        Args:
            service: Whose places they take.
            keep: Finished requests that are kept at the most; the oldest go first.
            seconds: That a finished request is kept.
        """
        self._service, self._keep, self._seconds = service, keep, seconds
        self._running: dict[str, tuple[QueuedRequest, asyncio.Task[None]]] = {}
        self._finished: dict[str, QueuedRequest] = {}  # in the order in which they ended

    def submit(self, work: Work, what: str) -> QueuedRequest:
        """Begin something.

        Args:
            work: Gives the answer; it is told how to say that the model has the request.
            what: For the log.

        Raises:
            ServerError: The service has no place left.
        """
        request = QueuedRequest(what)

        async def do(exchange: Exchange) -> None:
            result, error = None, ServerError(400, "the request was cancelled", kind=CANCELLED)
            try:
                result = await work(exchange, request.start)
            except Exception as caught:
                error = explain(caught)
            finally:  # also when it is cancelled
                request.end(result, error if result is None else None)
                del self._running[request.id]
                self._finished[request.id] = request
                self._forget()

        self._running[request.id] = request, self._service.background(do)
        return request

    def find(self, id: str) -> QueuedRequest:
        """The request of an id.

        Raises:
            ServerError: 404, there is none, or none any more.
        """
        self._forget()
        if id in self._running:
            return self._running[id][0]
        if id in self._finished:
            return self._finished[id]
        raise ServerError(
            404,
            f"there is no request {id!r:.80}; finished ones are kept for {self._seconds / 60:g} minutes,"
            f" {self._keep} at the most",
        )

    def position(self, request: QueuedRequest) -> int:
        """How many were submitted before a request and are IN_QUEUE."""
        waiting = [other.id for other, _ in self._running.values() if other.state == "IN_QUEUE"]
        return waiting.index(request.id) if request.id in waiting else 0

    async def cancel(self, request: QueuedRequest) -> None:
        """End a request and give its place back; does nothing about one that has ended.

        Its state is COMPLETED then, with an error.
        """
        if request.id in self._running:
            _, task = self._running[request.id]
            task.cancel()
            await asyncio.wait([task])

    def _forget(self) -> None:
        oldest = time.monotonic() - self._seconds
        for request in list(self._finished.values()):
            if len(self._finished) <= self._keep and request.finished_at >= oldest:
                return
            del self._finished[request.id]
