"""A local model in a process of its own, so that HTTP, images and JSON take nothing from the thread that runs it.

Python runs one thread at a time, and a decoding step is hundreds of short calls: each would wait for whatever else the
server is doing. The server's process reads and cuts images; crops and questions go to the engine's process over a pipe,
pieces and results come back. The engine ends with the server, and the server knows when it has ended.
"""

from __future__ import annotations

import logging
import multiprocessing
import pickle
import queue
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, Any

import numpy as np

from moondream_cv.engine.preprocessing import PreprocessedImage
from moondream_cv.errors import MoondreamError
from moondream_cv.model.config import VisionConfig
from moondream_cv.requests import ErrorResult, Request, Result, Settings
from moondream_cv.server.runtime.engine_loop import Driver, News, Usage
from moondream_cv.server.runtime.engines import Call, broken, report
from moondream_cv.server.runtime.metrics import Meters

if TYPE_CHECKING:
    from moondream_cv.engine.local import LocalModel

logger = logging.getLogger(__name__)

STOP = None  # what the engine is sent at the end


@dataclass(frozen=True)
class Described:
    """What the server has to know of a model.

    Attributes:
        text: For the log.
        skills: What it can do.
        vision: Sizes of its crops.
    """

    text: str
    skills: frozenset[str]
    vision: VisionConfig


class EngineProcess:
    """A model in a process of its own: what a server takes for its model, and its engine.

    Attributes:
        skills: What the model can do.
        has_scores: True, as of every local model.
    """

    has_scores = True

    def __init__(self, load: Callable[[], LocalModel], set_up: Callable[[], None] | None = None) -> None:
        """Start the process, and wait until it has loaded the model.

        Args:
            load: Loads it; called in that process, so it has to be picklable.
            set_up: Called there first, likewise; for logging.

        Raises:
            Exception: Whatever `load` raises.
            MoondreamError: The process has ended before that.
        """
        context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
        self._connection, other = context.Pipe()
        self._process = context.Process(
            target=_run, args=(other, load, set_up), name="moondream-cv engine", daemon=True
        )
        self._process.start()
        # The process ignores SIGTERM, with which multiprocessing would end it at exit before it waits for it.
        Finalize(self, self._process.kill, exitpriority=10)
        other.close()
        try:
            found = self._connection.recv()
        except EOFError as error:
            self._process.join()
            raise MoondreamError("the engine's process ended while it loaded the model") from error
        if isinstance(found, Exception):
            self._process.join()
            raise found
        self._described: Described = found
        self.skills = found.skills
        self._meters: Meters | None = None
        self._outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._calls: dict[int, Call] = {}
        self._numbers: dict[Call, int] = {}
        self._next = 0
        self._lock = threading.Lock()
        self._ended = False
        self._threads = [
            threading.Thread(target=work, name=f"moondream-cv {name}", daemon=True)
            for name, work in (("asking", self._send), ("hearing", self._hear))
        ]

    def __repr__(self) -> str:
        return f"EngineProcess({self._described.text}, process {self._process.pid})"

    @property
    def alive(self) -> bool:
        return not self._ended and self._process.is_alive()

    def start(self, meters: Meters) -> None:
        """Begin to take calls.

        Args:
            meters: What is counted.
        """
        self._meters = meters
        for thread in self._threads:
            thread.start()

    def preprocess_array(self, rgb: np.ndarray, settings: Settings) -> PreprocessedImage:
        """Cut an [H, W, 3] uint8 RGB array as the model takes it."""
        vision = self._described.vision
        prepared = PreprocessedImage(rgb, vision, settings.max_crops or vision.max_crops)
        prepared.digest  # noqa: B018 - by which the other process knows the image again
        return prepared

    def submit(self, call: Call) -> None:
        with self._lock:
            if not self._ended:
                number, self._next = self._next, self._next + 1
                self._calls[number], self._numbers[call] = call, number
                self._outgoing.put((number, _portable(call.request), call.streamed))
                return
        call.finish(ErrorResult(broken()), Usage())

    def cancel(self, call: Call) -> None:
        with self._lock:
            number = self._numbers.get(call)
        if number is not None:
            self._outgoing.put(number)

    def stop(self) -> None:
        self._outgoing.put(STOP)
        self._process.join()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def close(self) -> None:
        """End the process; what is running there is finished."""
        if self._process.is_alive():
            self.stop()
        self._connection.close()

    def _send(self) -> None:
        """Pass on what is asked: writing to a full pipe would hold up the event loop."""
        while True:
            message = self._outgoing.get()
            try:
                self._connection.send(message)
            except (OSError, ValueError):  # the process has ended, which `_hear` tells everyone
                return
            if message is STOP:
                return

    def _hear(self) -> None:
        """Tell the event loops what comes back, until the process ends."""
        try:
            while True:
                self._tell(self._connection.recv())
        except (EOFError, OSError):
            pass
        with self._lock:
            self._ended = True
            calls, self._calls, self._numbers = list(self._calls.values()), {}, {}
        if calls:
            logger.error("the engine's process has ended with %d requests", len(calls))
        report({}, dict.fromkeys(calls, (ErrorResult(broken()), Usage())))

    def _tell(self, news: News[int]) -> None:
        assert self._meters is not None
        self._meters.count(news)
        with self._lock:
            pieces = {self._calls[number]: new for number, new in news.pieces.items()}
            results = {self._calls.pop(number): ended for number, ended in news.results.items()}
            for call in results:
                del self._numbers[call]
        report(pieces, results)


def _portable(request: Request) -> Request:
    """A request as it travels: the crops of its image alone, unless others are asked for."""
    image = request.image
    if not isinstance(image, PreprocessedImage):
        return request
    return replace(request, image=image.without_pixels(request.settings.max_crops))


def _run(connection: Connection, load: Callable[[], LocalModel], set_up: Callable[[], None] | None) -> None:
    """The engine's process: requests in, pieces and results out, until it is told to stop or the server is gone."""
    for sig in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the server says when to stop
        signal.signal(sig, signal.SIG_IGN)
    if set_up is not None:
        set_up()
    try:
        model = load()
    except Exception as error:
        connection.send(_picklable(error))
        return
    connection.send(Described(repr(model), model.skills, model.config.vision))
    try:
        _serve(model, connection)
    except (EOFError, OSError):
        logger.warning("the server has ended; so does its engine")


def _serve(model: LocalModel, connection: Connection) -> None:
    driver: Driver[int] = Driver(model)
    going_on, stopping = False, False
    while not stopping or going_on:
        while not stopping and (not going_on or connection.poll()):
            message = connection.recv()
            if message is STOP:
                stopping = True
            elif isinstance(message, int):
                driver.cancel(message)
            else:
                driver.submit(*message)
            going_on = True
        going_on, news = driver.step()
        connection.send(replace(news, results={number: _portable_end(*end) for number, end in news.results.items()}))


def _portable_end(result: Result, usage: Usage) -> tuple[Result, Usage]:
    """A result as it travels: an error may hold what does not."""
    return ErrorResult(_picklable(result.error)) if isinstance(result, ErrorResult) else result, usage


def _picklable(error: Exception) -> Exception:
    """An error that arrives as it was, or as one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return MoondreamError(f"{type(error).__name__}: {error}")
    return error
