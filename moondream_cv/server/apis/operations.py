"""Routes for operators: liveness, readiness, the list of models and metrics."""

from __future__ import annotations

import time
from typing import Any, Literal

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from moondream_cv import __version__
from moondream_cv.server.apis.moondream import ERRORS
from moondream_cv.server.apis.openai.schema import ModelList, openai_error_responses
from moondream_cv.server.checkpoints import list_checkpoints
from moondream_cv.server.service import Service, check_single_process, get_service

router = APIRouter(tags=["operations"])
_STARTED = int(time.time())


class Readiness(BaseModel):
    """Whether the server accepts requests to the model, and the number of requests in flight."""

    status: Literal["ready", "not ready", "shutting down"]
    requests: int


_READY: dict[int | str, dict[str, Any]] = {
    200: {"model": Readiness},
    503: {"model": Readiness, "description": "The model is loading or has failed, or the server is shutting down."},
}
_METRICS: dict[int | str, dict[str, Any]] = {
    200: {"description": "Prometheus text format.", "content": {"text/plain": {"schema": {"type": "string"}}}},
    401: ERRORS[401],
}


@router.head("/health", include_in_schema=False)
@router.get("/health", summary="Liveness")
async def health() -> dict[str, str]:
    """Return 200 while the process is running. `/ready` returns whether it accepts requests."""
    return {"status": "ok", "server": "moondream-cv", "version": __version__}


@router.head("/ready", include_in_schema=False)
@router.get("/ready", summary="Readiness", responses=_READY)
async def ready(http: Request) -> JSONResponse:
    """Return whether the server accepts requests to the model."""
    service = get_service(http)
    status = "ready" if service.ready else "shutting down" if service.draining else "not ready"
    return JSONResponse({"status": status, "requests": service.in_flight}, 200 if service.ready else 503)


@router.get("/v1/models", summary="Models", response_model=ModelList, responses={401: openai_error_responses(401)[401]})
def models(http: Request) -> dict[str, Any]:  # in a thread, because `has_scores` of a remote model can send a request
    """List the model and the saved checkpoints: `data` is for OpenAI clients, `models` for Moondream clients.

    `data` has the model and the 100 newest checkpoints, `models` the model only.
    """
    service = get_service(http)
    saved = list_checkpoints(service.finetunes) if service.has_checkpoints else []
    return {
        "object": "list",
        "data": [
            model_card(service.name),
            *(model_card(f"moondream2/{checkpoint.variant}", seconds) for checkpoint, seconds in saved),
        ],
        "models": [
            {
                "id": service.name,
                "name": service.name,
                "description": "Moondream 2, served by moondream-cv",
                "version": __version__,
                "skills": _skills(service),
                "has_scores": service.engine is not None and service.engine.has_scores,
            }
        ],
    }


def _skills(service: Service) -> list[str]:
    if service.engine is None:
        return []
    return sorted({*service.engine.skills, *(() if service.segmenter is None else ("segment",))})


def model_card(name: str, created: float = _STARTED) -> dict[str, Any]:
    """Return the description of a model for OpenAI clients.

    Args:
        name: Model name.
        created: Time in seconds since 1970.
    """
    return {"id": name, "object": "model", "created": int(created), "owned_by": "moondream-cv"}


@router.get(
    "/metrics",
    summary="Metrics for Prometheus",
    response_class=Response,
    responses=_METRICS,
    dependencies=[Depends(check_single_process)],
)
async def metrics(http: Request) -> Response:
    """Return the metrics of the server in the Prometheus text format."""
    return Response(get_service(http).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
