"""The dialect of Roboflow Inference, as far as Moondream 2 goes there: `/infer/lmm`, which detects, and `/info`.

As on Roboflow's server, the prompt is one class, and boxes are centre and size in pixels. Unlike there, confidences are
the model's own, nothing is rounded, and a list of images is answered with a list. Boxes are clipped to the image, since
what consumes them (crops, zones, `sv.Detections.from_inference`) takes that for granted; one that lies wholly outside
of it is kept, without an area. NumPy images, which travel as pickles, are refused, for unpickling runs what is in them.

Answering, questions and points are left to the other dialects, and so is everything else of Roboflow's API.
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
from moondream_cv.server.apis.base import Dialect
from moondream_cv.server.apis.error_responses import OF_A_SKILL, refusals
from moondream_cv.server.apis.moondream import is_served
from moondream_cv.server.errors import ClientLeft, ServerError, explain
from moondream_cv.server.service import Exchange, Service, open_exchange, service_of

MAX_IMAGES = 16  # of one request; all of them are in memory at a time
IMAGE_TYPES = ("base64", "url")

Open = Annotated[Exchange, Depends(open_exchange)]


def error_body(error: ServerError) -> dict[str, Any]:
    """An error in this dialect, of which inference-sdk shows the message."""
    return {"message": error.message, "error_type": error.kind}


DIALECT = Dialect("roboflow", ("/infer", "/info"), error_body, key_in_body=True)


class ImageBody(BaseModel):
    """An image.

    Attributes:
        type: "base64" or "url".
        value: Base64 text, with the head of a data URI or without; or an http(s) URL.
    """

    model_config = ConfigDict(strict=True)

    type: str = Field(json_schema_extra={"enum": list(IMAGE_TYPES)})
    value: Any = Field(json_schema_extra={"type": "string"})


class LmmBody(BaseModel):
    """A request. Further keys, such as `max_new_tokens` and `enable_thinking`, mean nothing to detection.

    Attributes:
        image: One image, or a list of them.
        prompt: The class to look for: one name.
        model_id: The served name, or any name of Moondream; may be in the path instead.
        api_key: Where it is not in the `Authorization` header.
    """

    model_config = ConfigDict(strict=True, protected_namespaces=())

    image: ImageBody | Annotated[list[ImageBody], Field(min_length=1, max_length=MAX_IMAGES)]
    prompt: str | None = None
    model_id: str | None = None
    api_key: str | None = None


class Resolution(BaseModel):
    """Of the image, in pixels."""

    width: int
    height: int


class Prediction(BaseModel):
    """A box in pixels: `x` and `y` are its centre."""

    x: float
    y: float
    width: float
    height: float
    confidence: float
    class_name: str = Field(alias="class")
    class_id: int
    detection_id: str


class LmmAnswer(BaseModel):
    """What one image has on it.

    Attributes:
        time: Seconds, of the whole request.
        truncated: There may be more: the list is as long as lists get here. Roboflow's server does not have this key.
    """

    inference_id: str
    time: float
    image: Resolution
    predictions: list[Prediction]
    truncated: bool


class Info(BaseModel):
    """A server.

    Attributes:
        uuid: Of this process.
        has_scores: Whether confidences are real; otherwise they are 1.0.
    """

    name: str
    version: str
    uuid: str
    has_scores: bool


class Refused(BaseModel):
    message: str
    error_type: str


router = APIRouter(tags=["roboflow"])


@router.get("/info", summary="What this server is")
def info(http: HttpRequest) -> Info:
    """Say what this server is. Clients send no key here, so it asks for none."""
    model = service_of(http).model  # whose has_scores may ask another server: not on the event loop
    scores = model is not None and model.has_scores
    return Info(name="moondream-cv", version=__version__, uuid=_own_uuid(), has_scores=scores)


_LMM: dict[str, Any] = {
    "summary": "Detect",
    "response_model": LmmAnswer | list[LmmAnswer],
    "responses": refusals(Refused, *OF_A_SKILL),
}


@router.post("/infer/lmm", **_LMM)
async def infer_lmm(body: LmmBody, exchange: Open) -> Any:
    """Find boxes of everything that the prompt means, on one image or on each of a list.

    An image of a list that cannot be read makes the whole request fail, and the message says which one it is.
    """
    return await _infer(body, body.model_id, exchange)


@router.post("/infer/lmm/{model_id:path}", **_LMM)
async def infer_lmm_of(model_id: str, body: LmmBody, exchange: Open) -> Any:
    """The same, with the model's name in the path."""
    if body.model_id and body.model_id != model_id:
        raise ServerError(400, f"the path says model {model_id!r:.200}, and the body {body.model_id!r:.200}; send one")
    return await _infer(body, model_id, exchange)


async def _infer(body: LmmBody, model_id: str | None, exchange: Exchange) -> Any:
    started = time.perf_counter()
    _check_model(model_id, exchange.service)
    if body.prompt is None or not body.prompt.strip():
        raise ServerError(400, f"prompt must name the class to look for, not {body.prompt!r:.100}", param="prompt")
    several = isinstance(body.image, list)
    images = await _pictures(body.image if isinstance(body.image, list) else [body.image], exchange)
    results = await exchange.results([Detect(image, body.prompt) for image in images])
    seconds = time.perf_counter() - started
    answers = []
    for index, (image, result) in enumerate(zip(images, results, strict=True)):
        if isinstance(result, ErrorResult):
            raise _of_image(index, explain(result.error)) if several else result.error
        assert isinstance(result, DetectResult)
        answers.append(_answer(result, body.prompt, image.size, seconds))
    return answers if several else answers[0]


def _check_model(model_id: str | None, service: Service) -> None:
    if not model_id:
        raise ServerError(
            400, f"model_id must be given, in the path or in the body: {service.name!r}", param="model_id"
        )
    if not is_served(model_id, service):
        said = f"this server does not have the model {model_id!r:.200}; ask for {service.name!r}"
        raise ServerError(404, said, param="model_id")


async def _pictures(sent: Sequence[ImageBody], exchange: Exchange) -> list[Any]:
    """Open the images of a request together.

    Raises:
        ServerError: One of several cannot be opened; the message says which.
        ImageError: The only one cannot be opened.
    """
    for image in sent:
        _check_image(image)
    if len(sent) == 1:
        return [await exchange.picture(sent[0].value)]
    opened = await asyncio.gather(*(exchange.picture(image.value) for image in sent), return_exceptions=True)
    pictures = []
    for index, picture in enumerate(opened):
        if isinstance(picture, ClientLeft):
            raise picture
        if isinstance(picture, BaseException):
            raise _of_image(index, explain(picture)) from picture
        pictures.append(picture)
    return pictures


def _check_image(image: ImageBody) -> None:
    if image.type == "numpy":
        said = (
            "images of the type 'numpy' are pickles, which can run code; send the type 'base64', as inference-sdk does"
        )
        raise ServerError(400, said, kind="invalid_image", param="image")
    if image.type not in IMAGE_TYPES:
        said = f"an image's type must be {' or '.join(map(repr, IMAGE_TYPES))}, not {image.type!r:.100}"
        raise ServerError(400, said, kind="invalid_image", param="image")
    if not isinstance(image.value, str):
        said = f"an image's value must be base64 text or a URL, not {type(image.value).__name__}"
        raise ServerError(400, said, kind="invalid_image", param="image")


def _of_image(index: int, error: ServerError) -> ServerError:
    said = f"image {index}: {error.message}"
    return ServerError(error.status, said, kind=error.kind, param=error.param, retry_after=error.retry_after)


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
def _own_uuid() -> str:
    return str(uuid.uuid4())
