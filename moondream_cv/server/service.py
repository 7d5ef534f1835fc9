"""`Service`: the engine of a server, its queue slots and its lifecycle."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import Request as HttpRequest

from moondream_cv.requests import ErrorResult, Request
from moondream_cv.server.checkpoints import Checkpoint, parse_checkpoint
from moondream_cv.server.errors import ServerError
from moondream_cv.server.fetching import Fetcher
from moondream_cv.server.images import ImageLoader
from moondream_cv.server.runtime.engines import Call, Engine, create_engine
from moondream_cv.server.runtime.metrics import Metrics
from moondream_cv.server.runtime.operations import Operation
from moondream_cv.server.segmentation import Segmenter
from moondream_cv.server.settings import ServerSettings

if TYPE_CHECKING:
    from moondream_cv.masks import MaskFunction
    from moondream_cv.vision_model import VisionModel

    ModelSource = VisionModel | Engine | Callable[[], VisionModel | Engine]

logger = logging.getLogger(__name__)

PAUSED_POLL_SECONDS = 0.05  # between two checks of a time limit that is paused


class Service:
    """One engine and the queue slots in front of it.

    Attributes:
        settings: Settings of the server.
        metrics: Metrics of the server.
        images: Loads the images of requests.
        engine: Engine of the model; None until the model is loaded.
        segmenter: Segmentation of objects; None without a mask function, and until it is loaded.
        name: Model name that clients use.
        draining: Whether the server is shutting down.
        failure: Error that made the model or the engine unusable.
        on_engine_start: Called with the engine before the service accepts requests; None: no function.
    """

    def __init__(
        self,
        source: ModelSource,
        name: str,
        settings: ServerSettings,
        load_masks: Callable[[], MaskFunction] | None = None,
    ) -> None:
        """Create a service; `start` loads the model.

        Args:
            source: A model or an engine, which the service does not close; or a function that loads one, which the
                service closes when it stops.
            name: Model name that clients use.
            settings: Settings of the server.
            load_masks: Function that loads the mask function for segmentation; None: no segmentation.
        """
        self._load_masks = load_masks
        self.segmenter: Segmenter | None = None
        self._source, self.name, self.settings = source, name, settings
        self.metrics = Metrics()
        self.engine: Engine | None = None
        self.failure: Exception | None = None
        self.draining = False
        self.on_engine_start: Callable[[Engine], None] | None = None
        fetcher = Fetcher(max_bytes=settings.max_download, allow_private=settings.private_urls)
        self.images = ImageLoader(
            fetcher, settings.max_pixels, self._preprocess, settings.keep, settings.decode_timeout
        )
        self._in_flight = 0
        self._idle, self._slot_released = asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._num_pauses = 0
        self._pause_started, self._paused = 0.0, 0.0

    # Lifecycle

    @property
    def ready(self) -> bool:
        """Whether the service accepts requests."""
        return self.engine is not None and self.engine.alive and not self.draining

    @property
    def engine_failed(self) -> bool:
        """Whether the engine has failed. It does not recover."""
        return self.engine is not None and not self.engine.alive and not self.draining

    async def start(self) -> None:
        """Start the engine.

        Models that have to be loaded are loaded in the background; until then, requests get 503.
        """
        if callable(self._source) or self._load_masks is not None:
            self.spawn(self._load(self._source))
        else:
            self._start_engine(create_engine(self._source))

    async def stop(self) -> None:
        """Wait for running requests, for at most `drain` seconds, then stop the engine."""
        # Wait for running requests
        self.draining = True
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), self.settings.drain)

        # Cancel everything that is left
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.images.close()
        if self.segmenter is not None:
            self.segmenter.close()

        # Stop the engine
        if self.engine is not None:
            await asyncio.to_thread(self.engine.stop)
            if callable(self._source):
                self.engine.close()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a coroutine in a task that is cancelled when the service stops."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _load(self, source: ModelSource) -> None:
        try:
            if self._load_masks is not None:
                self.segmenter = await Segmenter.load(self._load_masks)
            engine = await asyncio.to_thread(lambda: create_engine(source() if callable(source) else source))
        except Exception as error:  # loading can raise any error of a checkpoint, a device or a network
            self.failure = error
            logger.error("cannot load the model: %s", error)
            return
        self._start_engine(engine)

    def _start_engine(self, engine: Engine) -> None:
        engine.start(self.metrics)
        if self.on_engine_start is not None:
            self.on_engine_start(engine)
        self.engine = engine
        logger.info("ready: %r", engine)

    # Queue slots

    def check_ready(self) -> None:
        """Check that the service accepts requests.

        Raises:
            ServerError: 503; the service is not ready.
        """
        if not self.ready:
            raise ServerError(503, self._why_not_ready(), retry_after=5)

    @property
    def in_flight(self) -> int:
        """Number of requests that hold a queue slot."""
        return self._in_flight

    def acquire_slot(self) -> None:
        """Acquire a queue slot. Each acquired slot needs one call of `release_slot`.

        Raises:
            ServerError: 503 if the service is not ready, 429 if the queue is full.
        """
        self.check_ready()
        if self._in_flight >= self.settings.queue:
            self.metrics.rejected.inc()
            raise ServerError(
                429, f"the queue is full: {self.settings.queue} requests are in flight; try again", retry_after=1
            )
        self._in_flight += 1
        self._idle.clear()
        self.metrics.in_flight.set(self._in_flight)

    def try_acquire_slot(self) -> bool:
        """Acquire a slot for a line of a batch. Return False if half of the slots are in use."""
        if not self.ready or self._in_flight * 2 >= self.settings.queue:
            return False
        self.acquire_slot()
        return True

    async def wait_for_slot(self) -> None:
        """Acquire a slot like `try_acquire_slot`, and wait while half of the slots are in use."""
        while not self.try_acquire_slot():
            self._slot_released.clear()
            await self._slot_released.wait()

    def release_slot(self) -> None:
        """Release a queue slot."""
        self._in_flight -= 1
        self._slot_released.set()
        if not self._in_flight:
            self._idle.set()
        self.metrics.in_flight.set(self._in_flight)

    def _why_not_ready(self) -> str:
        if self.draining:
            return "the server is shutting down; try again"
        if self.engine is None:
            return "the server is still loading its model; try again"
        return "the engine has failed; restart the server"

    # Time limits

    def now(self) -> float:
        """Return a time in seconds for time limits. It does not advance while time limits are paused."""
        return (self._pause_started if self._num_pauses else time.monotonic()) - self._paused

    @contextlib.contextmanager
    def pause_time_limits(self) -> Iterator[None]:
        """Pause the time limits of all requests, because the engine does not decode."""
        if not self._num_pauses:
            self._pause_started = time.monotonic()
        self._num_pauses += 1
        try:
            yield
        finally:
            self._num_pauses -= 1
            if not self._num_pauses:
                self._paused += time.monotonic() - self._pause_started

    async def wait(self, events: Collection[asyncio.Future[Any]], deadline: float) -> None:
        """Wait for the first of several events, or until a time limit.

        Args:
            events: Futures; they are not cancelled.
            deadline: Time limit, as `now` returns it.
        """
        while not any(event.done() for event in events) and (remaining := deadline - self.now()) > 0:
            seconds = max(remaining, PAUSED_POLL_SECONDS) if self._num_pauses else remaining
            await asyncio.wait(events, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)

    # Checkpoints

    @cached_property
    def finetunes(self) -> Path:
        """Absolute path of the folder of the finetunes."""
        from moondream_cv.model.variants import finetunes_root

        return Path(self.settings.finetunes or finetunes_root()).expanduser().absolute()

    @property
    def has_checkpoints(self) -> bool:
        """Whether requests can select checkpoints: a remote model has none."""
        return self.engine is None or self.engine.runs_operations

    def find_checkpoint(self, name: str) -> Checkpoint | None:
        """Return the saved checkpoint that a model name selects, None if there is none.

        Args:
            name: Model name as in `parse_checkpoint`.
        """
        checkpoint = parse_checkpoint(name, self.name) if self.has_checkpoints else None
        return checkpoint if checkpoint is not None and checkpoint.file(self.finetunes).is_file() else None

    # Calls

    def submit(self, request: Request | Operation, streamed: bool = False) -> Call:
        """Submit a request or an operation to the engine. Each call needs one call of `release_call`.

        Args:
            request: The request or the operation. `Settings.variant` of a request is "ID@STEP" of a checkpoint.
            streamed: Whether the call gets the pieces of the reply as they are generated.

        Raises:
            ServerError: 404; the checkpoint is not saved.
        """
        assert self.engine is not None
        if not isinstance(request, Operation) and request.settings.variant is not None:
            checkpoint = self.find_checkpoint(request.settings.variant)
            if checkpoint is None:
                raise missing_checkpoint(request.settings.variant)
            variant = str(checkpoint.file(self.finetunes))
            request = replace(request, settings=replace(request.settings, variant=variant))
        call = Call(request, streamed)
        self.engine.submit(call)
        return call

    def release_call(self, call: Call) -> None:
        """Cancel a call if it has not finished, and record its outcome."""
        outcome = "cancelled"
        if call.done.done():
            outcome = "error" if isinstance(call.done.result(), ErrorResult) else "ok"
        elif self.engine is not None:
            self.engine.cancel(call)
        self.metrics.skills.labels(call.request.skill, outcome).inc()

    def is_valid_key(self, candidates: Sequence[str]) -> bool:
        """Return whether one of the keys of a request is valid, or no key is required. Takes constant time."""
        keys = [key.encode() for key in self.settings.api_keys]
        found = not keys
        for candidate in candidates:
            for key in keys:
                found |= secrets.compare_digest(candidate.encode("utf-8", "replace"), key)
        return found

    def _preprocess(self, rgb: np.ndarray) -> Any:
        """Return an image in the form that the engine uses; called in a thread."""
        assert self.engine is not None
        return self.engine.preprocess(rgb)


def missing_checkpoint(name: str, param: str | None = None) -> ServerError:
    """Return the error response for a checkpoint that is not saved.

    Args:
        name: Model name of the client.
        param: Field of the request.
    """
    return ServerError(
        404,
        f"the checkpoint {name!r:.200} does not exist; list the checkpoints of the finetune for the saved steps",
        param=param,
    )


def get_service(http: HttpRequest) -> Service:
    """Return the service of the application that received a request."""
    service: Service = http.app.state.service
    return service


def check_single_process(http: HttpRequest) -> None:
    """Check that one process answers all requests; a dependency of routes that keep state between requests.

    Raises:
        ServerError: 501, several replicas share the requests.
    """
    replicas = get_service(http).settings.replicas
    if replicas > 1:
        raise ServerError(
            501, f"{http.url.path[:200]} needs a server with one replica, and this one has {replicas}; use --replicas 1"
        )
