"""Moondream's API, for its Python and npm clients and clients of its cloud and of Moondream Station.

Moondream 2 has no segmentation: `/v1/segment` passes detected boxes to the segmentation model of the server, and is
rejected if there is none. Chat completions are in `openai/`, and the tuning API is in `tuning.py`. `batch.py` accepts
the bodies of this module as JSON lines.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Annotated, Any

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
from moondream_cv.server.apis.base import ApiSpec
from moondream_cv.server.apis.error_responses import SKILL_ERRORS, error_responses
from moondream_cv.server.apis.request_settings import parse_settings, with_checkpoint
from moondream_cv.server.apis.sse import event, event_stream
from moondream_cv.server.checkpoints import Checkpoint
from moondream_cv.server.errors import ServerError
from moondream_cv.server.request_context import RequestContext, Stream, open_request_context
from moondream_cv.server.segmentation import Segment, select_boxes
from moondream_cv.server.service import Service

MAX_SPATIAL_REFS = 64
_FINETUNE = re.compile(r"(?:/|^)[^/@]+@\d+$")  # a release such as moondream2@2025-06-21 does not match

Context = Annotated[RequestContext, Depends(open_request_context)]
SpatialRef = Annotated[list[float], Field(min_length=2, max_length=4)]
SpatialRefs = Annotated[list[SpatialRef], Field(max_length=MAX_SPATIAL_REFS)]
CaptionLength = Annotated[str, Field(json_schema_extra={"enum": list(CAPTION_LENGTHS)})]


def error_body(error: ServerError) -> dict[str, Any]:
    """Return the JSON body of an error in this API."""
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.status}}


API = ApiSpec("moondream", ("/v1",), error_body)


class Body(BaseModel):
    """Fields of all requests. `null` has the same effect as a missing field, and unknown fields are ignored.

    Attributes:
        image_url: A data URI, base64 text, or an http(s) URL.
        settings: temperature, top_p, max_tokens, max_objects, max_crops, seed; unknown settings are ignored.
        model: The model name of this server, any name that contains "moondream", or FINETUNE_ID@STEP of a saved
            checkpoint, optionally after the name of a model and a slash.
        variant: FINETUNE_ID@STEP of a saved checkpoint.
        stream: Whether to respond with server-sent events.
    """

    model_config = ConfigDict(strict=True)

    image_url: str | None = None
    settings: dict[str, Any] | None = None
    model: str | None = None
    variant: str | None = None
    stream: bool | None = None

    def request(self, image: Any) -> Request:
        """Return the request to the model.

        Args:
            image: The image at `image_url`; None if there is no URL.

        Raises:
            ValueError: A value is out of range.
            ServerError: A value is out of range, or Moondream 2 does not support the request.
        """
        raise NotImplementedError


class CaptionBody(Body):
    """A request for a caption.

    Attributes:
        length: Length of the caption; default "normal".
    """

    image_url: str
    length: CaptionLength | None = None

    def request(self, image: Any) -> Caption:
        return Caption(image, self.length or "normal", parse_settings(self.settings))


class QueryBody(Body):
    """A question, with or without an image.

    Attributes:
        question: Question text.
        reasoning: Whether to generate reasoning before the answer, and to return it.
        spatial_refs: Points (x, y) and boxes (x_min, y_min, x_max, y_max) that the question refers to, as fractions of
            the image.
    """

    question: str
    reasoning: bool | None = None
    spatial_refs: SpatialRefs | None = None

    def request(self, image: Any) -> Query:
        refs = tuple(tuple(ref) for ref in self.spatial_refs or ())
        return Query(image, self.question, bool(self.reasoning), refs, parse_settings(self.settings))


class DetectBody(Body):
    """A request for the boxes of objects.

    Attributes:
        object: Class name, in any words.
    """

    image_url: str
    object: str = Field(validation_alias=AliasChoices("object", "obj"))

    def request(self, image: Any) -> Request:
        return Detect(image, self.object, parse_settings(self.settings))


class PointBody(DetectBody):
    """A request for points on objects.

    Attributes:
        spatial_refs: Not supported by Moondream 2; leave it out.
    """

    spatial_refs: SpatialRefs | None = None

    def request(self, image: Any) -> Request:
        if self.spatial_refs:
            message = (
                "Moondream 2 supports spatial_refs only for /v1/query;"
                f" leave spatial_refs out, got {self.spatial_refs!r:.60}"
            )
            raise ServerError(400, message, kind="unsupported_skill", param="spatial_refs")
        return Point(image, self.object, parse_settings(self.settings))


class SegmentBody(DetectBody):
    """A request for the outline of an object.

    Attributes:
        spatial_refs: Points (x, y) on the object and boxes (x_min, y_min, x_max, y_max) around it, as fractions of the
            image. Several select several objects, which get one outline.
    """

    spatial_refs: SpatialRefs | None = None

    def checked_refs(self, image: Any) -> tuple[tuple[float, ...], ...]:
        """Return the references.

        Args:
            image: The image at `image_url`.

        Raises:
            ValueError: A reference has not 2 or 4 values, or a value is not between 0 and 1.
        """
        return Query(image, self.object, spatial_refs=tuple(map(tuple, self.spatial_refs or ()))).spatial_refs


class GazeBody(Body):
    """A request for the target of a gaze.

    Attributes:
        eye: Point (x, y) between the eyes, as fractions of the image.
        force_detect: Whether to return a point even if the model finds no target in the image.
    """

    image_url: str
    eye: Annotated[list[float], Field(min_length=2, max_length=2)]
    force_detect: bool | None = None

    def request(self, image: Any) -> Request:
        return Gaze(image, (self.eye[0], self.eye[1]), bool(self.force_detect), parse_settings(self.settings))


class Answer(BaseModel):
    """Fields of all responses.

    Attributes:
        request_id: ID of the request, as in the X-Request-Id header.
        truncated: Whether a limit of the settings ended the reply.
    """

    request_id: str
    truncated: bool


class FoundObject(BaseModel):
    """A box in fractions of the image. It is not clipped to the image."""

    x_min: float
    y_min: float
    x_max: float
    y_max: float
    confidence: float


class FoundPoint(BaseModel):
    """A point in fractions of the image."""

    x: float
    y: float
    confidence: float


class Grounding(BaseModel):
    """Points that the reasoning refers to in the characters from `start_idx` to `end_idx`."""

    start_idx: int
    end_idx: int
    points: list[tuple[float, float]]


class ReasoningOutput(BaseModel):
    """Reasoning that precedes an answer."""

    text: str
    grounding: list[Grounding]


class CaptionAnswer(Answer):
    """A caption, and its mean log-probability per token if the model returns one."""

    caption: str
    logprob: float | None = None


class QueryAnswer(Answer):
    """An answer, and its mean log-probability per token if the model returns one."""

    answer: str
    reasoning: ReasoningOutput | None = None
    logprob: float | None = None


class DetectAnswer(Answer):
    """The boxes of an image."""

    objects: list[FoundObject]


class PointAnswer(Answer):
    """The points of an image."""

    points: list[FoundPoint]
    count: int


class SegmentBox(BaseModel):
    """The bounding box of a mask, in fractions of the image."""

    x_min: float
    y_min: float
    x_max: float
    y_max: float


class SegmentAnswer(BaseModel):
    """The outline of an object. If there is no object, the path is empty and the box is null.

    Attributes:
        request_id: ID of the request, as in the X-Request-Id header.
        path: SVG path in fractions of the width and the height of `bbox`, as Moondream's own engine returns it. Holes
            are subpaths of the opposite orientation.
        bbox: Bounding box of the path in the image.
    """

    request_id: str
    path: str
    bbox: SegmentBox | None


class GazePoint(BaseModel):
    """A point in fractions of the image."""

    x: float
    y: float


class GazeAnswer(BaseModel):
    """The target of a gaze; null if the model finds no target in the image."""

    request_id: str
    gaze: GazePoint | None


class ErrorDetail(BaseModel):
    """An error."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorAnswer(BaseModel):
    """An error response."""

    error: ErrorDetail


ERRORS = error_responses(ErrorAnswer, *SKILL_ERRORS)
_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The reply; with `stream`, its pieces as they are generated, then `completed`.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}

router = APIRouter(prefix="/v1", tags=["moondream"], responses=ERRORS)


@router.post(
    "/caption", summary="Describe", response_model=CaptionAnswer, response_model_exclude_none=True, responses=_STREAMED
)
async def caption(body: CaptionBody, http: HttpRequest, context: Context) -> Any:
    """Describe an image. Events: `{"chunk": "..."}`, `{"completed": true}`."""
    return await _respond(body, http, context)


@router.post("/query", summary="Ask", response_model=QueryAnswer, response_model_exclude_none=True, responses=_STREAMED)
async def query(body: QueryBody, http: HttpRequest, context: Context) -> Any:
    """Answer a question, with or without an image. Events: as for captions; `{"reasoning": {...}}` comes first."""
    return await _respond(body, http, context)


@router.post("/detect", summary="Detect", response_model=DetectAnswer, responses=_STREAMED)
async def detect(body: DetectBody, http: HttpRequest, context: Context) -> Any:
    """Return the boxes of all objects that match a name. Events: `{"object": {...}}`, `{"completed": true}`."""
    return await _respond(body, http, context)


@router.post("/point", summary="Point", response_model=PointAnswer, responses=_STREAMED)
async def point(body: PointBody, http: HttpRequest, context: Context) -> Any:
    """Return points on all objects that match a name. Events: `{"point": {...}}`, `{"completed": true}`."""
    return await _respond(body, http, context)


@router.post("/gaze", summary="Gaze", response_model=GazeAnswer, responses=_STREAMED)
async def gaze(body: GazeBody, http: HttpRequest, context: Context) -> Any:
    """Return the target of a person's gaze. Events: `{"gaze": {...}}`, `{"completed": true}`."""
    reply = await _respond(body.model_copy(update={"stream": None}), http, context)
    return event_stream(_single_event({"gaze": reply["gaze"]})) if body.stream else reply


@router.post("/segment", summary="Segment", response_model=SegmentAnswer, responses=_STREAMED)
async def segment(body: SegmentBody, http: HttpRequest, context: Context) -> Any:
    """Return the outline of an object as an SVG path. The server needs a segmentation model.

    Without `spatial_refs`, this is the object that matches the name with the highest confidence. Events: `{"type":
    "bbox", ...}`, `{"type": "path_delta", ...}` for each part and hole, `{"type": "final", ...}`.
    """
    if context.service.segmenter is None:
        message = (
            "this server has no segmentation model; start it with --masks facebook/sam2.1-hiera-small, or use"
            " /v1/detect for boxes or /v1/point for points"
        )
        raise ServerError(400, message, kind="unsupported_skill")
    checkpoint = select_checkpoint(body, context.service)
    image = await context.open_image(body.image_url)
    request = with_checkpoint(body.request(image), checkpoint)
    refs = body.checked_refs(image)
    found = await context.result(request)
    boxes = select_boxes(found.objects, refs)
    outline = await context.segment(image, boxes) if boxes else None
    if body.stream:
        return event_stream(_segment_events(outline))
    return {"request_id": http.state.request_id, **_segment_body(outline)}


async def _respond(body: Body, http: HttpRequest, context: RequestContext) -> Any:
    checkpoint = select_checkpoint(body, context.service)
    image = None if body.image_url is None else await context.open_image(body.image_url)
    request = with_checkpoint(body.request(image), checkpoint)
    if body.stream:
        return event_stream(_events(await context.stream(request)))
    return {"request_id": http.state.request_id, **result_body(await context.result(request))}


def is_served(name: str, service: Service) -> bool:
    """Return whether a model name means the model of this server: its own name, or any name with "moondream"."""
    return name == service.name or "moondream" in name.lower()


def select_checkpoint(body: Body, service: Service) -> Checkpoint | None:
    """Return the checkpoint that a request names, None if it names the model of this server.

    Raises:
        ServerError: 404; the request names a checkpoint or a model that this server does not have.
    """
    advice = f"leave model out or use {service.name!r}"
    if body.variant:
        checkpoint = service.find_checkpoint(body.variant)
        if checkpoint is None:
            message = f"this server has no finetunes with the checkpoint {body.variant!r:.200}; leave variant out"
            raise ServerError(404, message, param="variant")
        return checkpoint
    if not body.model or body.model == service.name:
        return None
    if _FINETUNE.search(body.model[-200:]):
        checkpoint = service.find_checkpoint(body.model)
        if checkpoint is None:
            message = f"this server has no finetunes with the checkpoint {body.model!r:.200}; {advice}"
            raise ServerError(404, message, param="model")
        return checkpoint
    if not is_served(body.model, service):
        raise ServerError(404, f"this server does not have the model {body.model!r:.200}; {advice}", param="model")
    return None


def result_body(result: Any) -> dict[str, Any]:
    """Return the JSON body of a successful result in this API, without the request ID."""
    return result.to_dict() | ({"count": len(result.points)} if isinstance(result, PointResult) else {})


async def _single_event(reply: dict[str, Any]) -> AsyncIterator[bytes]:
    """Yield the events of a reply that is not generated in pieces."""
    yield event(reply)
    yield event({"completed": True})


def _segment_body(outline: Segment | None) -> dict[str, Any]:
    if outline is None:
        return {"path": "", "bbox": None}
    return {"path": " ".join(outline.subpaths), "bbox": dict(zip(SegmentBox.model_fields, outline.box, strict=True))}


async def _segment_events(outline: Segment | None) -> AsyncIterator[bytes]:
    """Yield the events of a segmentation, as Moondream's clients read them."""
    body = _segment_body(outline)
    if outline is not None:
        yield event({"type": "bbox", "bbox": body["bbox"]})
        for number, subpath in enumerate(outline.subpaths):
            yield event({"type": "path_delta", "chunk": f" {subpath}" if number else subpath, "completed": False})
    yield event({"type": "final", **body, "completed": True})


async def _events(stream: Stream) -> AsyncIterator[bytes]:
    """Yield the events of a stream. Moondream's clients read `chunk` and `completed` and ignore the rest."""
    try:
        async for piece in stream:
            yield event(_piece_body(piece))
        yield event({"completed": True})
    except ServerError as error:
        yield event(error_body(error))


def _piece_body(piece: Any) -> dict[str, Any]:
    if isinstance(piece, Reasoning):
        return {"reasoning": piece.to_dict()}
    if isinstance(piece, DetectedObject):
        return {"object": piece.to_dict()}
    if isinstance(piece, DetectedPoint):
        return {"point": piece.to_dict()}
    return {"chunk": piece}
