"""`RequestContext`: the queue slot, the images and the model calls of one HTTP request.

Routes get a context from FastAPI:

    async def caption(body: Body, context: RequestContext = Depends(open_request_context)):
        image = await context.open_image(body.image_url)
        result = await context.result(Caption(image, body.length))
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request as HttpRequest

from moondream_cv.requests import ErrorResult, Request, Result
from moondream_cv.server.errors import ClientDisconnected, ServerError, to_server_error
from moondream_cv.server.runtime.engine_loop import Usage
from moondream_cv.server.runtime.engines import Call
from moondream_cv.server.runtime.operations import Operation
from moondream_cv.server.segmentation import Box, Segment
from moondream_cv.server.service import Service, get_service

T = TypeVar("T")


class RequestContext:
    """The queue slot, the images and the model calls of one HTTP request.

    Every wait ends early if the client disconnects (`ClientDisconnected`) or the time limit expires (504).

    Attributes:
        service: The service that answers the request.
    """

    def __init__(self, service: Service, http: HttpRequest | None) -> None:
        """Acquire a queue slot.

        Args:
            service: The service that answers the request.
            http: The HTTP request, to detect that the client disconnects; None for work in the background.

        Raises:
            ServerError: 503 if the service is not ready, 429 if the queue is full.
        """
        service.acquire_slot()
        self.service, self._http = service, http
        self._deadline = service.now() + service.settings.timeout
        self._calls: list[Call] = []
        self._images: dict[str, asyncio.Future[Any]] = {}
        self._disconnected: asyncio.Task[None] | None = None
        self._closed = False

    def close(self) -> None:
        """Release the queue slot and cancel unfinished work. Later calls do nothing."""
        if self._closed:
            return
        self._closed = True
        if self._disconnected is not None:
            self._disconnected.cancel()
        for opening in self._images.values():
            opening.cancel()
        self._images.clear()  # errors of images refer to this context, and so to data of the client
        for call in list(self._calls):
            self.release_call(call)
        self.service.release_slot()

    async def open_image(self, value: str) -> Any:
        """Return an image of the client for a request to the model.

        The same text returns the same object, which the engine encodes once.

        Args:
            value: A data URI, base64 text, or an http or https URL.

        Returns:
            The image as `Engine.preprocess` returns it; `size` is its (width, height) in pixels.

        Raises:
            ImageError: The image cannot be downloaded or read, or is too large.
            ServerError: 504; the time limit has expired.
        """
        if value not in self._images:
            opening = self._images[value] = asyncio.ensure_future(self.service.images.open(value))
            opening.add_done_callback(lambda task: task.cancelled() or task.exception())  # if nothing awaits it
        return await self._wait(asyncio.shield(self._images[value]))

    async def results(self, requests: Sequence[Request]) -> list[Result]:
        """Run requests on the model in one batch; a failed request gets an `ErrorResult`.

        Raises:
            ServerError: 504; the time limit has expired.
        """
        return [result for result, _ in await self.results_with_usage(requests)]

    async def results_with_usage(self, requests: Sequence[Request]) -> list[tuple[Result, Usage]]:
        """Run requests like `results`, and return their token counts as well."""
        return await self._run(requests)

    async def operation(self, operation: Operation) -> Any:
        """Return the result of an operation.

        Raises:
            ServerError: 504; the time limit has expired.
            Exception: The error of the operation.
        """
        ((result, _),) = await self._run([operation])
        if isinstance(result, ErrorResult):
            raise result.error
        return result.value

    async def shared(self, task: asyncio.Future[T]) -> T:
        """Return the result of a task that continues if this request ends.

        Raises:
            ServerError: 504; the time limit has expired.
            Exception: The error of the task.
        """
        return await self._wait(asyncio.shield(task))

    async def segment(self, image: Any, boxes: Sequence[Box]) -> Segment | None:
        """Return the outline of the objects in boxes; the service must have a segmenter.

        Args:
            image: Image of `open_image`.
            boxes: At least one box, as fractions of the image.

        Raises:
            ServerError: 504; the time limit has expired.
            MoondreamError: The segmentation model failed.
        """
        assert self.service.segmenter is not None
        return await self._wait(self.service.segmenter.submit(image, boxes))

    async def _run(self, requests: Sequence[Request | Operation]) -> list[tuple[Any, Usage]]:
        calls = [self._submit(request) for request in requests]
        try:
            await self._wait(asyncio.shield(asyncio.gather(*(call.done for call in calls))))
        finally:
            for call in calls:
                self.release_call(call)
        return [(call.done.result(), call.usage) for call in calls]

    async def result(self, request: Request) -> Any:
        """Return the result of one request; raises like `result_with_usage`."""
        return (await self.result_with_usage(request))[0]

    async def result_with_usage(self, request: Request) -> tuple[Any, Usage]:
        """Return the result and the token counts of one request.

        Raises:
            ServerError: 504; the time limit has expired.
            Exception: The error of the request.
        """
        ((result, usage),) = await self.results_with_usage([request])
        if isinstance(result, ErrorResult):
            raise result.error
        return result, usage

    async def stream(self, request: Request) -> Stream:
        """Return the reply to one request as a stream.

        This waits for the first piece, so that an error before it sets the status of the response.

        Raises:
            ServerError: 504; the time limit has expired.
            Exception: The error of the request.
        """
        call = self._submit(request, streamed=True)
        first = await self._wait(call.pieces.get())
        if first is None:
            self.release_call(call)
            result = call.done.result()
            if isinstance(result, ErrorResult):
                raise result.error
        return Stream(self, call, first)

    async def next_piece(self, call: Call) -> Any:
        """Return the next piece of a streamed call, None at its end.

        For `Stream`. Starlette detects that the client disconnects while it sends the response.

        Raises:
            ServerError: 504; the time limit has expired.
        """
        piece = asyncio.ensure_future(call.pieces.get())
        try:
            await self.service.wait([piece], self._deadline)
        finally:
            if not piece.done():
                piece.cancel()
        if piece.cancelled() or not piece.done():
            raise self._timeout_error()
        return piece.result()

    def release_call(self, call: Call) -> None:
        """Cancel a call if it has not finished, and record its outcome. Later calls do nothing."""
        if call in self._calls:
            self._calls.remove(call)
            self.service.release_call(call)

    def _submit(self, request: Request | Operation, streamed: bool = False) -> Call:
        call = self.service.submit(request, streamed)
        self._calls.append(call)
        return call

    async def _wait(self, work: Awaitable[T]) -> T:
        """Return the result of an awaitable unless the client disconnects or the time limit expires first."""
        # Wait for the first of the events
        task = asyncio.ensure_future(work)
        if self._disconnected is None and self._http is not None:
            self._disconnected = asyncio.ensure_future(_wait_until_disconnected(self._http))
        events: set[asyncio.Future[Any]] = {task}
        if self._disconnected is not None:
            events.add(self._disconnected)
        try:
            await self.service.wait(events, self._deadline)
        finally:
            if not task.done():
                task.cancel()

        # Return the result or raise the reason
        if task.done() and not task.cancelled():
            return task.result()
        if self._disconnected is not None and self._disconnected.done():
            raise ClientDisconnected
        raise self._timeout_error()

    def _timeout_error(self) -> ServerError:
        limit = self.service.settings.timeout
        return ServerError(504, f"the request took longer than {limit:g} seconds; try again or send a smaller request")


class Stream:
    """The pieces of one reply, as an asynchronous iterator. An error of the request is raised as a `ServerError`.

    The pieces are text for answers and captions, objects, or points. If the request asks for reasoning, the first piece
    is a `Reasoning`.
    """

    def __init__(self, context: RequestContext, call: Call, first: Any) -> None:
        self._context, self._call, self._next = context, call, first
        self._ended = first is None

    @property
    def usage(self) -> Usage:
        """Token counts of the reply, complete at the end of the stream."""
        return self._call.usage

    @property
    def result(self) -> Any:
        """Complete result, available at the end of the stream."""
        return self._call.done.result()

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            while self._next is not None:
                yield self._next
                self._next = await self._context.next_piece(self._call)
        finally:
            if not self._ended:
                self._ended = True
                self._context.release_call(self._call)
        result = self._call.done.result()
        if isinstance(result, ErrorResult):
            raise to_server_error(result.error)


async def open_request_context(http: HttpRequest) -> AsyncIterator[RequestContext]:
    """Yield a request context, which is closed after the last byte of the response. This is a FastAPI dependency."""
    context = RequestContext(get_service(http), http)
    try:
        yield context
    finally:
        context.close()


def run_in_background(
    service: Service, work: Callable[[RequestContext], Coroutine[Any, Any, None]]
) -> asyncio.Task[None]:
    """Start work that continues after its HTTP request has been answered. The work holds a queue slot.

    Args:
        service: The service that runs the work.
        work: Called with a request context, which is closed when the work ends.

    Raises:
        ServerError: 503 if the service is not ready, 429 if the queue is full.
    """
    context = RequestContext(service, None)
    task = service.spawn(work(context))
    task.add_done_callback(lambda _: context.close())  # also if the task is cancelled before it starts
    return task


async def _wait_until_disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
