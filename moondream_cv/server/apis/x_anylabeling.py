"""X-AnyLabeling's remote-server protocol, under the prefix `/x-anylabeling`.

The prefix is part of the URL of the server in X-AnyLabeling, because `/v1/models` has another format there than in
OpenAI's API. Errors have error statuses: X-AnyLabeling would take an error with status 200 for an image without objects
and remove the shapes of the image.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from pydantic import BaseModel, ConfigDict, Field

from moondream_cv.integrations.x_anylabeling import build_prediction, build_requests, describe_model
from moondream_cv.requests import ErrorResult
from moondream_cv.server.apis.base import ApiSpec
from moondream_cv.server.apis.error_responses import SKILL_ERRORS, error_responses
from moondream_cv.server.apis.moondream import Body, select_checkpoint
from moondream_cv.server.apis.request_settings import with_checkpoint
from moondream_cv.server.checkpoints import list_checkpoints
from moondream_cv.server.errors import ServerError
from moondream_cv.server.request_context import RequestContext, open_request_context
from moondream_cv.server.service import get_service

PREFIX = "/x-anylabeling"
_CODES = {401: "UNAUTHORIZED", 404: "MODEL_NOT_FOUND", 429: "QUEUE_FULL"}

Context = Annotated[RequestContext, Depends(open_request_context)]


def error_body(error: ServerError) -> dict[str, Any]:
    """Return the JSON body of an error in this API."""
    code = _CODES.get(error.status, error.kind.upper())
    return {"success": False, "error": {"code": code, "message": error.message}}


API = ApiSpec("x-anylabeling", (PREFIX,), error_body)


class PredictParams(BaseModel):
    """Parameters of a prediction. Others, such as `iou_threshold` and `marks`, do not apply to Moondream 2.

    Attributes:
        current_task: "detect", "point", "caption" or "query"; "detect" by default.
        text_prompt: Class names, separated by commas or periods, or the question.
        conf_threshold: Minimum confidence, 0..1.
    """

    model_config = ConfigDict(strict=True)

    current_task: str | None = None
    text_prompt: str | None = None
    conf_threshold: float = Field(default=0.0, ge=0.0, le=1.0)


class PredictBody(BaseModel):
    """A request for the shapes or the description of an image.

    Attributes:
        model: Model ID, as the list of models has it.
        image: A data URI, base64 text, or an http(s) URL.
    """

    model_config = ConfigDict(strict=True)

    model: str
    image: str
    params: PredictParams = PredictParams()


class Shape(BaseModel):
    """A shape in pixels.

    Attributes:
        label: Class name.
        shape_type: "rectangle" with the four corners, clockwise from the top left, or "point".
        points: Points (x, y).
        score: Confidence, 0..1.
    """

    label: str
    shape_type: str
    points: list[tuple[float, float]]
    score: float
    group_id: int | None
    attributes: dict[str, str]
    description: str | None
    difficult: bool
    direction: float
    flags: dict[str, bool] | None
    kie_linking: list[list[int]]


class ImageLabels(BaseModel):
    """The shapes or the description of an image.

    Attributes:
        shapes: Shapes, ordered by class and in the order of the model.
        description: The caption or the answer; empty for other tasks.
        replace: Whether the shapes replace those of the image; null: people choose it.
    """

    shapes: list[Shape]
    description: str
    replace: bool | None


class PredictAnswer(BaseModel):
    """A successful prediction."""

    success: bool
    data: ImageLabels


class TaskInfo(BaseModel):
    """A task and the controls that X-AnyLabeling shows for it."""

    id: str
    name: str
    description: str
    batch_processing_mode: str
    active_widgets: dict[str, dict[str, str]]


class WidgetValue(BaseModel):
    """The initial value of a control."""

    name: str
    value: float | bool


class ModelInfo(BaseModel):
    """A model and its tasks."""

    display_name: str
    batch_processing_mode: str
    available_tasks: list[TaskInfo]
    widgets: list[WidgetValue]


class ModelsAnswer(BaseModel):
    """The models by ID."""

    success: bool
    data: dict[str, ModelInfo]


class PredictErrorDetail(BaseModel):
    """An error."""

    code: str
    message: str


class PredictError(BaseModel):
    """An error response."""

    success: bool
    error: PredictErrorDetail


router = APIRouter(prefix=PREFIX, tags=["x-anylabeling"])


@router.get("/v1/models", summary="Models", responses=error_responses(PredictError, 401, 403, 503))
def models(http: HttpRequest) -> ModelsAnswer:  # in a thread, because `has_scores` of a remote model can send a request
    """List the model and the 100 newest checkpoints, with the tasks of each."""
    service = get_service(http)
    service.check_ready()
    engine = service.engine
    assert engine is not None
    names = [service.name]
    if service.has_checkpoints:
        names += [f"moondream2/{checkpoint.variant}" for checkpoint, _ in list_checkpoints(service.finetunes)]
    data = {name: ModelInfo(**describe_model(name, engine.skills, engine.has_scores)) for name in names}
    return ModelsAnswer(success=True, data=data)


@router.post("/v1/predict", summary="Label an image", responses=error_responses(PredictError, *SKILL_ERRORS))
async def predict(body: PredictBody, context: Context) -> PredictAnswer:
    """Return the boxes or points of all objects of some classes, a caption, or the answer to a question."""
    checkpoint = select_checkpoint(Body(model=body.model), context.service)
    image = await context.open_image(body.image)
    requests = build_requests(body.params.current_task, body.params.text_prompt, image)
    results = await context.results([with_checkpoint(request, checkpoint) for request in requests])
    for result in results:
        if isinstance(result, ErrorResult):
            raise result.error
    prediction = build_prediction(requests, results, image.size, body.params.conf_threshold)
    return PredictAnswer(success=True, data=ImageLabels(**prediction))
