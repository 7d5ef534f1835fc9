"""Engines run requests on a model. They are independent of HTTP and report results to the event loop.

`create_engine` selects the engine for a model: `ThreadEngine` for a local model, `RemoteEngine` for a remote one.
`ProcessEngine`, in `engine_process.py`, runs a local model in a separate process.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np
from PIL import Image

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
    Settings,
    pieces_of,
)
from moondream_cv.server.runtime.engine_loop import EngineLoop, Usage
from moondream_cv.server.runtime.metrics import Metrics
from moondream_cv.server.runtime.operations import Operation, OperationResult

if TYPE_CHECKING:
    from moondream_cv.engine.local_model import LocalModel
    from moondream_cv.vision_model import VisionModel

logger = logging.getLogger(__name__)

REMOTE_THREADS = 32


class Call:
    """A request or an operation in an engine, as seen from the event loop that submitted it.

    Attributes:
        request: The request or the operation.
        streamed: Whether the engine reports the pieces of the reply as they are generated.
        done: Future of the result.
        pieces: Queue of the pieces of a streamed reply: objects, points and text; None marks the end.
        usage: Token counts; complete when `done` is.
    """

    def __init__(self, request: Request | Operation, streamed: bool = False) -> None:
        self.request, self.streamed = request, streamed
        self.loop = asyncio.get_running_loop()
        self.done: asyncio.Future[Result | OperationResult] = self.loop.create_future()
        self.pieces: asyncio.Queue[Any] = asyncio.Queue()
        self.usage = Usage()

    def add(self, pieces: list[Any]) -> None:
        """Add pieces of the reply. Call this in the event loop."""
        for piece in pieces:
            self.pieces.put_nowait(piece)

    def finish(self, result: Result | OperationResult, usage: Usage) -> None:
        """Set the result. Call this in the event loop; later calls are ignored."""
        if not self.done.done():
            self.usage = usage
            self.done.set_result(result)
            self.pieces.put_nowait(None)


class Engine(ABC):
    """Runs the calls of a server."""

    @property
    @abstractmethod
    def skills(self) -> frozenset[str]:
        """Skills of the model. May block: a remote model can ask its server."""

    @property
    @abstractmethod
    def has_scores(self) -> bool:
        """Whether confidences are real; otherwise they are 1.0. May block: a remote model can ask its server."""

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether the engine can answer calls."""

    @property
    def runs_operations(self) -> bool:
        """Whether the engine has a local model, so that calls can be operations."""
        return True

    @abstractmethod
    def start(self, metrics: Metrics) -> None:
        """Start to process calls.

        Args:
            metrics: Receives the counts of each step.
        """

    @abstractmethod
    def stop(self) -> None:
        """Finish the running calls and stop. Blocks."""

    @abstractmethod
    def close(self) -> None:
        """Free the model. Call `stop` first."""

    @abstractmethod
    def preprocess(self, rgb: np.ndarray) -> Any:
        """Return an image in the form that requests of this engine use. Thread-safe.

        Args:
            rgb: Image, [H, W, 3] uint8 RGB.

        Returns:
            An image with `size`, (width, height) in pixels.
        """

    @abstractmethod
    def submit(self, call: Call) -> None:
        """Run a call and report its pieces and its result. Operations need `runs_operations`."""

    @abstractmethod
    def cancel(self, call: Call) -> None:
        """Cancel a call; does nothing if it has finished."""


@runtime_checkable
class HasScheduler(Protocol):
    """A local model: it runs many requests together on a scheduler."""

    def scheduler(self) -> Any:
        """Return a new scheduler of the model."""


@runtime_checkable
class HasStream(Protocol):
    """A model that can stream replies."""

    def stream(self, request: Request) -> Iterator[Any]:
        """Yield the pieces of a reply."""


def create_engine(model: VisionModel | Engine) -> Engine:
    """Return the engine for a model; an engine is returned as it is.

    Args:
        model: Local or remote model, or an engine such as `ProcessEngine`.
    """
    if isinstance(model, Engine):
        return model
    if isinstance(model, HasScheduler):
        return ThreadEngine(cast("LocalModel", model))
    return RemoteEngine(model)


class ThreadEngine(Engine):
    """Runs the scheduler of a local model in a thread, so that concurrent calls decode in one batch."""

    def __init__(self, model: LocalModel) -> None:
        self._model = model
        self._loop: EngineLoop[Call] = EngineLoop(model)
        self._metrics: Metrics | None = None
        self._lock = threading.Lock()
        self._work = threading.Event()
        self._stopping = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="moondream-cv engine", daemon=True)

    def __repr__(self) -> str:
        return f"ThreadEngine({self._model!r})"

    @property
    def skills(self) -> frozenset[str]:
        return self._model.skills

    @property
    def has_scores(self) -> bool:
        return True

    @property
    def alive(self) -> bool:
        return self._failure is None and self._thread.is_alive()

    def start(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._thread.start()

    def stop(self) -> None:
        with self._lock:
            self._stopping = True
        self._work.set()
        self._thread.join()

    def close(self) -> None:
        self._model.close()

    def preprocess(self, rgb: np.ndarray) -> Any:
        return self._model.preprocess_array(rgb, Settings())

    def submit(self, call: Call) -> None:
        with self._lock:
            if self._failure is not None or self._stopping:
                call.finish(ErrorResult(self._failure or RequestCancelled("the engine is stopping")), Usage())
                return
            self._loop.submit(call, call.request, call.streamed)
        self._work.set()

    def cancel(self, call: Call) -> None:
        self._loop.cancel(call)
        self._work.set()

    def _run(self) -> None:
        try:
            self._run_steps()
        finally:
            self._loop.close()

    def _run_steps(self) -> None:
        assert self._metrics is not None
        is_last = False
        while not is_last:
            self._work.wait()
            self._work.clear()
            is_last = self._stopping  # read before the steps, because no call is submitted once it is set
            has_work = True
            while has_work:
                try:
                    has_work, output = self._loop.step()
                except Exception as error:
                    logger.exception("the engine has failed and no longer answers requests")
                    self._fail(error)
                    return
                self._metrics.record_step(output)
                report(output.pieces, output.results)

    def _fail(self, error: Exception) -> None:
        failure = engine_failure()
        failure.__cause__ = error
        with self._lock:
            self._failure = failure
        report({}, dict.fromkeys(self._loop.request_ids, (ErrorResult(failure), Usage())))


class RemoteEngine(Engine):
    """Forwards each call to a remote model in a thread."""

    def __init__(self, model: VisionModel) -> None:
        self._model = model
        self._pool = ThreadPoolExecutor(REMOTE_THREADS, thread_name_prefix="moondream-cv remote")
        self._cancelled: set[Call] = set()

    def __repr__(self) -> str:
        return f"RemoteEngine({self._model!r})"

    @property
    def skills(self) -> frozenset[str]:
        return self._model.skills

    @property
    def has_scores(self) -> bool:
        return self._model.has_scores

    @property
    def alive(self) -> bool:
        return True

    @property
    def runs_operations(self) -> bool:
        return False

    def start(self, metrics: Metrics) -> None:
        """Do nothing: a remote model has no steps to count, and the pool starts its threads on demand."""

    def stop(self) -> None:
        self._pool.shutdown()

    def close(self) -> None:
        self._model.close()

    def preprocess(self, rgb: np.ndarray) -> Image.Image:
        return Image.fromarray(rgb)

    def submit(self, call: Call) -> None:
        self._pool.submit(self._run, call)

    def cancel(self, call: Call) -> None:
        if not call.done.done():
            self._cancelled.add(call)

    def _run(self, call: Call) -> None:
        try:
            if isinstance(call.request, Operation):
                raise UnsupportedSkill(f"{call.request.method} needs a local model")
            if call in self._cancelled:
                result: Result = ErrorResult(RequestCancelled("the request was cancelled"))
            else:
                result = self._stream(call, call.request) if call.streamed else self._model.run([call.request])[0]
        except Exception as error:
            result = ErrorResult(error)
        self._cancelled.discard(call)
        report({}, {call: (result, Usage())})

    def _stream(self, call: Call, request: Request) -> Result:
        """Report the pieces of a reply. A model that cannot stream reports all of them at the end."""
        try:
            if not isinstance(self._model, HasStream):
                raise UnsupportedSkill("the model cannot stream")
            stream = self._model.stream(request)
        except UnsupportedSkill:
            result = self._model.run([request])[0]
            report({call: pieces_of(result)}, {})
            return result
        pieces = []
        for piece in stream:
            if call in self._cancelled:
                return ErrorResult(RequestCancelled("the request was cancelled"))
            pieces.append(piece)
            report({call: [piece]}, {})
        return _assemble(request, pieces)


def _assemble(request: Request, pieces: list[Any]) -> Result:
    """Return the result that the pieces of a stream add up to."""
    if request.skill == "detect":
        return DetectResult(tuple(pieces))
    if request.skill == "point":
        return PointResult(tuple(pieces))
    reasoning = next((piece for piece in pieces if isinstance(piece, Reasoning)), None)
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    return CaptionResult(text) if request.skill == "caption" else QueryResult(text, reasoning)


def engine_failure() -> MoondreamError:
    """Return the error of all calls after the engine has failed."""
    return MoondreamError("the engine has failed; restart the server")


def report(pieces: Mapping[Call, list[Any]], results: Mapping[Call, tuple[Result | OperationResult, Usage]]) -> None:
    """Deliver pieces and results of calls to their event loops. Thread-safe; closed event loops are skipped."""
    updates: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}
    for call, new in pieces.items():
        updates.setdefault(call.loop, []).append(partial(call.add, new))
    for call, (result, usage) in results.items():
        updates.setdefault(call.loop, []).append(partial(call.finish, result, usage))
    for loop, steps in updates.items():
        try:
            loop.call_soon_threadsafe(_run_all, steps)
        except RuntimeError:
            logger.debug("a result arrived after its event loop was closed")


def _run_all(steps: list[Callable[[], None]]) -> None:
    for step in steps:
        step()
