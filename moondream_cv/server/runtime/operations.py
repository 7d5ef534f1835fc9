"""Operations: method calls that run in the thread or process of an engine, between two of its steps.

A method can be a generator. It then yields requests, which decode in one batch with all other requests, receives their
jobs when they are finished, and returns the result of the operation.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

from moondream_cv.errors import RequestCancelled
from moondream_cv.requests import ErrorResult, Request

if TYPE_CHECKING:
    from collections.abc import Hashable

    from moondream_cv.engine.local_model import LocalModel
    from moondream_cv.engine.scheduler import Scheduler
    from moondream_cv.engine.sequence_state import Job

RequestId = TypeVar("RequestId", bound="Hashable")

MIN_STEPS_BETWEEN_PAUSES = 16  # about one detection


class OperationTarget(Protocol):
    """Opens the object whose methods operations call. Equal targets share one object; instances are picklable."""

    def open(self, model: LocalModel) -> Any:
        """Return the object, which has a method `close`. Called in the engine before the first operation."""

    def __hash__(self) -> int: ...


@dataclass(frozen=True, eq=False)
class Operation:
    """A method call in an engine.

    Attributes:
        target: Opens the object.
        method: Name of the method.
        arguments: Arguments by name; picklable.
        pauses_decoding: Whether the call takes long. Between two such calls, other requests advance by some steps.
    """

    target: OperationTarget
    method: str
    arguments: Mapping[str, Any]
    pauses_decoding: bool = False

    @property
    def skill(self) -> str:
        """Name for metrics."""
        return self.method


@dataclass(frozen=True)
class OperationResult:
    """Result of a successful operation.

    Attributes:
        value: Return value of the method.
    """

    value: Any


class FinishedOperation(NamedTuple):
    """Outcome of an operation.

    Attributes:
        result: Return value or error.
        jobs: Requests that the operation submitted last.
    """

    result: OperationResult | ErrorResult
    jobs: Sequence[Job] = ()


class _Running(NamedTuple):
    steps: Generator[Sequence[Request], Sequence[Job], Any]
    jobs: list[Job]


class OperationQueue(Generic[RequestId]):
    """Runs operations in the order of their submission. `submit` and `cancel` are thread-safe."""

    def __init__(self, model: LocalModel, scheduler: Scheduler) -> None:
        self._model, self._scheduler = model, scheduler
        self._lock = threading.Lock()
        self._queue: dict[RequestId, Operation] = {}
        self._cancelled: list[RequestId] = []
        self._running: dict[RequestId, _Running] = {}
        self._targets: dict[OperationTarget, Any] = {}
        self._steps_since_pause = 0

    @property
    def request_ids(self) -> list[RequestId]:
        """IDs of the unfinished operations."""
        with self._lock:
            return [*self._queue, *self._running]

    @property
    def has_work(self) -> bool:
        """Whether operations are unfinished."""
        with self._lock:
            return bool(self._queue or self._running or self._cancelled)

    def submit(self, request_id: RequestId, operation: Operation) -> None:
        """Queue an operation.

        Args:
            request_id: ID that no unfinished operation has.
            operation: The operation.
        """
        with self._lock:
            self._queue[request_id] = operation

    def cancel(self, request_id: RequestId) -> None:
        """Cancel an operation, unless it is a single call that has started."""
        with self._lock:
            if request_id in self._queue or request_id in self._running:
                self._cancelled.append(request_id)

    def start(self, is_decoding: bool) -> dict[RequestId, FinishedOperation]:
        """Run queued operations before a step, up to and including the first one that pauses decoding.

        Args:
            is_decoding: Whether requests decode, which limits how often operations pause them.

        Returns:
            Outcomes of the operations that have finished.
        """
        finished = self._abort()
        self._steps_since_pause += 1
        while True:
            # Select the next operation
            with self._lock:
                request_id, operation = next(iter(self._queue.items()), (None, None))
                if request_id is None or operation is None:
                    return finished
                pauses = operation.pauses_decoding
                if pauses and is_decoding and self._steps_since_pause < MIN_STEPS_BETWEEN_PAUSES:
                    return finished
                del self._queue[request_id]
            # Run it
            outcome = self._call(request_id, operation)
            if outcome is not None:
                finished[request_id] = outcome
            if pauses:
                self._steps_since_pause = 0
                return finished

    def finish(self) -> dict[RequestId, FinishedOperation]:
        """Continue the operations whose requests have finished, after a step.

        Returns:
            Outcomes of the operations that have finished.
        """
        finished = {}
        for request_id, (steps, jobs) in list(self._running.items()):
            if all(job.done for job in jobs):
                outcome = self._continue(request_id, steps, jobs)
                if outcome is not None:
                    finished[request_id] = outcome
        return finished

    def close(self) -> None:
        """Close the objects of all targets."""
        for _, (steps, _) in self._running.items():
            steps.close()
        for opened in self._targets.values():
            opened.close()
        self._targets.clear()

    def _call(self, request_id: RequestId, operation: Operation) -> FinishedOperation | None:
        """Call the method. Return None if it is a generator that waits for requests."""
        try:
            if operation.target not in self._targets:
                self._targets[operation.target] = operation.target.open(self._model)
            value = getattr(self._targets[operation.target], operation.method)(**operation.arguments)
        except Exception as error:  # fails this operation only
            return FinishedOperation(ErrorResult(error))
        if isinstance(value, Generator):
            return self._continue(request_id, value, None)
        return FinishedOperation(OperationResult(value))

    def _continue(
        self,
        request_id: RequestId,
        steps: Generator[Sequence[Request], Sequence[Job], Any],
        jobs: list[Job] | None,
    ) -> FinishedOperation | None:
        """Continue a generator with its jobs, None at the start. Return None if it waits for further requests."""
        with self._lock:
            self._running.pop(request_id, None)
        try:
            requests = next(steps) if jobs is None else steps.send(jobs)
        except StopIteration as stop:
            return FinishedOperation(OperationResult(stop.value), jobs or ())
        except Exception as error:  # fails this operation only
            return FinishedOperation(ErrorResult(error), jobs or ())
        submitted = [self._scheduler.submit(request) for request in requests]
        with self._lock:
            self._running[request_id] = _Running(steps, submitted)
        return None

    def _abort(self) -> dict[RequestId, FinishedOperation]:
        """Finish cancelled operations."""
        with self._lock:
            cancelled, self._cancelled = self._cancelled, []
            queued = [request_id for request_id in cancelled if self._queue.pop(request_id, None) is not None]
            running = {
                request_id: self._running.pop(request_id) for request_id in cancelled if request_id in self._running
            }
        for steps, jobs in running.values():
            for job in jobs:
                self._scheduler.cancel(job)
            steps.close()
        error = RequestCancelled("the request was cancelled")
        return {request_id: FinishedOperation(ErrorResult(error)) for request_id in (*queued, *running)}
