"""Roboflow Inference's API for Moondream 2: `/infer/lmm`, which detects objects, and `/info`.

As on Roboflow's server, the prompt is one class, and boxes are centers and sizes in pixels. There are three
differences: confidences are those of the model, coordinates are not rounded, and a list of images gets a list of
responses. Boxes are clipped to the image, which consumers such as crops, zones and `sv.Detections.from_inference`
expect; a box completely outside the image is kept, with no area. NumPy images are pickles and are rejected, because
unpickling runs code.

Other skills are available through the other APIs.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from pydantic import BaseModel, ConfigDict, Field

from moondream_cv import __version__
from moondream_cv.requests import Detect, DetectedObject, DetectResult, ErrorResult
from moondream_cv.server.apis.base import ApiSpec
from moondream_cv.server.apis.error_responses import SKILL_ERRORS, error_responses
from moondream_cv.server.apis.moondream import is_served
from moondream_cv.server.apis.request_settings import with_checkpoint
from moondream_cv.server.checkpoints import Checkpoint, parse_checkpoint
from moondream_cv.server.errors import ClientDisconnected, ServerError, to_server_error
from moondream_cv.server.request_context import RequestContext, open_request_context
from moondream_cv.server.service import Service, get_service, missing_checkpoint

MAX_IMAGES = 16  # per request; all of them are in memory at the same time
IMAGE_TYPES = ("base64", "url")

Context = Annotated[RequestContext, Depends(open_request_context)]


def error_body(error: ServerError) -> dict[str, Any]:
    """Return the JSON body of an error in this API. inference-sdk shows the message."""
    return {"message": error.message, "error_type": error.kind}


API = ApiSpec("roboflow", ("/infer", "/info"), error_body, key_in_body=True)


class ImageBody(BaseModel):
    """An image.

    Attributes:
        type: "base64" or "url".
        value: Base64 text, a data URI, or an http(s) URL.
    """

    model_config = ConfigDict(strict=True)

    type: str = Field(json_schema_extra={"enum": list(IMAGE_TYPES)})
    value: Any = Field(json_schema_extra={"type": "string"})


class LmmBody(BaseModel):
    """A request. Other fields, such as `max_new_tokens` and `enable_thinking`, do not apply to detection.

    Attributes:
        image: One image, or a list of images.
        prompt: Class name to detect.
        model_id: The model name of this server, any name that contains "moondream", or FINETUNE_ID@STEP of a saved
            checkpoint, optionally after the name of a model and a slash; can be in the path instead.
        api_key: API key, if it is not in the `Authorization` header.
    """

    model_config = ConfigDict(strict=True, protected_namespaces=())

    image: ImageBody | Annotated[list[ImageBody], Field(min_length=1, max_length=MAX_IMAGES)]
    prompt: str | None = None
    model_id: str | None = None
    api_key: str | None = None


class Resolution(BaseModel):
    """Size of an image in pixels."""

    width: int
    height: int


class Prediction(BaseModel):
    """A box in pixels; `x` and `y` are the center."""

    x: float
    y: float
    width: float
    height: float
    confidence: float
    class_name: str = Field(alias="class")
    class_id: int
    detection_id: str


class LmmAnswer(BaseModel):
    """The detections of one image.

    Attributes:
        time: Duration of the whole request in seconds.
        truncated: Whether the list reached the maximum number of objects. Roboflow's server does not have this field.
    """

    inference_id: str
    time: float
    image: Resolution
    predictions: list[Prediction]
    truncated: bool


class Info(BaseModel):
    """Description of the server.

    Attributes:
        uuid: Random ID of the process.
        has_scores: Whether confidences are real; otherwise they are 1.0.
    """

    name: str
    version: str
    uuid: str
    has_scores: bool


class RoboflowError(BaseModel):
    """An error response."""

    message: str
    error_type: str


router = APIRouter(tags=["roboflow"])


@router.get("/info", summary="Server information")
def info(http: HttpRequest) -> Info:  # in a thread, because `has_scores` of a remote model can send a request
    """Return information about the server. No API key is required, because clients send none here."""
    engine = get_service(http).engine
    scores = engine is not None and engine.has_scores
    return Info(name="moondream-cv", version=__version__, uuid=_process_uuid(), has_scores=scores)


_LMM: dict[str, Any] = {
    "summary": "Detect",
    "response_model": LmmAnswer | list[LmmAnswer],
    "responses": error_responses(RoboflowError, *SKILL_ERRORS),
}


@router.post("/infer/lmm", **_LMM)
async def infer_lmm(body: LmmBody, context: Context) -> Any:
    """Return the boxes of all objects that match the prompt, for one image or each image of a list.

    If an image of a list cannot be read, the whole request fails, and the message has the index of the image.
    """
    return await _infer(body, body.model_id, context)


@router.post("/infer/lmm/{model_id:path}", **_LMM)
async def infer_lmm_of(model_id: str, body: LmmBody, context: Context) -> Any:
    """Return boxes like `/infer/lmm`, with the model name in the path."""
    if body.model_id and body.model_id != model_id:
        raise ServerError(
            400, f"the path has the model {model_id!r:.200} and the body has {body.model_id!r:.200}; send one of them"
        )
    return await _infer(body, model_id, context)


async def _infer(body: LmmBody, model_id: str | None, context: RequestContext) -> Any:
    started = time.perf_counter()

    # Check the request
    checkpoint = _select_checkpoint(model_id, context.service)
    if body.prompt is None or not body.prompt.strip():
        raise ServerError(400, f"prompt must be the class name to detect, got {body.prompt!r:.100}", param="prompt")
    is_list = isinstance(body.image, list)

    # Run the model
    images = await _open_images(body.image if isinstance(body.image, list) else [body.image], context)
    results = await context.results([with_checkpoint(Detect(image, body.prompt), checkpoint) for image in images])
    seconds = time.perf_counter() - started

    # Convert the results
    answers = []
    for index, (image, result) in enumerate(zip(images, results, strict=True)):
        if isinstance(result, ErrorResult):
            raise _image_error(index, to_server_error(result.error)) if is_list else result.error
        assert isinstance(result, DetectResult)
        answers.append(_answer(result, body.prompt, image.size, seconds))
    return answers if is_list else answers[0]


def _select_checkpoint(model_id: str | None, service: Service) -> Checkpoint | None:
    """Return the checkpoint that a model name selects, None for the model of this server.

    Raises:
        ServerError: 400, there is no name; 404, this server does not have the model or the checkpoint.
    """
    if not model_id:
        raise ServerError(400, f"model_id must be in the path or in the body; use {service.name!r}", param="model_id")
    if parse_checkpoint(model_id, service.name) is not None:
        checkpoint = service.find_checkpoint(model_id)
        if checkpoint is None:
            raise missing_checkpoint(model_id, param="model_id")
        return checkpoint
    if not is_served(model_id, service):
        message = f"this server does not have the model {model_id!r:.200}; use {service.name!r}"
        raise ServerError(404, message, param="model_id")
    return None


async def _open_images(sent: Sequence[ImageBody], context: RequestContext) -> list[Any]:
    """Open the images of a request concurrently.

    Raises:
        ServerError: One of several images cannot be opened; the message has its index.
        ImageError: The only image cannot be opened.
    """
    for image in sent:
        _check_image(image)
    if len(sent) == 1:
        return [await context.open_image(sent[0].value)]
    opened = await asyncio.gather(*(context.open_image(image.value) for image in sent), return_exceptions=True)
    images = []
    for index, result in enumerate(opened):
        if isinstance(result, ClientDisconnected):
            raise result
        if isinstance(result, BaseException):
            raise _image_error(index, to_server_error(result)) from result
        images.append(result)
    return images


def _check_image(image: ImageBody) -> None:
    if image.type == "numpy":
        message = (
            "images of type 'numpy' are pickles, which can run code; send type 'base64', the default of inference-sdk"
        )
        raise ServerError(400, message, kind="invalid_image", param="image")
    if image.type not in IMAGE_TYPES:
        message = f"the type of an image must be {' or '.join(map(repr, IMAGE_TYPES))}, got {image.type!r:.100}"
        raise ServerError(400, message, kind="invalid_image", param="image")
    if not isinstance(image.value, str):
        message = f"the value of an image must be base64 text or a URL, got {type(image.value).__name__}"
        raise ServerError(400, message, kind="invalid_image", param="image")


def _image_error(index: int, error: ServerError) -> ServerError:
    message = f"image {index}: {error.message}"
    return ServerError(error.status, message, kind=error.kind, param=error.param, retry_after=error.retry_after)


def _answer(result: DetectResult, class_name: str, resolution_wh: tuple[int, int], seconds: float) -> dict[str, Any]:
    width, height = resolution_wh
    return {
        "inference_id": str(uuid.uuid4()),
        "time": seconds,
        "image": {"width": width, "height": height},
        "predictions": [_prediction(found, class_name, width, height) for found in result.objects],
        "truncated": result.truncated,
    }


def _prediction(found: DetectedObject, class_name: str, width: int, height: int) -> dict[str, Any]:
    left, right = (min(max(x, 0.0), 1.0) * width for x in (found.x_min, found.x_max))
    top, bottom = (min(max(y, 0.0), 1.0) * height for y in (found.y_min, found.y_max))
    return {
        "x": (left + right) / 2,
        "y": (top + bottom) / 2,
        "width": right - left,
        "height": bottom - top,
        "confidence": found.confidence,
        "class": class_name,
        "class_id": 0,
        "detection_id": str(uuid.uuid4()),
    }


@cache
def _process_uuid() -> str:
    return str(uuid.uuid4())
