"""fal's API: four apps of Moondream 2, with synchronous, streamed and queued requests.

fal's clients prepend `fal.run` and `queue.fal.run` to the path of an app. With `FAL_RUN_HOST=localhost:8000/run` and
`FAL_QUEUE_RUN_HOST=localhost:8000/queue`, they use this server. Synchronous requests also work without a prefix. The
bodies are in `wire.py`, and the routes of the queue are in `queue_routes.py`.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from moondream_cv.server.apis.fal import queue_routes
from moondream_cv.server.apis.fal.queue_routes import Seconds
from moondream_cv.server.apis.fal.wire import API as API
from moondream_cv.server.apis.fal.wire import (
    APP,
    HEADERS,
    REQUEST_ID,
    Arguments,
    CaptionArguments,
    DetectArguments,
    ObjectsOutput,
    PointArguments,
    PointsOutput,
    QueryArguments,
    TextOutput,
    fal_error_responses,
    open_stream,
    run,
    with_time_limit,
)
from moondream_cv.server.apis.sse import event_stream
from moondream_cv.server.logs import request_id
from moondream_cv.server.request_context import RequestContext, open_request_context


class Responder:
    """Answers a request body; holds the request context, the response headers and the time limit."""

    def __init__(
        self,
        response: Response,
        context: Annotated[RequestContext, Depends(open_request_context)],
        seconds: Seconds = None,
    ) -> None:
        self._response, self._context, self._seconds = response, context, seconds

    async def run(self, body: Arguments) -> dict[str, Any]:
        """Return the body of a synchronous response."""
        self._response.headers[REQUEST_ID] = request_id.get() or ""
        return await with_time_limit(self._seconds, run(body, self._context))

    async def stream(self, body: Arguments) -> Response:
        """Return a streamed response. The time limit of the client applies to the first piece."""
        answer = event_stream(await with_time_limit(self._seconds, open_stream(body, self._context)))
        answer.headers[REQUEST_ID] = request_id.get() or ""
        return answer


apps = APIRouter(
    prefix=APP, tags=["fal"], responses=fal_error_responses(400, 401, 403, 408, 413, 415, 422, 429, 503, 504)
)
Respond = Annotated[Responder, Depends()]
_STREAMED: dict[str, Any] = {
    "response_class": StreamingResponse,
    "responses": {
        200: {
            "description": "The reply so far, in each event; the last event has the complete reply or the error.",
            "headers": HEADERS,
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        }
    },
}


def _sync(model: type[BaseModel]) -> dict[str, Any]:
    """Return the decorator arguments of a synchronous route."""
    return {"response_model": model, "response_model_exclude_unset": True, "responses": {200: {"headers": HEADERS}}}


@apps.post("", summary="Caption", **_sync(TextOutput))
async def caption(body: CaptionArguments, responder: Respond) -> dict[str, Any]:
    """Return a caption of an image."""
    return await responder.run(body)


@apps.post("/stream", summary="Caption, streamed", **_STREAMED)
async def caption_stream(body: CaptionArguments, responder: Respond) -> Response:
    """Stream a caption of an image."""
    return await responder.stream(body)


@apps.post("/visual-query", summary="Answer a question", **_sync(TextOutput))
async def visual_query(body: QueryArguments, responder: Respond) -> dict[str, Any]:
    """Return the answer to a question about an image."""
    return await responder.run(body)


@apps.post("/visual-query/stream", summary="Answer a question, streamed", **_STREAMED)
async def visual_query_stream(body: QueryArguments, responder: Respond) -> Response:
    """Stream the answer to a question about an image."""
    return await responder.stream(body)


@apps.post("/object-detection", summary="Detect objects", **_sync(ObjectsOutput))
async def object_detection(body: DetectArguments, responder: Respond) -> dict[str, Any]:
    """Return the boxes of all objects that match a name."""
    return await responder.run(body)


@apps.post("/object-detection/stream", summary="Detect objects, streamed", **_STREAMED)
async def object_detection_stream(body: DetectArguments, responder: Respond) -> Response:
    """Stream the boxes of all objects that match a name."""
    return await responder.stream(body)


@apps.post("/point-object-detection", summary="Point at objects", **_sync(PointsOutput))
async def point_object_detection(body: PointArguments, responder: Respond) -> dict[str, Any]:
    """Return points on all objects that match a name."""
    return await responder.run(body)


@apps.post("/point-object-detection/stream", summary="Point at objects, streamed", **_STREAMED)
async def point_object_detection_stream(body: PointArguments, responder: Respond) -> Response:
    """Stream points on all objects that match a name."""
    return await responder.stream(body)


router = APIRouter()
router.include_router(apps)
router.include_router(apps, prefix="/run", include_in_schema=False)  # the same routes for FAL_RUN_HOST
router.include_router(queue_routes.router)
