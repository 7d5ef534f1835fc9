"""A scheduler loop for callers that identify their requests by IDs they choose.

`engines.py` runs this loop in a thread, and `engine_process.py` runs it in a separate process.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from moondream_cv.requests import Request, Result
from moondream_cv.server.runtime.operations import FinishedOperation, Operation, OperationQueue, OperationResult

if TYPE_CHECKING:
    from moondream_cv.engine.local_model import LocalModel
    from moondream_cv.engine.sequence_state import Job

RequestId = TypeVar("RequestId", bound=Hashable)


class Usage(NamedTuple):
    """Token counts of one request.

    Attributes:
        prompt_tokens: Positions of the image and the prompt in the context.
        completion_tokens: Positions of the reply in the context.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class StepOutput(Generic[RequestId]):
    """Output of one engine step.

    Attributes:
        pieces: New pieces of streamed requests, by request ID.
        results: Results and token counts of finished requests and operations, by request ID.
        num_running: Number of requests that decode.
        num_waiting: Number of requests that wait for admission.
        cache_hits: Hits of the image cache since the previous step.
        cache_misses: Misses of the image cache since the previous step.
    """

    pieces: dict[RequestId, list[Any]]
    results: dict[RequestId, tuple[Result | OperationResult, Usage]]
    num_running: int
    num_waiting: int
    cache_hits: int
    cache_misses: int


class EngineLoop(Generic[RequestId]):
    """Steps the scheduler of a model in one thread. `submit` and `cancel` are thread-safe."""

    def __init__(self, model: LocalModel) -> None:
        self._model, self._scheduler = model, model.scheduler()
        self._operations: OperationQueue[RequestId] = OperationQueue(model, self._scheduler)
        self._is_decoding = False
        self._jobs: dict[RequestId, tuple[Job, bool]] = {}
        self._ids: dict[Job, RequestId] = {}
        self._lock = threading.Lock()
        self._cache_counts = (0, 0)

    @property
    def request_ids(self) -> list[RequestId]:
        """IDs of the unfinished requests and operations."""
        with self._lock:
            return [*self._jobs, *self._operations.request_ids]

    def submit(self, request_id: RequestId, request: Request | Operation, streamed: bool) -> None:
        """Add a request or an operation.

        Args:
            request_id: ID that no unfinished request has.
            request: The request or the operation.
            streamed: Whether to return the pieces of the reply as they are generated.
        """
        if isinstance(request, Operation):
            self._operations.submit(request_id, request)
            return
        with self._lock:
            job = self._scheduler.submit(request)
            self._jobs[request_id], self._ids[job] = (job, streamed), request_id

    def cancel(self, request_id: RequestId) -> None:
        """Cancel a request; does nothing if it has finished."""
        with self._lock:
            job, _ = self._jobs.get(request_id, (None, False))
        if job is not None:
            self._scheduler.cancel(job)
        else:
            self._operations.cancel(request_id)

    def close(self) -> None:
        """Close what operations have opened. Call this after the last step, in the thread of the steps."""
        self._operations.close()

    def step(self) -> tuple[bool, StepOutput[RequestId]]:
        """Run queued operations and one step of the scheduler.

        Returns:
            Whether any work is left, and the output of the step.

        Raises:
            Exception: The engine itself has failed. Errors of single requests are results.
        """
        # Run operations and decode
        finished = self._operations.start(self._is_decoding)
        self._is_decoding = self._scheduler.step()
        finished |= self._operations.finish()

        # Collect new pieces and finished requests
        with self._lock:
            streams = [(request_id, job) for request_id, (job, streamed) in self._jobs.items() if streamed]
            pieces = {request_id: new for request_id, job in streams if (new := job.take())}
            results = {request_id: _result_of(operation) for request_id, operation in finished.items()}
            for job in self._scheduler.results():
                if job not in self._ids:
                    continue  # a request of an operation
                request_id = self._ids.pop(job)
                del self._jobs[request_id]
                assert job.result is not None
                results[request_id] = job.result, Usage(job.prompt_tokens, job.completion_tokens)

        # Count cache lookups since the previous step
        cache, before = self._model.image_cache, self._cache_counts
        self._cache_counts = (0, 0) if cache is None else (cache.hits, cache.misses)
        hits, misses = (now - earlier for now, earlier in zip(self._cache_counts, before, strict=True))
        has_work = self._is_decoding or self._operations.has_work
        return has_work, StepOutput(
            pieces, results, self._scheduler.running, self._scheduler.waiting, cache_hits=hits, cache_misses=misses
        )


def _result_of(operation: FinishedOperation) -> tuple[Result | OperationResult, Usage]:
    prompt_tokens = sum(job.prompt_tokens for job in operation.jobs)
    return operation.result, Usage(prompt_tokens, sum(job.completion_tokens for job in operation.jobs))
