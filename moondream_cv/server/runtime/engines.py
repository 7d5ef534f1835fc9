"""Where the requests of a server are computed: one thread around a local model's scheduler, or threads around a remote
one.

Both take calls and report to the event loop. They know nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from moondream_cv.errors import MoondreamError, RequestCancelled, UnsupportedSkill
from moondream_cv.requests import (
    CaptionResult,
    DetectResult,
    ErrorResult,
    PointResult,
    QueryResult,
    Reasoning,
    Request,
    Result,
    pieces_of,
)
from moondream_cv.server.runtime.engine_loop import Driver, Usage
from moondream_cv.server.runtime.metrics import Meters

if TYPE_CHECKING:
    from moondream_cv.engine.local import LocalModel

logger = logging.getLogger(__name__)

REMOTE_THREADS = 32


class Call:
    """A request in an engine, as an event loop sees it.

    Attributes:
        request: What was asked.
        streamed: Whether its pieces are wanted as they come.
        done: Its result, once it is there.
        pieces: Objects, points and text as they come, where wanted; None is the end.
        usage: Complete when the result is.
    """

    def __init__(self, request: Request, streamed: bool = False) -> None:
        self.request, self.streamed = request, streamed
        self.loop = asyncio.get_running_loop()
        self.done: asyncio.Future[Result] = self.loop.create_future()
        self.pieces: asyncio.Queue[Any] = asyncio.Queue()
        self.usage = Usage()

    def add(self, pieces: list[Any]) -> None:
        for piece in pieces:
            self.pieces.put_nowait(piece)

    def finish(self, result: Result, usage: Usage) -> None:
        if not self.done.done():
            self.usage = usage
            self.done.set_result(result)
            self.pieces.put_nowait(None)


class Engine(Protocol):
    """What a server puts its calls to, from its event loop."""

    def submit(self, call: Call) -> None:
        """Take a call; it reports from now on."""

    def cancel(self, call: Call) -> None:
        """Let go of a call that nobody waits for."""

    def stop(self) -> None:
        """Finish what is running, and end. Blocks."""

    @property
    def alive(self) -> bool:
        """Whether calls have any prospect of an answer."""


class LocalEngine:
    """Drives the scheduler of a model on this machine, so that calls that arrive together decode together."""

    def __init__(self, model: LocalModel, meters: Meters) -> None:
        self._driver: Driver[Call] = Driver(model)
        self._meters = meters
        self._lock = threading.Lock()
        self._work = threading.Event()
        self._stopping = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="moondream-cv engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._failure is None and self._thread.is_alive()

    def submit(self, call: Call) -> None:
        with self._lock:
            if self._failure is not None or self._stopping:
                call.finish(ErrorResult(self._failure or RequestCancelled("the engine is stopping")), Usage())
                return
            self._driver.submit(call, call.request, call.streamed)
        self._work.set()

    def cancel(self, call: Call) -> None:
        self._driver.cancel(call)
        self._work.set()

    def stop(self) -> None:
        with self._lock:
            self._stopping = True
        self._work.set()
        self._thread.join()

    def _run(self) -> None:
        last = False
        while not last:
            self._work.wait()
            self._work.clear()
            last = self._stopping  # read before the steps: nothing is submitted once it is set
            going_on = True
            while going_on:
                try:
                    going_on, news = self._driver.step()
                except Exception as error:  # of the engine itself; a request's own errors are its results
                    logger.exception("the engine has failed, and answers nothing any more")
                    self._fail(error)
                    return
                self._meters.count(news)
                report(news.pieces, news.results)

    def _fail(self, error: Exception) -> None:
        failure = broken()
        failure.__cause__ = error
        with self._lock:
            self._failure = failure
        report({}, dict.fromkeys(self._driver.names, (ErrorResult(failure), Usage())))


class RemoteEngine:
    """Passes calls on to a model that is elsewhere, each in a thread of its own."""

    alive = True

    def __init__(self, model: Any, meters: Meters) -> None:
        self._model, self._meters = model, meters
        self._pool = ThreadPoolExecutor(REMOTE_THREADS, thread_name_prefix="moondream-cv remote")
        self._cancelled: set[Call] = set()

    def submit(self, call: Call) -> None:
        self._pool.submit(self._run, call)

    def cancel(self, call: Call) -> None:
        if not call.done.done():
            self._cancelled.add(call)

    def stop(self) -> None:
        self._pool.shutdown()

    def _run(self, call: Call) -> None:
        try:
            if call in self._cancelled:
                result: Result = ErrorResult(RequestCancelled("the request was cancelled"))
            else:
                result = self._stream(call) if call.streamed else self._model.run([call.request])[0]
        except Exception as error:
            result = ErrorResult(error)
        self._cancelled.discard(call)
        report({}, {call: (result, Usage())})

    def _stream(self, call: Call) -> Result:
        """Pass on the pieces of a reply; of a model that does not stream, all of them at the end."""
        stream = getattr(self._model, "stream", None)
        try:
            if stream is None:
                raise UnsupportedSkill("it does not stream")
            given = stream(call.request)
        except UnsupportedSkill:
            result = self._model.run([call.request])[0]
            report({call: pieces_of(result)}, {})
            return result
        pieces = []
        for piece in given:
            if call in self._cancelled:
                return ErrorResult(RequestCancelled("the request was cancelled"))
            pieces.append(piece)
            report({call: [piece]}, {})
        return _assemble(call.request, pieces)


def _assemble(request: Request, pieces: list[Any]) -> Result:
    """The result that a stream amounts to."""
    if request.skill == "detect":
        return DetectResult(tuple(pieces))
    if request.skill == "point":
        return PointResult(tuple(pieces))
    reasoning = next((piece for piece in pieces if isinstance(piece, Reasoning)), None)
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    return CaptionResult(text) if request.skill == "caption" else QueryResult(text, reasoning)


def broken() -> MoondreamError:
    """What callers are told once an engine has failed."""
    return MoondreamError("the engine has failed; the server must be started again")


def report(pieces: Mapping[Call, list[Any]], results: Mapping[Call, tuple[Result, Usage]]) -> None:
    """Tell event loops what calls have come to, from another thread; one that is closed has nobody left who waits."""
    news: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}
    for call, new in pieces.items():
        news.setdefault(call.loop, []).append(partial(call.add, new))
    for call, (result, usage) in results.items():
        news.setdefault(call.loop, []).append(partial(call.finish, result, usage))
    for loop, steps in news.items():
        try:
            loop.call_soon_threadsafe(_do_all, steps)
        except RuntimeError:
            logger.debug("an answer came after its event loop was closed")


def _do_all(steps: list[Callable[[], None]]) -> None:
    for step in steps:
        step()
