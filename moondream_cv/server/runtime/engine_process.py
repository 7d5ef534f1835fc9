"""An engine that runs a local model in a separate process.

Python runs one thread at a time, and a decoding step makes hundreds of short calls. In a shared process, each of them
would wait for HTTP, image and JSON work. The server process decodes images and cuts crops, sends crops and prompts over
a pipe, and receives pieces and results. The engine process ends with the server, and the server detects when the engine
process has ended.
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
from moondream_cv.requests import Chat, ErrorResult, Request, Result
from moondream_cv.server.runtime.engine_loop import EngineLoop, StepOutput, Usage
from moondream_cv.server.runtime.engines import Call, Engine, engine_failure, report
from moondream_cv.server.runtime.metrics import Metrics
from moondream_cv.server.runtime.operations import Operation, OperationResult

if TYPE_CHECKING:
    from moondream_cv.engine.local_model import LocalModel

logger = logging.getLogger(__name__)

STOP = None  # message that stops the engine process


@dataclass(frozen=True)
class ModelInfo:
    """Description of a loaded model, sent to the server process.

    Attributes:
        text: `repr` of the model, for the log.
        skills: Skills of the model.
        vision: Sizes of the crops.
    """

    text: str
    skills: frozenset[str]
    vision: VisionConfig


class ProcessEngine(Engine):
    """Runs a local model in a separate process."""

    def __init__(self, load: Callable[[], LocalModel], set_up: Callable[[], None] | None = None) -> None:
        """Start the process and wait until it has loaded the model.

        Args:
            load: Loads the model. It is called in the engine process, so it must be picklable.
            set_up: Called first in the engine process, for example to set up logging. It must be picklable.

        Raises:
            MoondreamError: The process ended before the model was loaded.
            Exception: Any error that `load` raises.
        """
        # Start the process
        context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
        self._connection, child_connection = context.Pipe()
        self._process = context.Process(
            target=_run, args=(child_connection, load, set_up), name="moondream-cv engine", daemon=True
        )
        self._process.start()
        # multiprocessing sends SIGTERM at exit and waits, but the process ignores SIGTERM.
        Finalize(self, self._process.kill, exitpriority=10)
        child_connection.close()

        # Wait for the model
        try:
            reply = self._connection.recv()
        except EOFError as error:
            self._process.join()
            raise MoondreamError("the engine process ended while it loaded the model") from error
        if isinstance(reply, Exception):
            self._process.join()
            raise reply

        # Prepare the threads that use the pipe
        self._info: ModelInfo = reply
        self._metrics: Metrics | None = None
        self._outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._calls: dict[int, Call] = {}
        self._ids: dict[Call, int] = {}
        self._next_id = 0
        self._lock = threading.Lock()
        self._ended = False
        self._threads = [
            threading.Thread(target=work, name=f"moondream-cv engine {name}", daemon=True)
            for name, work in (("sender", self._send_messages), ("receiver", self._receive_outputs))
        ]

    def __repr__(self) -> str:
        return f"ProcessEngine({self._info.text}, process {self._process.pid})"

    @property
    def skills(self) -> frozenset[str]:
        return self._info.skills

    @property
    def has_scores(self) -> bool:
        return True

    @property
    def alive(self) -> bool:
        return not self._ended and self._process.is_alive()

    def start(self, metrics: Metrics) -> None:
        self._metrics = metrics
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._outgoing.put(STOP)
        self._process.join()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def close(self) -> None:
        """End the process, after it has finished the running calls."""
        if self._process.is_alive():
            self.stop()
        self._connection.close()

    def preprocess(self, rgb: np.ndarray) -> PreprocessedImage:
        vision = self._info.vision
        image = PreprocessedImage(rgb, vision, vision.max_crops)
        image.digest  # noqa: B018 - computed here, because it is the cache key in the engine process
        return image

    def submit(self, call: Call) -> None:
        with self._lock:
            if not self._ended:
                request_id, self._next_id = self._next_id, self._next_id + 1
                self._calls[request_id], self._ids[call] = call, request_id
                self._outgoing.put((request_id, _without_pixels(call.request), call.streamed))
                return
        call.finish(ErrorResult(engine_failure()), Usage())

    def cancel(self, call: Call) -> None:
        with self._lock:
            request_id = self._ids.get(call)
        if request_id is not None:
            self._outgoing.put(request_id)

    def _send_messages(self) -> None:
        """Write messages to the pipe. This has a thread because writing to a full pipe would block the event loop."""
        while True:
            message = self._outgoing.get()
            try:
                self._connection.send(message)
            except (OSError, ValueError):  # the process has ended; `_receive_outputs` reports that
                return
            if message is STOP:
                return

    def _receive_outputs(self) -> None:
        """Report step outputs until the process ends. Calls that are left then fail."""
        try:
            while True:
                self._report_output(self._connection.recv())
        except (EOFError, OSError):
            pass
        with self._lock:
            self._ended = True
            calls, self._calls, self._ids = list(self._calls.values()), {}, {}
        if calls:
            logger.error("the engine process has ended with %d unfinished requests", len(calls))
        report({}, dict.fromkeys(calls, (ErrorResult(engine_failure()), Usage())))

    def _report_output(self, output: StepOutput[int]) -> None:
        assert self._metrics is not None
        self._metrics.record_step(output)
        with self._lock:
            pieces = {self._calls[request_id]: new for request_id, new in output.pieces.items()}
            results = {self._calls.pop(request_id): result for request_id, result in output.results.items()}
            for call in results:
                del self._ids[call]
        report(pieces, results)


def _without_pixels(request: Request | Operation) -> Request | Operation:
    """Return a request whose images have only the crops, unless the request needs other crops."""
    if isinstance(request, Operation):
        return request
    max_crops = request.settings.max_crops
    if isinstance(request, Chat):
        # One object per image, so that pickle writes the crops of an image in several turns once
        by_id = {id(image): _crops_of(image, max_crops) for image in request.images}
        return request.with_images([by_id[id(image)] for image in request.images])
    return replace(request, image=_crops_of(request.image, max_crops))


def _crops_of(image: Any, max_crops: int | None) -> Any:
    return image.without_pixels(max_crops) if isinstance(image, PreprocessedImage) else image


def _run(connection: Connection, load: Callable[[], LocalModel], set_up: Callable[[], None] | None) -> None:
    """Run the engine process until it receives STOP or the server ends."""
    for sig in (signal.SIGINT, signal.SIGTERM):  # sent to the whole process group; the server sends STOP instead
        signal.signal(sig, signal.SIG_IGN)
    if set_up is not None:
        set_up()
    try:
        model = load()
    except Exception as error:
        connection.send(_picklable(error))
        return
    connection.send(ModelInfo(repr(model), model.skills, model.config.vision))
    try:
        _process_messages(model, connection)
    except (EOFError, OSError):
        logger.warning("the server has ended; the engine process ends as well")


def _process_messages(model: LocalModel, connection: Connection) -> None:
    """Run requests from the pipe and send the output of each step."""
    loop: EngineLoop[int] = EngineLoop(model)
    try:
        _run_steps(loop, connection)
    finally:
        loop.close()


def _run_steps(loop: EngineLoop[int], connection: Connection) -> None:
    has_work, stopping = False, False
    while not stopping or has_work:
        # Receive all messages that have arrived; wait if there is no work
        while not stopping and (not has_work or connection.poll()):
            message = connection.recv()
            if message is STOP:
                stopping = True
            elif isinstance(message, int):
                loop.cancel(message)
            else:
                loop.submit(*message)
            has_work = True

        # Run one step
        has_work, output = loop.step()
        results = {
            request_id: (_picklable_result(result), usage) for request_id, (result, usage) in output.results.items()
        }
        connection.send(replace(output, results=results))


def _picklable_result(result: Result | OperationResult) -> Result | OperationResult:
    return ErrorResult(_picklable(result.error)) if isinstance(result, ErrorResult) else result


def _picklable(error: Exception) -> Exception:
    """Return the error itself if it survives pickling, otherwise a `MoondreamError` with its type and message."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return MoondreamError(f"{type(error).__name__}: {error}")
    return error
