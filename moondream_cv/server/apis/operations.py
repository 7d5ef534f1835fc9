"""What operators ask a server: whether it lives, whether it can answer, which model it has, what it has counted."""

from __future__ import annotations

import time
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from moondream_cv import __version__
from moondream_cv.server.apis.moondream import ERRORS
from moondream_cv.server.apis.openai.schema import ModelList, refusals
from moondream_cv.server.service import Service, service_of

router = APIRouter(tags=["operations"])
_STARTED = int(time.time())


class Readiness(BaseModel):
    """Whether requests to the model will be answered, and how many are being answered."""

    status: Literal["ready", "not ready", "shutting down"]
    requests: int


_READY: dict[int | str, dict[str, Any]] = {
    200: {"model": Readiness},
    503: {"model": Readiness, "description": "Loading, shutting down or broken."},
}
_METRICS: dict[int | str, dict[str, Any]] = {
    200: {"description": "Prometheus's text format.", "content": {"text/plain": {"schema": {"type": "string"}}}},
    401: ERRORS[401],
}


@router.head("/health", include_in_schema=False)
@router.get("/health", summary="Liveness")
async def health() -> dict[str, str]:
    """Answer as long as the process lives; `/ready` says whether it can answer requests."""
    return {"status": "ok", "server": "moondream-cv", "version": __version__}


@router.head("/ready", include_in_schema=False)
@router.get("/ready", summary="Readiness", responses=_READY)
async def ready(http: Request) -> JSONResponse:
    """Say whether requests to the model will be answered now."""
    service = service_of(http)
    status = "ready" if service.ready else "shutting down" if service.draining else "not ready"
    return JSONResponse({"status": status, "requests": service.taken}, 200 if service.ready else 503)


@router.get("/v1/models", summary="Models", response_model=ModelList, responses={401: refusals(401)[401]})
def models(http: Request) -> dict[str, Any]:  # in a thread: a remote model may have to ask for `has_scores`
    """List the model: `data` for OpenAI's clients, `models` for Moondream's."""
    service = service_of(http)
    return {
        "object": "list",
        "data": [{"id": service.name, "object": "model", "created": _STARTED, "owned_by": "moondream-cv"}],
        "models": [
            {
                "id": service.name,
                "name": service.name,
                "description": "Moondream 2, served by moondream-cv",
                "version": __version__,
                "skills": _skills(service),
                "has_scores": service.model is not None and service.model.has_scores,
            }
        ],
    }


@router.get("/metrics", summary="Metrics for Prometheus", response_class=Response, responses=_METRICS)
async def metrics(http: Request) -> Response:
    """Everything that the server has counted, in Prometheus's text format."""
    return Response(service_of(http).meters.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _skills(service: Service) -> list[str]:
    return [] if service.model is None else sorted(service.model.skills)
