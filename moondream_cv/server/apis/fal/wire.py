"""fal's dialect on the wire: what requests, answers and errors look like, whichever way they travel.

Coordinates are fractions of the image, as everywhere in this project. `image` is fal's name for an annotated picture in
its storage; nothing is drawn here, and `image` tells the size that the fractions are of. `truncated`, `logprob`,
`settings` and `length` are keys that fal does not have.

Streams repeat what there is so far: fal's clients take the last event of a stream for its result, so that one has to
hold everything.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from pydantic import BaseModel, Field
from starlette.responses import JSONResponse

from moondream_cv.requests import Caption, Detect, DetectResult, Point, PointResult, Query, QueryResult, Request
from moondream_cv.server.apis.base import Dialect
from moondream_cv.server.apis.error_responses import refusals as documented
from moondream_cv.server.apis.moondream import FoundObject, FoundPoint
from moondream_cv.server.apis.sse import event
from moondream_cv.server.errors import ServerError
from moondream_cv.server.logs import request_id
from moondream_cv.server.service import Exchange, Stream, wire_settings

T = TypeVar("T")
APP = "/fal-ai/moondream2"
REQUEST_ID = "x-fal-request-id"
ERROR_TYPE = "x-fal-error-type"
TIMEOUT_TYPE = "x-fal-request-timeout-type"
USER_TIMEOUT = "request_timeout"


def error_body(error: ServerError) -> dict[str, Any]:
    """fal's, which is FastAPI's: a list of places where the body does not fit the schema, else a sentence."""
    if error.status != 422:
        return {"detail": error.message, "error_type": error.kind}
    place = ["body"] if error.param is None else ["body", error.param]
    return {"detail": [{"loc": place, "msg": error.message, "type": "value_error"}], "error_type": error.kind}


class FalDialect(Dialect):
    """A dialect whose errors have an id, and say whether it was the client's own time limit that ended a request."""

    def answer(self, error: ServerError) -> JSONResponse:
        answer = super().answer(error)
        answer.headers[REQUEST_ID] = request_id.get() or ""
        answer.headers[ERROR_TYPE] = error.kind
        if error.kind == USER_TIMEOUT:
            answer.headers[TIMEOUT_TYPE] = "user"  # or the clients would try again
        return answer


DIALECT = FalDialect("fal", ("/fal-ai", "/run", "/queue"), error_body)


class CaptionArguments(BaseModel):
    image_url: str = Field(description="A data URI, base64 text, or an http or https URL.")
    length: str = "normal"
    settings: dict[str, Any] | None = None

    def request(self, image: Any) -> Request:
        return Caption(image, self.length, wire_settings(self.settings))


class QueryArguments(BaseModel):
    image_url: str
    prompt: str
    settings: dict[str, Any] | None = None

    def request(self, image: Any) -> Request:
        return Query(image, self.prompt, settings=wire_settings(self.settings))


class DetectArguments(BaseModel):
    image_url: str
    object: str
    settings: dict[str, Any] | None = None

    def request(self, image: Any) -> Request:
        return Detect(image, self.object, wire_settings(self.settings))


class PointArguments(BaseModel):
    image_url: str
    object: str
    settings: dict[str, Any] | None = None

    def request(self, image: Any) -> Request:
        return Point(image, self.object, wire_settings(self.settings))


class TextOutput(BaseModel):
    """A caption, or an answer; `logprob` where the model gives one."""

    output: str
    truncated: bool
    logprob: float | None = None


class Resolution(BaseModel):
    """Of the image, in pixels."""

    width: int
    height: int


class ObjectsOutput(BaseModel):
    objects: list[FoundObject]
    truncated: bool
    image: Resolution


class PointsOutput(BaseModel):
    objects: list[FoundPoint]
    truncated: bool
    image: Resolution


class FalErrorPlace(BaseModel):
    """Where the body does not fit the schema."""

    loc: list[str]
    msg: str
    type: str


class FalError(BaseModel):
    """What is wrong: places of the body with status 422, else a sentence."""

    detail: str | list[FalErrorPlace]
    error_type: str


HEADERS: dict[str, Any] = {REQUEST_ID: {"schema": {"type": "string"}}}  # of all answers, for the published schema
_HEADERS: dict[str, Any] = {
    **HEADERS,
    ERROR_TYPE: {"description": "The body's `error_type`.", "schema": {"type": "string"}},
}
_MEANINGS: dict[int | str, str] = {
    404: "There is no such request, or none any more.",
    "default": "The error that ended the request, with the status that it has without the queue.",
}


def refusals(*statuses: int | str) -> dict[int | str, dict[str, Any]]:
    """What a route answers beside its success, as FastAPI's `responses`.

    Args:
        *statuses: Those that it can answer.
    """
    return documented(FalError, *statuses, headers=_HEADERS, meanings=_MEANINGS)


Arguments = CaptionArguments | QueryArguments | DetectArguments | PointArguments


async def run(body: Arguments, exchange: Exchange, started: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """The answer to a body.

    Args:
        started: Called when the image is there and the model has the request.

    Raises:
        Exception: Whatever is wrong with the image or the request.
    """
    image = await exchange.picture(body.image_url)
    request = body.request(image)
    started()
    return _answer(await exchange.result(request), image)


async def open_stream(body: Arguments, exchange: Exchange) -> AsyncIterator[bytes]:
    """The events of a streamed answer. Waits for its first piece; errors as in `run`."""
    image = await exchange.picture(body.image_url)
    request = body.request(image)
    return _events(await exchange.stream(request), image)


async def _events(stream: Stream, image: Any) -> AsyncIterator[bytes]:
    """What there is so far, again and again, and at last all of it, with `partial` false, or the error."""
    text = ""
    items: list[dict[str, float]] = []
    try:
        async for piece in stream:
            if isinstance(piece, str):
                text += piece
            else:
                items.append(piece.to_dict())
            so_far = _list_of(items, False, image) if items else {"output": text, "truncated": False}
            yield event({**so_far, "partial": True})
        yield event({**_answer(stream.result, image), "partial": False})
    except ServerError as error:
        yield event({**error_body(error), "partial": False})


def _answer(result: Any, image: Any) -> dict[str, Any]:
    """A whole answer."""
    if isinstance(result, DetectResult | PointResult):
        items = result.objects if isinstance(result, DetectResult) else result.points
        return _list_of([item.to_dict() for item in items], result.truncated, image)
    found = result.to_dict()
    return {"output": found.pop("answer" if isinstance(result, QueryResult) else "caption"), **found}


def _list_of(items: list[dict[str, float]], truncated: bool, image: Any) -> dict[str, Any]:
    return {"objects": items, "truncated": truncated, "image": dict(zip(("width", "height"), image.size, strict=True))}


async def within(seconds: float | None, work: Coroutine[Any, Any, T]) -> T:
    """Do something, for no longer than the client says; None: as long as the server allows.

    Raises:
        ServerError: 504.
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
