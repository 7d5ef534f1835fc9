"""What every dialect's routes stand on: a place in the queue, images, results, and an end to waiting.

A route opens an `Exchange`, which FastAPI hands to it, and asks that for everything:

    async def caption(body: Body, exchange: Exchange = Depends(open_exchange)):
        image = await exchange.picture(body.image_url)
        result = await exchange.result(Caption(image, body.length))
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from fastapi import Request as HttpRequest
from PIL import Image

from moondream_cv.requests import ErrorResult, Request, Result, Settings
from moondream_cv.server.errors import ClientLeft, ServerError, explain
from moondream_cv.server.fetching import Fetcher
from moondream_cv.server.images import Pictures
from moondream_cv.server.options import ServerOptions
from moondream_cv.server.runtime.engine_loop import Usage
from moondream_cv.server.runtime.engine_process import EngineProcess
from moondream_cv.server.runtime.engines import Call, Engine, LocalEngine, RemoteEngine
from moondream_cv.server.runtime.metrics import Meters

if TYPE_CHECKING:
    from moondream_cv.vision_model import VisionModel

    Source = VisionModel | EngineProcess | Callable[[], VisionModel | EngineProcess]

logger = logging.getLogger(__name__)

MAX_CROPS = 12  # what the model was trained with: more are slower, and take memory that others need
T = TypeVar("T")


class Service:
    """One model, one engine, and the places that requests take in front of it.

    Attributes:
        options: How it behaves.
        meters: What it counts.
        model: None until it is loaded.
        name: What clients know the model as.
        draining: Whether it is shutting down.
        failure: Why the model could not be loaded.
    """

    def __init__(self, source: Source, name: str, options: ServerOptions) -> None:
        """Prepare a service; `start` loads the model.

        Args:
            source: A model, which stays open, or what loads or starts one, which is closed at the end.
            name: What clients know it as.
            options: How the service behaves.
        """
        self._source, self.name, self.options = source, name, options
        self.meters = Meters()
        self.model: VisionModel | EngineProcess | None = None
        self.failure: Exception | None = None
        self.draining = False
        fetcher = Fetcher(max_bytes=options.max_download, allow_private=options.private_urls)
        self.pictures = Pictures(fetcher, options.max_pixels, self._prepare, options.keep, options.decode_timeout)
        self._engine: Engine | None = None
        self._taken = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._background: set[asyncio.Task[Any]] = set()

    @property
    def ready(self) -> bool:
        return self._engine is not None and self._engine.alive and not self.draining

    @property
    def broken(self) -> bool:
        """Whether the engine has failed: it does not come back."""
        return self._engine is not None and not self._engine.alive and not self.draining

    @property
    def taken(self) -> int:
        """Places that are taken."""
        return self._taken

    async def start(self) -> None:
        """Load the model in the background; until it is there, requests are answered with 503."""
        if callable(self._source):
            self._spawn(self._load(self._source))
        else:
            self._use(self._source)

    async def stop(self) -> None:
        """Let what is running finish, for as long as the options say, and close the engine."""
        self.draining = True
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), self.options.drain)
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self.pictures.close()
        if self._engine is not None:
            await asyncio.to_thread(self._engine.stop)
        if self.model is not None and callable(self._source):
            self.model.close()

    async def _load(self, source: Callable[[], VisionModel | EngineProcess]) -> None:
        try:
            model = await asyncio.to_thread(source)
        except Exception as error:  # whatever a checkpoint or a network can raise: the operator is told
            self.failure = error
            logger.error("the model cannot be loaded: %s", error)
            return
        self._use(model)

    def _use(self, model: VisionModel | EngineProcess) -> None:
        self.model = model
        if isinstance(model, EngineProcess):
            model.start(self.meters)
            self._engine = model
        else:
            local = hasattr(model, "scheduler")
            self._engine = LocalEngine(model, self.meters) if local else RemoteEngine(model, self.meters)  # type: ignore[arg-type]
        logger.info("ready: %r", model)

    def _prepare(self, rgb: np.ndarray) -> Any:
        """What the model takes of an image, with as much done already as can be; called in a thread."""
        prepare = getattr(self.model, "preprocess_array", None)
        return Image.fromarray(rgb) if prepare is None else prepare(rgb, Settings())

    def check_key(self, candidates: Sequence[str]) -> bool:
        """Whether one of the keys that a client sent opens the server, in constant time."""
        keys = [key.encode() for key in self.options.api_keys]
        found = not keys
        for candidate in candidates:
            for key in keys:
                found |= secrets.compare_digest(candidate.encode("utf-8", "replace"), key)
        return found

    def take_place(self) -> None:
        """Take a place in the queue.

        Raises:
            ServerError: There is none left, or there is no model yet.
        """
        if not self.ready:
            said = "is shutting down" if self.draining else "is still loading its model"
            if self._engine is not None and not self.draining:
                said = "has failed and must be started again"
            raise ServerError(503, f"the server {said}; try again", retry_after=5)
        if self._taken >= self.options.queue:
            self.meters.refused.inc()
            raise ServerError(
                429, f"the queue is full: {self.options.queue} requests are being answered; try again", retry_after=1
            )
        self._taken += 1
        self._idle.clear()
        self.meters.taken.set(self._taken)

    def try_place(self) -> bool:
        """Take a second place for a request that has one, as long as half of them are free."""
        if not self.ready or self._taken * 2 >= self.options.queue:
            return False
        self.take_place()
        return True

    def give_place_back(self) -> None:
        self._taken -= 1
        if not self._taken:
            self._idle.set()
        self.meters.taken.set(self._taken)

    def submit(self, request: Request, streamed: bool = False) -> Call:
        assert self._engine is not None
        call = Call(request, streamed)
        self._engine.submit(call)
        return call

    def let_go(self, call: Call) -> None:
        """Count a call that nobody waits for any more, and cancel it if it has not come to an end."""
        outcome = "cancelled"
        if call.done.done():
            outcome = "error" if isinstance(call.done.result(), ErrorResult) else "ok"
        elif self._engine is not None:
            self._engine.cancel(call)
        self.meters.skills.labels(call.request.skill, outcome).inc()

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    def background(self, work: Callable[[Exchange], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
        """Do something that goes on after its HTTP request has been answered. It takes a place at once.

        Raises:
            ServerError: There is none left.
        """
        exchange = Exchange(self, None)  # takes its place here, so that the client hears of a full queue
        task = self._spawn(work(exchange))
        task.add_done_callback(lambda _: exchange.close())  # also of one that is cancelled before it begins
        return task


class Exchange:
    """One HTTP request's dealings with the service.

    Whatever it waits for ends early when the client leaves (`ClientLeft`) and when its time is up (504).
    """

    def __init__(self, service: Service, http: HttpRequest | None) -> None:
        """Take a place.

        Args:
            service: Whose.
            http: Whose client is watched; None: nobody's.

        Raises:
            ServerError: There is no place left.
        """
        service.take_place()
        self.service, self._http = service, http
        self._deadline = time.monotonic() + service.options.timeout
        self._calls: list[Call] = []
        self._opened: dict[str, asyncio.Future[Any]] = {}
        self._gone: asyncio.Task[None] | None = None
        self._closed = False

    def close(self) -> None:
        """Give the place back, and let go of everything that has not come to an end."""
        if self._closed:
            return
        self._closed = True
        if self._gone is not None:
            self._gone.cancel()
        for opening in self._opened.values():
            opening.cancel()
        self._opened.clear()  # an error of one of them refers to this exchange, and so to what the client sent
        for call in list(self._calls):
            self.let_go(call)
        self.service.give_place_back()

    async def picture(self, value: str) -> Any:
        """An image that the client sent, for a request to the model; `size` is its (width, height).

        The same text gives the same object, which the engine encodes once.

        Raises:
            ImageError: It cannot be fetched or read, or is too large.
            ServerError: The time is up.
        """
        if value not in self._opened:
            opening = self._opened[value] = asyncio.ensure_future(self.service.pictures.open(value))
            opening.add_done_callback(lambda task: task.cancelled() or task.exception())  # if nobody waits any more
        return await self._wait(asyncio.shield(self._opened[value]))

    async def results(self, requests: Sequence[Request]) -> list[Result]:
        """Put requests to the model together; an `ErrorResult` stands in the place of one that failed.

        Raises:
            ServerError: The time is up.
        """
        return [result for result, _ in await self.answers(requests)]

    async def answers(self, requests: Sequence[Request]) -> list[tuple[Result, Usage]]:
        """As `results`, with what each took of the context."""
        calls = [self._submit(request) for request in requests]
        try:
            await self._wait(asyncio.shield(asyncio.gather(*(call.done for call in calls))))
        finally:
            for call in calls:
                self.let_go(call)
        return [(call.done.result(), call.usage) for call in calls]

    async def answer(self, request: Request) -> tuple[Any, Usage]:
        """The result of one request, and what it took of the context.

        Raises:
            ServerError: The time is up.
            Exception: Whatever the model says is wrong with the request.
        """
        ((result, usage),) = await self.answers([request])
        if isinstance(result, ErrorResult):
            raise result.error
        return result, usage

    async def result(self, request: Request) -> Any:
        """The result of one request; errors as in `answer`."""
        return (await self.answer(request))[0]

    async def stream(self, request: Request) -> Stream:
        """The pieces of one reply as they come. Waits for the first one, so that an error can have its status.

        Raises:
            As `answer`.
        """
        call = self._submit(request, streamed=True)
        first = await self._wait(call.pieces.get())
        if first is None:
            self.let_go(call)
            result = call.done.result()
            if isinstance(result, ErrorResult):
                raise result.error
        return Stream(self, call, first)

    async def next_piece(self, call: Call) -> Any:
        """The next piece of a streamed call, None at its end. For `Stream`: who is watched there is not the client,
        because Starlette does that while it sends.
        """
        try:
            return await asyncio.wait_for(call.pieces.get(), max(0.0, self._deadline - time.monotonic()))
        except (asyncio.TimeoutError, TimeoutError) as error:
            raise self._late() from error

    def _submit(self, request: Request, streamed: bool = False) -> Call:
        call = self.service.submit(request, streamed)
        self._calls.append(call)
        return call

    def let_go(self, call: Call) -> None:
        """Let go of a call, once."""
        if call in self._calls:
            self._calls.remove(call)
            self.service.let_go(call)

    async def _wait(self, work: Awaitable[T]) -> T:
        """Wait for something, but no longer than the client does and not past the time limit."""
        task = asyncio.ensure_future(work)
        if self._gone is None and self._http is not None:
            self._gone = asyncio.ensure_future(_until_gone(self._http))
        watched: set[asyncio.Future[Any]] = {task, *([self._gone] if self._gone is not None else [])}
        try:
            left = max(0.0, self._deadline - time.monotonic())
            await asyncio.wait(watched, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not task.done():
                task.cancel()
        if task.done() and not task.cancelled():
            return task.result()
        if self._gone is not None and self._gone.done():
            raise ClientLeft
        raise self._late()

    def _late(self) -> ServerError:
        limit = self.service.options.timeout
        return ServerError(504, f"the request took longer than {limit:g} seconds; try again, or ask for less")


class Stream:
    """The pieces of one reply: text of answers and captions, `Reasoning` first where asked for, objects and points.

    An asynchronous iterator. A failure on the way is raised by it as a `ServerError`.
    """

    def __init__(self, exchange: Exchange, call: Call, first: Any) -> None:
        self._exchange, self._call, self._next = exchange, call, first
        self._ended = first is None

    @property
    def usage(self) -> Usage:
        """What the reply took of the context; complete at the end."""
        return self._call.usage

    @property
    def result(self) -> Any:
        """The whole reply, once the stream has ended."""
        return self._call.done.result()

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            while self._next is not None:
                yield self._next
                self._next = await self._exchange.next_piece(self._call)
        finally:
            if not self._ended:
                self._ended = True
                self._exchange.let_go(self._call)
        result = self._call.done.result()
        if isinstance(result, ErrorResult):
            raise explain(result.error)


async def _until_gone(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def service_of(http: HttpRequest) -> Service:
    """The service of the app that a request came to."""
    service: Service = http.app.state.service
    return service


async def open_exchange(http: HttpRequest) -> AsyncIterator[Exchange]:
    """A FastAPI dependency: an exchange, closed after the last byte of the answer."""
    exchange = Exchange(service_of(http), http)
    try:
        yield exchange
    finally:
        exchange.close()


def wire_settings(values: Mapping[str, Any] | None) -> Settings:
    """Settings as a client sends them: unknown ones are ignored, and so is what is null.

    Raises:
        ServerError: A value is out of range, or names an adapter.
    """
    given = {key: value for key, value in (values or {}).items() if value is not None}
    if given.pop("variant", None) is not None:
        raise ServerError(400, "this server has no variants; leave settings.variant out", param="settings")
    try:
        settings = Settings.of(given, ignore_unknown=True)
    except ValueError as error:
        raise ServerError(400, f"settings: {error}", param="settings") from error
    if settings.max_crops is not None and settings.max_crops > MAX_CROPS:
        settings = replace(settings, max_crops=MAX_CROPS)
    return settings
