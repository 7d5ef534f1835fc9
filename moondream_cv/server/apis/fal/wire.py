"""Bodies of requests, responses and errors in fal's API, for synchronous, streamed and queued requests.

Coordinates are fractions of the image. In fal's API, `image` is an annotated image in fal's storage; this server does
not draw, and `image` has the size of the image in pixels. `truncated`, `logprob`, `settings` and `length` do not exist
in fal's API.

Each event of a stream has the reply so far, because fal's clients use the last event as the result.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from pydantic import BaseModel, Field
from starlette.responses import JSONResponse

from moondream_cv.requests import Caption, Detect, DetectResult, Point, PointResult, Query, QueryResult, Request
from moondream_cv.server.apis.base import ApiSpec
from moondream_cv.server.apis.error_responses import error_responses
from moondream_cv.server.apis.moondream import FoundObject, FoundPoint
from moondream_cv.server.apis.request_settings import parse_settings
from moondream_cv.server.apis.sse import event
from moondream_cv.server.errors import ServerError
from moondream_cv.server.logs import request_id
from moondream_cv.server.request_context import RequestContext, Stream

T = TypeVar("T")
APP = "/fal-ai/moondream2"
REQUEST_ID = "x-fal-request-id"
ERROR_TYPE = "x-fal-error-type"
TIMEOUT_TYPE = "x-fal-request-timeout-type"
USER_TIMEOUT = "request_timeout"


def error_body(error: ServerError) -> dict[str, Any]:
    """Return the JSON body of an error in this API. As in FastAPI, `detail` is a list for status 422, else a string."""
    if error.status != 422:
        return {"detail": error.message, "error_type": error.kind}
    place = ["body"] if error.param is None else ["body", error.param]
    return {"detail": [{"loc": place, "msg": error.message, "type": "value_error"}], "error_type": error.kind}


class FalApiSpec(ApiSpec):
    """fal's API: error responses have a request ID, and a header if the time limit of the client has expired."""

    def error_response(self, error: ServerError) -> JSONResponse:
        """Return the response for an error."""
        response = super().error_response(error)
        response.headers[REQUEST_ID] = request_id.get() or ""
        response.headers[ERROR_TYPE] = error.kind
        if error.kind == USER_TIMEOUT:
            response.headers[TIMEOUT_TYPE] = "user"  # keeps clients from retrying
        return response


API = FalApiSpec("fal", ("/fal-ai", "/run", "/queue"), error_body)


class CaptionArguments(BaseModel):
    """A request for a caption."""

    image_url: str = Field(description="A data URI, base64 text, or an http or https URL.")
    length: str = "normal"
    settings: dict[str, Any] | None = None

    def request(self, image: Any) -> Request:
        """Return the request to the model."""
        return Caption(image, self.length, parse_settings(self.settings))


class QueryArguments(BaseModel):
    """A question about an image."""

    image_url: str
    prompt: str
    settings: dict[str, Any] | None = None

    def request(self, image: Any) -> Request:
        """Return the request to the model."""
        return Query(image, self.prompt, settings=parse_settings(self.settings))


class DetectArguments(BaseModel):
    """A request for the boxes of objects."""

    image_url: str
    object: str
    settings: dict[str, Any] | None = None

    def request(self, image: Any) -> Request:
        """Return the request to the model."""
        return Detect(image, self.object, parse_settings(self.settings))


class PointArguments(BaseModel):
    """A request for points on objects."""

    image_url: str
    object: str
    settings: dict[str, Any] | None = None

    def request(self, image: Any) -> Request:
        """Return the request to the model."""
        return Point(image, self.object, parse_settings(self.settings))


class TextOutput(BaseModel):
    """A caption or an answer, and its mean log-probability per token if the model returns one."""

    output: str
    truncated: bool
    logprob: float | None = None


class Resolution(BaseModel):
    """Size of an image in pixels."""

    width: int
    height: int


class ObjectsOutput(BaseModel):
    """The boxes of an image."""

    objects: list[FoundObject]
    truncated: bool
    image: Resolution


class PointsOutput(BaseModel):
    """The points of an image."""

    objects: list[FoundPoint]
    truncated: bool
    image: Resolution


class FalErrorPlace(BaseModel):
    """A field of the body that does not match the schema."""

    loc: list[str]
    msg: str
    type: str


class FalError(BaseModel):
    """An error response: `detail` is a list of fields for status 422, else a string."""

    detail: str | list[FalErrorPlace]
    error_type: str


HEADERS: dict[str, Any] = {REQUEST_ID: {"schema": {"type": "string"}}}  # headers of all responses
_HEADERS: dict[str, Any] = {
    **HEADERS,
    ERROR_TYPE: {"description": "The body's `error_type`.", "schema": {"type": "string"}},
}
_DESCRIPTIONS: dict[int | str, str] = {
    404: "The request does not exist or has been dropped.",
    "default": "The error of the request, with the same status as a synchronous request.",
}


def fal_error_responses(*statuses: int | str) -> dict[int | str, dict[str, Any]]:
    """Return the error responses of a route of fal's API, for the `responses` argument of FastAPI.

    Args:
        *statuses: Statuses of the route.
    """
    return error_responses(FalError, *statuses, headers=_HEADERS, descriptions=_DESCRIPTIONS)


Arguments = CaptionArguments | QueryArguments | DetectArguments | PointArguments


async def run(body: Arguments, context: RequestContext, started: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Run a request and return the body of its response.

    Args:
        body: The request body.
        context: The request context.
        started: Called when the image is loaded, before the request is submitted to the model.

    Raises:
        Exception: The error of the image or the request.
    """
    image = await context.open_image(body.image_url)
    request = body.request(image)
    started()
    return _answer(await context.result(request), image)


async def open_stream(body: Arguments, context: RequestContext) -> AsyncIterator[bytes]:
    """Return the events of a streamed response, after waiting for its first piece.

    Args:
        body: The request body.
        context: The request context.

    Raises:
        Exception: The error of the image or the request.
    """
    image = await context.open_image(body.image_url)
    request = body.request(image)
    return _events(await context.stream(request), image)


async def _events(stream: Stream, image: Any) -> AsyncIterator[bytes]:
    """Yield the reply so far after each piece, then the complete reply with `partial` false, or the error."""
    text = ""
    items: list[dict[str, float]] = []
    try:
        async for piece in stream:
            if isinstance(piece, str):
                text += piece
            else:
                items.append(piece.to_dict())
            so_far = _list_body(items, False, image) if items else {"output": text, "truncated": False}
            yield event({**so_far, "partial": True})
        yield event({**_answer(stream.result, image), "partial": False})
    except ServerError as error:
        yield event({**error_body(error), "partial": False})


def _answer(result: Any, image: Any) -> dict[str, Any]:
    """Return the body of a complete reply."""
    if isinstance(result, DetectResult | PointResult):
        items = result.objects if isinstance(result, DetectResult) else result.points
        return _list_body([item.to_dict() for item in items], result.truncated, image)
    values = result.to_dict()
    return {"output": values.pop("answer" if isinstance(result, QueryResult) else "caption"), **values}


def _list_body(items: list[dict[str, float]], truncated: bool, image: Any) -> dict[str, Any]:
    return {"objects": items, "truncated": truncated, "image": dict(zip(("width", "height"), image.size, strict=True))}


async def with_time_limit(seconds: float | None, work: Coroutine[Any, Any, T]) -> T:
    """Await a coroutine, with the time limit of the client.

    Args:
        seconds: Time limit in seconds; None applies only the limit of the server.
        work: The coroutine.

    Raises:
        ServerError: 504; the time limit of the client has expired.
    """
    if seconds is None:
        return await work
    try:
        return await asyncio.wait_for(work, seconds)
    except asyncio.TimeoutError as error:
        raise ServerError(
            504,
            f"the request took longer than the {seconds:g} seconds of its X-Fal-Request-Timeout header",
            kind=USER_TIMEOUT,
        ) from error
