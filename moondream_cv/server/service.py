"""`Service`: the engine of a server, its queue slots and its lifecycle."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import Request as HttpRequest

from moondream_cv.requests import ErrorResult, Request
from moondream_cv.server.errors import ServerError
from moondream_cv.server.fetching import Fetcher
from moondream_cv.server.images import ImageLoader
from moondream_cv.server.runtime.engines import Call, Engine, create_engine
from moondream_cv.server.runtime.metrics import Metrics
from moondream_cv.server.settings import ServerSettings

if TYPE_CHECKING:
    from moondream_cv.vision_model import VisionModel

    ModelSource = VisionModel | Engine | Callable[[], VisionModel | Engine]

logger = logging.getLogger(__name__)


class Service:
    """One engine and the queue slots in front of it.

    Attributes:
        settings: Settings of the server.
        metrics: Metrics of the server.
        images: Loads the images of requests.
        engine: Engine of the model; None until the model is loaded.
        name: Model name that clients use.
        draining: Whether the server is shutting down.
        failure: Error that made the model or the engine unusable.
        on_engine_start: Called with the engine before the service accepts requests; None: no function.
    """

    def __init__(self, source: ModelSource, name: str, settings: ServerSettings) -> None:
        """Create a service; `start` loads the model.

        Args:
            source: A model or an engine, which the service does not close; or a function that loads one, which the
                service closes when it stops.
            name: Model name that clients use.
            settings: Settings of the server.
        """
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
        self._idle = asyncio.Event()
        self._idle.set()
        self._tasks: set[asyncio.Task[Any]] = set()

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
        """Start the engine. A model that has to be loaded is loaded in the background; until then, requests get 503."""
        if callable(self._source):
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

    async def _load(self, load: Callable[[], VisionModel | Engine]) -> None:
        try:
            engine = await asyncio.to_thread(lambda: create_engine(load()))
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

    @property
    def in_flight(self) -> int:
        """Number of requests that hold a queue slot."""
        return self._in_flight

    def acquire_slot(self) -> None:
        """Acquire a queue slot. Each acquired slot needs one call of `release_slot`.

        Raises:
            ServerError: 503 if the service is not ready, 429 if the queue is full.
        """
        if not self.ready:
            raise ServerError(503, self._why_not_ready(), retry_after=5)
        if self._in_flight >= self.settings.queue:
            self.metrics.rejected.inc()
            raise ServerError(
                429, f"the queue is full: {self.settings.queue} requests are in flight; try again", retry_after=1
            )
        self._in_flight += 1
        self._idle.clear()
        self.metrics.in_flight.set(self._in_flight)

    def try_acquire_slot(self) -> bool:
        """Acquire an additional slot for a request that holds one. Return False if half of the slots are in use."""
        if not self.ready or self._in_flight * 2 >= self.settings.queue:
            return False
        self.acquire_slot()
        return True

    def release_slot(self) -> None:
        """Release a queue slot."""
        self._in_flight -= 1
        if not self._in_flight:
            self._idle.set()
        self.metrics.in_flight.set(self._in_flight)

    def _why_not_ready(self) -> str:
        if self.draining:
            return "the server is shutting down; try again"
        if self.engine is None:
            return "the server is still loading its model; try again"
        return "the engine has failed; restart the server"

    # Calls

    def submit(self, request: Request, streamed: bool = False) -> Call:
        """Submit a request to the engine. Each call needs one call of `release_call`.

        Args:
            request: The request.
            streamed: Whether the call gets the pieces of the reply as they are generated.
        """
        assert self.engine is not None
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


def get_service(http: HttpRequest) -> Service:
    """Return the service of the application that received a request."""
    service: Service = http.app.state.service
    return service
