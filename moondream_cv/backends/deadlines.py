"""Calls that are given up after a while, for libraries that cannot be told to."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any


class Callers:
    """Threads that make calls for others, and are left behind with a call that takes too long.

    A thread whose call was in time makes later ones too, so that connections which a library keeps per thread are used
    again. They are daemons: one that never returns does not keep the program from ending.
    """

    def __init__(self) -> None:
        self._idle: list[_Caller] = []
        self._lock = threading.Lock()
        self._closed = False

    def call(self, function: Callable[[], Any], timeout: float) -> Any:
        """What a function returns or raises.

        Args:
            timeout: Seconds that it may take.

        Raises:
            TimeoutError: It took longer, and goes on unheard.
        """
        with self._lock:
            caller = self._idle.pop() if self._idle else _Caller()
        result = caller.start(function)
        in_time = False
        try:
            in_time = bool(wait([result], timeout).done)
        finally:
            self._keep(caller) if in_time else caller.stop()
        if not in_time:
            raise TimeoutError(f"no answer within {timeout:g} s")
        return result.result()

    def close(self) -> None:
        """End the threads that are idle; the others end with their calls."""
        with self._lock:
            self._closed = True
            for caller in self._idle:
                caller.stop()
            self._idle.clear()

    def _keep(self, caller: _Caller) -> None:
        with self._lock:
            if self._closed:
                caller.stop()
            else:
                self._idle.append(caller)


class _Caller:
    """One such thread."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="moondream-cv-caller", daemon=True).start()

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
            del work, function, result  # nothing of a call is kept while the thread is idle
