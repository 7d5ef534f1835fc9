"""A scheduler driven for callers that know their requests by names of their own.

Which thread or process that happens in, and how callers hear of it, is left to `engines.py` and `engine_process.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from moondream_cv.requests import Request, Result

if TYPE_CHECKING:
    from moondream_cv.engine.local import LocalModel
    from moondream_cv.engine.sequence_state import Job

Name = TypeVar("Name", bound=Hashable)


class Usage(NamedTuple):
    """Positions of the context that a request took: image and prompt, and the reply."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class News(Generic[Name]):
    """What one step has brought.

    Attributes:
        pieces: Of requests that are streamed.
        results: Of requests that have ended, and what they took of the context.
        rows: Requests that decode.
        waiting: Requests that wait for room.
        hits: How often an image was found among those that are kept, since the last step.
        misses: How often it was not.
    """

    pieces: dict[Name, list[Any]]
    results: dict[Name, tuple[Result, Usage]]
    rows: int
    waiting: int
    hits: int
    misses: int


class Driver(Generic[Name]):
    """Steps a scheduler in one thread; `submit` and `cancel` may be called from any."""

    def __init__(self, model: LocalModel) -> None:
        self._model, self._scheduler = model, model.scheduler()
        self._jobs: dict[Name, tuple[Job, bool]] = {}
        self._names: dict[Job, Name] = {}
        self._lock = threading.Lock()
        self._seen = (0, 0)

    @property
    def names(self) -> list[Name]:
        """Those of the requests that have not ended."""
        with self._lock:
            return list(self._jobs)

    def submit(self, name: Name, request: Request, streamed: bool) -> None:
        """Take a request.

        Args:
            name: Which no other request has that has not ended.
            streamed: Whether its pieces are wanted as they come.
        """
        with self._lock:
            job = self._scheduler.submit(request)
            self._jobs[name], self._names[job] = (job, streamed), name

    def cancel(self, name: Name) -> None:
        """Let go of a request, if it has not ended."""
        with self._lock:
            job, _ = self._jobs.get(name, (None, False))
        if job is not None:
            self._scheduler.cancel(job)

    def step(self) -> tuple[bool, News[Name]]:
        """Go on by one step; say whether anything is left to do, and what has come of it.

        Raises:
            Exception: The engine itself has failed.
        """
        going_on = self._scheduler.step()
        with self._lock:
            streams = [(name, job) for name, (job, streamed) in self._jobs.items() if streamed]
            pieces = {name: new for name, job in streams if (new := job.take())}
            results: dict[Name, tuple[Result, Usage]] = {}
            for job in self._scheduler.results():
                name = self._names.pop(job)
                del self._jobs[name]
                assert job.result is not None
                results[name] = job.result, Usage(job.prompt_tokens, job.completion_tokens)
        cache, before = self._model.image_cache, self._seen
        self._seen = (0, 0) if cache is None else (cache.hits, cache.misses)
        hits, misses = (after - earlier for after, earlier in zip(self._seen, before, strict=True))
        return going_on, News(pieces, results, self._scheduler.running, self._scheduler.waiting, hits, misses)
