"""The tuning API, for `md.ft(endpoint="http://localhost:2020/v1/tuning")` of Moondream's Python client.

Training and sampling run in the engine, between its decode steps, so that rollouts share the batch of all requests.
Errors have the format of Moondream's API. Train steps are in `train_steps.py`.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

from moondream_cv.server.apis.checkpoint_downloads import download_path, torch_file_response
from moondream_cv.server.apis.error_responses import SKILL_ERRORS, error_responses
from moondream_cv.server.apis.moondream import Context, ErrorAnswer
from moondream_cv.server.apis.signed_urls import EXPIRES_IN, get_url_signer
from moondream_cv.server.apis.train_steps import AcknowledgedResponse, TrainStepBody, TrainSteps
from moondream_cv.server.apis.tuning_requests import (
    check_local_model,
    convert_request,
    training_image,
    tuning_error,
    tuning_operation,
)
from moondream_cv.server.checkpoints import Checkpoint
from moondream_cv.server.request_context import RequestContext
from moondream_cv.server.service import check_single_process, get_service, missing_checkpoint

LARGEST_STEP = 2**53 - 1

Step = Annotated[int, Path(ge=0, le=LARGEST_STEP)]
Limit = Annotated[int, Query(description="Maximum number of entries, 1 to 100.")]
Cursor = Annotated[str | None, Query(description="`next_cursor` of the previous page.")]


class StrictBody(BaseModel):
    """A body without conversions between types. Unknown fields are ignored."""

    model_config = ConfigDict(strict=True)


class CreateBody(StrictBody):
    """A new finetune, or an existing one with the same name and rank.

    Attributes:
        name: 1 to 64 letters, digits, ".", "-" and "_".
        rank: 8, 16, 24 or 32.
    """

    name: str
    rank: int


class RolloutsBody(StrictBody):
    """A request for rollouts.

    Attributes:
        finetune_id: ID of the finetune.
        request: `skill` ("query", "point" or "detect"), `image_url`, `question` or `object`, `spatial_refs`,
            `reasoning` and `settings` (`temperature`, `top_p`, `max_tokens` or `max_objects`).
        num_rollouts: Number of replies, 1 to 16.
        ground_truth: `points` or `boxes` as fractions, for rewards.
    """

    finetune_id: str
    request: dict[str, Any]
    num_rollouts: int = 1
    ground_truth: dict[str, Any] | None = None


class MetricsBody(StrictBody):
    """Metrics of a step: finite numbers by name."""

    step: int
    metrics: dict[str, float]


class FinetuneInfo(BaseModel):
    """A finetune. `resumable` is false after its latest checkpoint was deleted."""

    finetune_id: str
    name: str
    rank: int
    model: str
    seed: int
    step: int
    resumable: bool
    created_at_ms: int
    updated_at_ms: int


class FinetuneAnswer(BaseModel):
    """One finetune."""

    finetune: FinetuneInfo


class FinetunePage(BaseModel):
    """A page of the finetunes, newest first."""

    finetunes: list[FinetuneInfo]
    next_cursor: str | None
    has_more: bool


class RolloutInfo(BaseModel):
    """A sampled reply with the choices behind it. Send it back unchanged in a train step."""

    skill: str
    finish_reason: str
    output: dict[str, Any]
    answer_tokens: list[int]
    thinking_tokens: list[int]
    has_answer_separator: bool
    coords: list[float]
    sizes: list[list[float]]
    log_probs: list[float]
    signature: str


class RolloutsAnswer(BaseModel):
    """The request, as train steps accept it, its rollouts, and their rewards if there is ground truth."""

    request: dict[str, Any]
    rollouts: list[RolloutInfo]
    rewards: list[float] | None


class TrainStepAnswer(BaseModel):
    """Statistics of a train step. If the gradient is zero or not finite, `applied` is false."""

    step: int
    applied: bool
    kl: float | None
    router_kl: float | None
    grad_norm: float | None
    reward_mean: float | None
    reward_std: float | None
    sft_loss: float | None


class MetricsAnswer(BaseModel):
    """The number of stored metrics."""

    ok: bool
    step: int
    logged_count: int


class CheckpointInfo(BaseModel):
    """A saved checkpoint."""

    finetune_id: str
    step: int
    created_at_ms: int


class CheckpointAnswer(BaseModel):
    """The saved checkpoint."""

    ok: bool
    checkpoint: CheckpointInfo


class CheckpointPage(BaseModel):
    """A page of the saved checkpoints, newest first."""

    checkpoints: list[CheckpointInfo]
    next_cursor: str | None
    has_more: bool


class Deleted(BaseModel):
    """The finetune or checkpoint was deleted."""

    ok: bool


class Download(BaseModel):
    """A URL that needs no API key, and the seconds until it expires."""

    url: str
    expires_in: int


_DESCRIPTIONS: dict[int | str, str] = {
    404: "The finetune or the checkpoint does not exist.",
    409: "The finetune with this name has another rank or another base model.",
    410: "The checkpoint was deleted, or the latest one was, so that training cannot resume.",
    423: "Another process uses the folder of the finetunes.",
    501: "The model of this server is remote.",
    507: "The disk is full or damaged; nothing was changed.",
}
router = APIRouter(
    prefix="/v1/tuning",
    tags=["tuning"],
    dependencies=[Depends(check_single_process), Depends(check_local_model)],
    responses=error_responses(ErrorAnswer, *SKILL_ERRORS, 409, 410, 423, 501, 507, descriptions=_DESCRIPTIONS),
)


@router.post("/finetunes", summary="Create a finetune", response_model=FinetuneInfo)
async def create(body: CreateBody, context: Context) -> Any:
    """Create a finetune, or return the existing one with the same name and rank."""
    return await _run(context, "create", name=body.name, rank=body.rank)


@router.get("/finetunes", summary="List the finetunes", response_model=FinetunePage)
async def list_finetunes(context: Context, limit: Limit = 50, cursor: Cursor = None) -> Any:
    """Return a page of the finetunes, newest first."""
    return await _run(context, "list_finetunes", limit=limit, cursor=cursor)


@router.get("/finetunes/{finetune_id}", summary="Get a finetune", response_model=FinetuneAnswer)
async def get(finetune_id: str, context: Context) -> Any:
    """Return a finetune."""
    return await _run(context, "get", finetune_id=finetune_id)


@router.delete("/finetunes/{finetune_id}", summary="Delete a finetune", response_model=Deleted)
async def delete(finetune_id: str, context: Context) -> Any:
    """Delete a finetune with all its checkpoints."""
    return await _run(context, "delete", finetune_id=finetune_id)


@router.post("/rollouts", summary="Sample replies", response_model=RolloutsAnswer)
async def rollouts(body: RolloutsBody, context: Context) -> JSONResponse:
    """Sample replies to a request under the current adapter."""
    request, url = convert_request(body.request)
    image = {} if url is None else {"image": training_image(await context.open_image(url))}
    reply = await _run(
        context,
        "rollouts",
        finetune_id=body.finetune_id,
        request={**request, **image},
        num_rollouts=body.num_rollouts,
        ground_truth=body.ground_truth,
    )
    echoed = {**reply["request"], **({} if url is None else {"image_url": url})}
    return JSONResponse({**reply, "request": echoed})  # without conversion, which could change the numbers


@router.post(
    "/train_step",
    summary="Train once",
    response_model=TrainStepAnswer,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": TrainStepBody.model_json_schema()}},
        }
    },
)
async def train_step(http: HttpRequest, context: Context) -> Response:
    """Train the adapter on groups once.

    The step has no time limit, and is applied once if the client retries it.
    """
    steps = _train_steps(http)
    pending = steps.join(await http.body())
    try:
        reply = await context.shared(pending.task)
    except BaseException:
        steps.leave(pending)
        raise
    return AcknowledgedResponse(reply, lambda: steps.acknowledge(pending), lambda: steps.leave(pending))


@router.post("/finetunes/{finetune_id}/metrics", summary="Log metrics", response_model=MetricsAnswer)
async def log_metrics(finetune_id: str, body: MetricsBody, context: Context) -> Any:
    """Store metrics of a step."""
    return await _run(context, "log_metrics", finetune_id=finetune_id, step=body.step, metrics=body.metrics)


@router.post("/finetunes/{finetune_id}/checkpoints/save", summary="Save a checkpoint", response_model=CheckpointAnswer)
async def save_checkpoint(finetune_id: str, context: Context) -> Any:
    """Save the adapter of the current step, so that it can serve inference."""
    return await _run(context, "save_checkpoint", finetune_id=finetune_id)


@router.get("/finetunes/{finetune_id}/checkpoints", summary="List the checkpoints", response_model=CheckpointPage)
async def list_checkpoints(finetune_id: str, context: Context, limit: Limit = 50, cursor: Cursor = None) -> Any:
    """Return a page of the saved checkpoints, newest first."""
    return await _run(context, "list_checkpoints", finetune_id=finetune_id, limit=limit, cursor=cursor)


@router.delete("/finetunes/{finetune_id}/checkpoints/{step}", summary="Delete a checkpoint", response_model=Deleted)
async def delete_checkpoint(finetune_id: str, step: Step, context: Context) -> Any:
    """Delete a checkpoint. Without its latest checkpoint, a finetune cannot be trained further."""
    return await _run(context, "delete_checkpoint", finetune_id=finetune_id, step=step)


@router.get(
    "/finetunes/{finetune_id}/checkpoints/{step}/download", summary="Get a download URL", response_model=Download
)
async def download(finetune_id: str, step: Step, http: HttpRequest, context: Context) -> Any:
    """Return a URL of the checkpoint as a file of `torch.save` with the key `lora_state_dict`."""
    await _run(context, "check_checkpoint", finetune_id=finetune_id, step=step)
    url = get_url_signer(http).url(str(http.base_url), download_path(Checkpoint(finetune_id, step)))
    return {"url": url, "expires_in": EXPIRES_IN}


@router.get(
    "/downloads/{finetune_id}/{step}",
    summary="Download a checkpoint",
    response_class=StreamingResponse,
    responses={200: {"description": "The file.", "content": {"application/octet-stream": {"schema": {}}}}},
)
async def download_file(
    finetune_id: str, step: Step, http: HttpRequest, expires: int, signature: str
) -> StreamingResponse:
    """Return the file of a checkpoint. The URL is signed, and no API key is required."""
    checkpoint = Checkpoint(finetune_id, step)
    get_url_signer(http).check(download_path(checkpoint), expires, signature)
    try:
        file = checkpoint.file(get_service(http).finetunes)
        return await torch_file_response(file, f"{finetune_id}-{step}.pt")
    except FileNotFoundError:
        raise missing_checkpoint(checkpoint.variant) from None


async def _run(context: RequestContext, method: str, **arguments: Any) -> Any:
    """Run a method of the tuning API in the engine."""
    service = context.service
    try:
        return await context.operation(tuning_operation(service, method, arguments))
    except Exception as error:
        raise tuning_error(error, service.finetunes) from None


def _train_steps(http: HttpRequest) -> TrainSteps:
    state = http.app.state
    if not hasattr(state, "train_steps"):
        state.train_steps = TrainSteps(get_service(http))
    steps: TrainSteps = state.train_steps
    return steps
