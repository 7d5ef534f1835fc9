"""Moondream's own dialect: what its Python and npm clients, its cloud and Moondream Station speak.

Segmentation and finetunes belong to other models than Moondream 2 and are refused by name. Chat completions are left to
`openai.py`, many requests in one body to `batch.py`, which takes its lines from the bodies here.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Annotated, Any, NoReturn

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from moondream_cv.requests import (
    CAPTION_LENGTHS,
    Caption,
    Detect,
    DetectedObject,
    DetectedPoint,
    Gaze,
    Point,
    PointResult,
    Query,
    Reasoning,
    Request,
)
from moondream_cv.server.apis.base import Dialect
from moondream_cv.server.apis.error_responses import OF_A_SKILL, refusals
from moondream_cv.server.apis.sse import event, event_stream
from moondream_cv.server.errors import ServerError
from moondream_cv.server.service import Exchange, Service, Stream, open_exchange, wire_settings

MAX_SPATIAL_REFS = 64
_FINETUNE = re.compile(r"/[^/@]+@\d+$")  # model/finetune@step; a release such as moondream2@2025-06-21 is none

Open = Annotated[Exchange, Depends(open_exchange)]
SpatialRef = Annotated[list[float], Field(min_length=2, max_length=4)]
SpatialRefs = Annotated[list[SpatialRef], Field(max_length=MAX_SPATIAL_REFS)]
CaptionLength = Annotated[str, Field(json_schema_extra={"enum": list(CAPTION_LENGTHS)})]


def error_body(error: ServerError) -> dict[str, Any]:
    """An error in this dialect."""
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.status}}


DIALECT = Dialect("moondream", ("/v1",), error_body)


class Body(BaseModel):
    """What every request may have; `null` is the same as nothing, and keys that are not known are ignored.

    Attributes:
        image_url: A data URI, base64 text, or an http(s) URL.
        settings: temperature, top_p, max_tokens, max_objects, max_crops, seed; others are ignored.
        model: The served name, or any name of Moondream.
        variant: A finetune, of which this server has none.
        stream: Answer in server-sent events.
    """

    model_config = ConfigDict(strict=True)

    image_url: str | None = None
    settings: dict[str, Any] | None = None
    model: str | None = None
    variant: str | None = None
    stream: bool | None = None

    def request(self, image: Any) -> Request:
        """What is put to the model.

        Args:
            image: What `image_url` leads to; None without one.

        Raises:
            ValueError: A value is out of range.
            ServerError: Likewise, or Moondream 2 cannot do that.
        """
        raise NotImplementedError


class CaptionBody(Body):
    image_url: str
    length: CaptionLength | None = None

    def request(self, image: Any) -> Caption:
        return Caption(image, self.length or "normal", wire_settings(self.settings))


class QueryBody(Body):
    question: str
    reasoning: bool | None = None
    spatial_refs: SpatialRefs | None = None

    def request(self, image: Any) -> Query:
        refs = tuple(tuple(ref) for ref in self.spatial_refs or ())
        return Query(image, self.question, bool(self.reasoning), refs, wire_settings(self.settings))


class DetectBody(Body):
    image_url: str
    object: str = Field(validation_alias=AliasChoices("object", "obj"))

    def request(self, image: Any) -> Request:
        return Detect(image, self.object, wire_settings(self.settings))


class PointBody(DetectBody):
    spatial_refs: SpatialRefs | None = None

    def request(self, image: Any) -> Request:
        if self.spatial_refs:
            said = f"in Moondream 2, spatial_refs are for /v1/query: leave out {self.spatial_refs!r:.60}"
            raise ServerError(400, said, kind="unsupported_skill", param="spatial_refs")
        return Point(image, self.object, wire_settings(self.settings))


class GazeBody(Body):
    """A request for a gaze.

    Attributes:
        eye: (x, y) between the eyes, as fractions of the image.
        force_detect: Return a point even if the model sees no target in the image.
    """

    image_url: str
    eye: Annotated[list[float], Field(min_length=2, max_length=2)]
    force_detect: bool | None = None

    def request(self, image: Any) -> Request:
        return Gaze(image, (self.eye[0], self.eye[1]), bool(self.force_detect), wire_settings(self.settings))


class Answer(BaseModel):
    """What every answer has.

    Attributes:
        request_id: What the X-Request-Id header says.
        truncated: A limit of the settings ended the reply.
    """

    request_id: str
    truncated: bool


class FoundObject(BaseModel):
    """A box as the model gave it, in fractions of the image: not clipped."""

    x_min: float
    y_min: float
    x_max: float
    y_max: float
    confidence: float


class FoundPoint(BaseModel):
    x: float
    y: float
    confidence: float


class Grounding(BaseModel):
    """Points that the characters from `start_idx` to `end_idx` of the thoughts speak of."""

    start_idx: int
    end_idx: int
    points: list[tuple[float, float]]


class Thoughts(BaseModel):
    text: str
    grounding: list[Grounding]


class CaptionAnswer(Answer):
    caption: str
    logprob: float | None = None


class QueryAnswer(Answer):
    answer: str
    reasoning: Thoughts | None = None
    logprob: float | None = None


class DetectAnswer(Answer):
    objects: list[FoundObject]


class PointAnswer(Answer):
    points: list[FoundPoint]
    count: int


class GazePoint(BaseModel):
    """A point in fractions of the image."""

    x: float
    y: float


class GazeAnswer(BaseModel):
    """The target of a gaze; None if the model sees none in the image."""

    request_id: str
    gaze: GazePoint | None


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: int


class ErrorAnswer(BaseModel):
    error: ErrorDetail


ERRORS = refusals(ErrorAnswer, *OF_A_SKILL)
_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The reply; with `stream`, its pieces as they come, and `completed` at the end.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}

router = APIRouter(prefix="/v1", tags=["moondream"], responses=ERRORS)


@router.post(
    "/caption", summary="Describe", response_model=CaptionAnswer, response_model_exclude_none=True, responses=_STREAMED
)
async def caption(body: CaptionBody, http: HttpRequest, exchange: Open) -> Any:
    """Describe an image. Events: `{"chunk": "..."}`, `{"completed": true}`."""
    return await _reply(body, http, exchange)


@router.post("/query", summary="Ask", response_model=QueryAnswer, response_model_exclude_none=True, responses=_STREAMED)
async def query(body: QueryBody, http: HttpRequest, exchange: Open) -> Any:
    """Answer a question, about an image or without one. Events: as of a caption, `{"reasoning": {...}}` first."""
    return await _reply(body, http, exchange)


@router.post("/detect", summary="Detect", response_model=DetectAnswer, responses=_STREAMED)
async def detect(body: DetectBody, http: HttpRequest, exchange: Open) -> Any:
    """Find boxes of everything that a name means. Events: `{"object": {...}}`, `{"completed": true}`."""
    return await _reply(body, http, exchange)


@router.post("/point", summary="Point", response_model=PointAnswer, responses=_STREAMED)
async def point(body: PointBody, http: HttpRequest, exchange: Open) -> Any:
    """Find points on everything that a name means. Events: `{"point": {...}}`, `{"completed": true}`."""
    return await _reply(body, http, exchange)


@router.post("/gaze", summary="Gaze", response_model=GazeAnswer, responses=_STREAMED)
async def gaze(body: GazeBody, http: HttpRequest, exchange: Open) -> Any:
    """Find the point that a person looks at. Events: `{"gaze": {...}}`, `{"completed": true}`."""
    reply = await _reply(body.model_copy(update={"stream": None}), http, exchange)
    return event_stream(_whole({"gaze": reply["gaze"]})) if body.stream else reply


@router.post("/segment", summary="Not in Moondream 2", status_code=400, response_model=ErrorAnswer)
async def segment() -> NoReturn:
    """Say that Moondream 2 has no segmentation."""
    said = "Moondream 2 does not segment; /v1/detect gives boxes, and /v1/point gives points"
    raise ServerError(400, said, kind="unsupported_skill")


async def _reply(body: Body, http: HttpRequest, exchange: Exchange) -> Any:
    check_model(body, exchange.service)
    image = None if body.image_url is None else await exchange.picture(body.image_url)
    request = body.request(image)
    if body.stream:
        return event_stream(_events(await exchange.stream(request)))
    return {"request_id": http.state.request_id, **described(await exchange.result(request))}


def is_served(name: str, service: Service) -> bool:
    """Whether a name that a client gave means the model of this server: its own name, or any of Moondream."""
    return name == service.name or "moondream" in name.lower()


def check_model(body: Body, service: Service) -> None:
    """Refuse a request for another model.

    Raises:
        ServerError: 404; it is for a model that is not here, or for a finetune.
    """
    own = f"leave it out, or give {service.name!r}"
    if body.variant:
        raise ServerError(404, f"this server has no finetunes, and variant is {body.variant!r:.200}", param="variant")
    if not body.model or body.model == service.name:
        return
    if _FINETUNE.search(body.model[-200:]):
        raise ServerError(404, f"this server has no finetunes, and model is {body.model!r:.200}; {own}", param="model")
    if not is_served(body.model, service):
        raise ServerError(404, f"this server does not have the model {body.model!r:.200}; {own}", param="model")


def described(result: Any) -> dict[str, Any]:
    """A result, which is no error, as this dialect has it."""
    return result.to_dict() | ({"count": len(result.points)} if isinstance(result, PointResult) else {})


async def _whole(reply: dict[str, Any]) -> AsyncIterator[bytes]:
    """A stream of a reply that has no pieces."""
    yield event(reply)
    yield event({"completed": True})


async def _events(stream: Stream) -> AsyncIterator[bytes]:
    """What Moondream's clients read of a stream is `chunk` and `completed`; they pass over the rest."""
    try:
        async for piece in stream:
            yield event(_piece(piece))
        yield event({"completed": True})
    except ServerError as error:
        yield event(error_body(error))


def _piece(piece: Any) -> dict[str, Any]:
    if isinstance(piece, Reasoning):
        return {"reasoning": piece.to_dict()}
    if isinstance(piece, DetectedObject):
        return {"object": piece.to_dict()}
    if isinstance(piece, DetectedPoint):
        return {"point": piece.to_dict()}
    return {"chunk": piece}
