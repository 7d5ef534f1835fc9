"""Calls with a time limit, for libraries that have no timeout setting."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any


class TimeoutExecutor:
    """Runs functions in daemon threads, and abandons the thread of a call that exceeds its time limit.

    Threads are reused after calls that end in time, so that connections which a library keeps per thread are reused as
    well. An abandoned thread does not prevent the program from exiting.
    """

    def __init__(self) -> None:
        """Create an executor without threads."""
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()
        self._closed = False

    def call(self, function: Callable[[], Any], timeout: float) -> Any:
        """Run a function in a thread, and return its result or raise its exception.

        Args:
            function: Function without arguments.
            timeout: Time limit in seconds.

        Raises:
            TimeoutError: The function exceeded the time limit. It keeps running, and its result is discarded.
        """
        with self._lock:
            worker = self._idle.pop() if self._idle else _Worker()
        result = worker.start(function)
        in_time = False
        try:
            in_time = bool(wait([result], timeout).done)
        finally:
            self._release(worker) if in_time else worker.stop()
        if not in_time:
            raise TimeoutError(f"no result within {timeout:g} s")
        return result.result()

    def close(self) -> None:
        """Stop the idle threads; busy ones stop after their calls."""
        with self._lock:
            self._closed = True
            for worker in self._idle:
                worker.stop()
            self._idle.clear()

    def _release(self, worker: _Worker) -> None:
        with self._lock:
            if self._closed:
                worker.stop()
            else:
                self._idle.append(worker)


class _Worker:
    """A daemon thread that runs one function at a time."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="moondream-cv-call", daemon=True).start()

    def start(self, function: Callable[[], Any]) -> Future[Any]:
        result: Future[Any] = Future()
        self._work.put((function, result))
        return result

    def stop(self) -> None:
        self._work.put(None)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            function, result = work
            try:
                result.set_result(function())
            except BaseException as error:
                result.set_exception(error)
            del work, function, result  # an idle thread must not keep the objects of a call alive
