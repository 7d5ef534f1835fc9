"""fal's dialect: four apps of Moondream 2, answered at once, streamed, or through a queue.

fal's clients put `fal.run` and `queue.fal.run` in front of the path of an app. Told `FAL_RUN_HOST=localhost:8000/run`
and `FAL_QUEUE_RUN_HOST=localhost:8000/queue`, they come here; without a prefix, the apps are answered at once, too.
What bodies look like is in `wire`, the queue in `queue_routes`.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from moondream_cv.server.apis.fal import queue_routes
from moondream_cv.server.apis.fal.queue_routes import Seconds
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
    open_stream,
    refusals,
    run,
    within,
)
from moondream_cv.server.apis.fal.wire import DIALECT as DIALECT
from moondream_cv.server.apis.sse import event_stream
from moondream_cv.server.logs import request_id
from moondream_cv.server.service import Exchange, open_exchange


class Answering:
    """An exchange, and what all requests have beside their bodies."""

    def __init__(
        self, response: Response, exchange: Annotated[Exchange, Depends(open_exchange)], seconds: Seconds = None
    ) -> None:
        self._response, self._exchange, self._seconds = response, exchange, seconds

    async def run(self, body: Arguments) -> dict[str, Any]:
        """Answer a body at once."""
        self._response.headers[REQUEST_ID] = request_id.get() or ""
        return await within(self._seconds, run(body, self._exchange))

    async def stream(self, body: Arguments) -> Response:
        """Answer a body bit by bit; the client's time limit is one for the first of them."""
        answer = event_stream(await within(self._seconds, open_stream(body, self._exchange)))
        answer.headers[REQUEST_ID] = request_id.get() or ""
        return answer


apps = APIRouter(prefix=APP, tags=["fal"], responses=refusals(400, 401, 403, 408, 413, 415, 422, 429, 503, 504))
Opened = Annotated[Answering, Depends()]
_STREAMED: dict[str, Any] = {
    "response_class": StreamingResponse,
    "responses": {
        200: {
            "description": "What there is so far, again and again; the last event has all of it, or the error.",
            "headers": HEADERS,
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        }
    },
}


def _whole(model: type[BaseModel]) -> dict[str, Any]:
    """What the decorator of a route that answers at once says about the answer."""
    return {"response_model": model, "response_model_exclude_unset": True, "responses": {200: {"headers": HEADERS}}}


@apps.post("", summary="Caption", **_whole(TextOutput))
async def caption(body: CaptionArguments, answering: Opened) -> dict[str, Any]:
    return await answering.run(body)


@apps.post("/stream", summary="Caption, streamed", **_STREAMED)
async def caption_stream(body: CaptionArguments, answering: Opened) -> Response:
    return await answering.stream(body)


@apps.post("/visual-query", summary="Answer a question", **_whole(TextOutput))
async def visual_query(body: QueryArguments, answering: Opened) -> dict[str, Any]:
    return await answering.run(body)


@apps.post("/visual-query/stream", summary="Answer a question, streamed", **_STREAMED)
async def visual_query_stream(body: QueryArguments, answering: Opened) -> Response:
    return await answering.stream(body)


@apps.post("/object-detection", summary="Detect objects", **_whole(ObjectsOutput))
async def object_detection(body: DetectArguments, answering: Opened) -> dict[str, Any]:
    return await answering.run(body)


@apps.post("/object-detection/stream", summary="Detect objects, streamed", **_STREAMED)
async def object_detection_stream(body: DetectArguments, answering: Opened) -> Response:
    return await answering.stream(body)


@apps.post("/point-object-detection", summary="Point at objects", **_whole(PointsOutput))
async def point_object_detection(body: PointArguments, answering: Opened) -> dict[str, Any]:
    return await answering.run(body)


@apps.post("/point-object-detection/stream", summary="Point at objects, streamed", **_STREAMED)
async def point_object_detection_stream(body: PointArguments, answering: Opened) -> Response:
    return await answering.stream(body)


router = APIRouter()
router.include_router(apps)
router.include_router(apps, prefix="/run", include_in_schema=False)  # the same again
router.include_router(queue_routes.router)
