"""The routes of fal's queue: submit, status, result, cancel.

Clients that are told `FAL_QUEUE_RUN_HOST=localhost:8000/queue` find them under `/queue`. Webhooks are refused: the
server would have to call whatever address a client names.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query
from fastapi import Request as HttpRequest
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response, StreamingResponse

from moondream_cv.server.apis.fal.queue import CANCELLED, QueuedRequest, RequestQueue, State
from moondream_cv.server.apis.fal.wire import (
    APP,
    DIALECT,
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
    refusals,
    run,
    within,
)
from moondream_cv.server.apis.sse import event, event_stream
from moondream_cv.server.errors import ServerError
from moondream_cv.server.service import service_of

router = APIRouter(prefix=f"/queue{APP}", tags=["fal"])
Seconds = Annotated[float | None, Header(alias="X-Fal-Request-Timeout", gt=0, allow_inf_nan=False)]


class QueueTicket(BaseModel):
    """A request of the queue, and the addresses at which to go on."""

    request_id: str
    response_url: str
    status_url: str
    cancel_url: str


class QueueAccepted(QueueTicket):
    status: State
    queue_position: int


class QueueLog(BaseModel):
    """`timestamp` is ISO 8601, in UTC."""

    message: str
    level: str
    source: str
    timestamp: str


class QueueMetrics(BaseModel):
    """`inference_time` is in seconds, from submission to the end."""

    inference_time: float


class QueueStatus(QueueTicket):
    """How far a request is: `logs` where they were asked for, `metrics` at the end, `error` where it failed."""

    status: State
    logs: list[QueueLog] | None
    queue_position: int | None = None
    metrics: QueueMetrics | None = None
    error: str | None = None
    error_type: str | None = None


class QueueCancellation(QueueTicket):
    status: Literal["CANCELLATION_REQUESTED", "ALREADY_COMPLETED"]


_SUBMIT: dict[str, Any] = {
    "responses": {
        200: {"model": QueueAccepted, "headers": HEADERS},
        **refusals(400, 401, 403, 408, 413, 415, 422, 429, 503),
    }
}
_STATUS: dict[int | str, dict[str, Any]] = {
    200: {"model": QueueStatus, "headers": HEADERS, "description": "The request has ended."},
    202: {"model": QueueStatus, "headers": HEADERS, "description": "The request has not ended yet."},
    **refusals(401, 404, 422),
}
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A status whenever it changes.",
        "headers": HEADERS,
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    },
    **refusals(401, 404, 422),
}
_RESULT: dict[int | str, dict[str, Any]] = {
    200: {"model": TextOutput | ObjectsOutput | PointsOutput, "headers": HEADERS},
    **refusals(400, 401, 404, 503, 504, "default"),
}
_CANCEL: dict[int | str, dict[str, Any]] = {
    202: {"model": QueueCancellation, "headers": HEADERS, "description": "The request ends without an answer."},
    400: {"model": QueueCancellation, "headers": HEADERS, "description": "The request had ended before."},
    **refusals(401, 404, "4XX"),
}


def queue_of(http: HttpRequest) -> RequestQueue:
    """The queue of the app that a request came to, made when it is first needed."""
    state = http.app.state
    if not hasattr(state, "fal_queue"):
        state.fal_queue = RequestQueue(service_of(http))
    queue: RequestQueue = state.fal_queue
    return queue


class Submission:
    """What all submissions have beside their bodies."""

    def __init__(
        self,
        http: HttpRequest,
        seconds: Seconds = None,
        webhook: Annotated[str | None, Query(alias="fal_webhook")] = None,
    ) -> None:
        if webhook is not None:
            raise ServerError(
                400,
                "this server calls no webhooks; leave fal_webhook out and ask for the status",
                kind="unsupported_parameter",
                param="fal_webhook",
            )
        self._http, self._seconds = http, seconds

    def put(self, body: Arguments, what: str) -> JSONResponse:
        """Submit a body."""
        queue, seconds = queue_of(self._http), self._seconds  # the request itself, with its bytes, is not kept
        request = queue.submit(lambda exchange, started: within(seconds, run(body, exchange, started)), what)
        return _answer(request, {"status": request.state, "queue_position": queue.position(request)}, self._http)


def _found(request_id: str, http: HttpRequest) -> QueuedRequest:
    return queue_of(http).find(request_id)


Submitted = Annotated[Submission, Depends()]
Found = Annotated[QueuedRequest, Depends(_found)]


@router.post("", summary="Submit a caption", **_SUBMIT)
async def submit_caption(body: CaptionArguments, submission: Submitted) -> Response:
    return submission.put(body, "caption")


@router.post("/visual-query", summary="Submit a question", **_SUBMIT)
async def submit_query(body: QueryArguments, submission: Submitted) -> Response:
    return submission.put(body, "visual query")


@router.post("/object-detection", summary="Submit a detection", **_SUBMIT)
async def submit_detection(body: DetectArguments, submission: Submitted) -> Response:
    return submission.put(body, "object detection")


@router.post("/point-object-detection", summary="Submit a search for points", **_SUBMIT)
async def submit_points(body: PointArguments, submission: Submitted) -> Response:
    return submission.put(body, "point detection")


@router.get("/requests/{request_id}/status", summary="State of a request", responses=_STATUS)
async def status(request: Found, http: HttpRequest, logs: bool = False) -> Response:
    """Say how far a request is. 202 until it has ended, 200 then, with `error` where it failed."""
    done = request.state == "COMPLETED"
    return _answer(request, _state(request, queue_of(http), request.logs if logs else None), http, 200 if done else 202)


@router.get(
    "/requests/{request_id}/status/stream",
    summary="States of a request, as they change",
    response_class=StreamingResponse,
    responses=_STREAM,
)
async def status_stream(request: Found, http: HttpRequest, logs: bool = False) -> Response:
    """Send the state of a request whenever it changes, with the log lines that are new, up to its end."""
    answer = event_stream(_states(request, queue_of(http), logs))
    answer.headers[REQUEST_ID] = request.id
    return answer


@router.get("/requests/{request_id}", summary="Result of a request", responses=_RESULT)
async def result(request: Found, http: HttpRequest) -> Response:
    """Give the answer of a request that has ended, or the error that ended it."""
    error = request.error
    if request.state != "COMPLETED":
        error = ServerError(400, f"the request is still in progress: {request.state}", kind="request_in_progress")
    if error is not None:
        failed = DIALECT.answer(error)
        failed.headers[REQUEST_ID] = request.id
        return failed
    return JSONResponse(request.result, headers={REQUEST_ID: request.id})


@router.put("/requests/{request_id}/cancel", summary="Cancel a request", status_code=202, responses=_CANCEL)
async def cancel(request: Found, http: HttpRequest) -> Response:
    """End a request. One that has ended is answered with 400."""
    if request.state != "COMPLETED":
        await queue_of(http).cancel(request)
        if request.error is not None and request.error.kind == CANCELLED:
            return _answer(request, {"status": "CANCELLATION_REQUESTED"}, http, 202)
    return _answer(request, {"status": "ALREADY_COMPLETED"}, http, 400)


def _state(request: QueuedRequest, queue: RequestQueue, logs: list[dict[str, str]] | None) -> dict[str, Any]:
    found: dict[str, Any] = {"status": request.state, "logs": logs}
    if request.state == "IN_QUEUE":
        found["queue_position"] = queue.position(request)
    if request.state == "COMPLETED":
        found["metrics"] = {"inference_time": request.seconds}
        if request.error is not None:
            found |= {"error": request.error.message, "error_type": request.error.kind}
    return found


async def _states(request: QueuedRequest, queue: RequestQueue, with_logs: bool) -> AsyncIterator[bytes]:
    seen = 0
    async for _ in request.changes():
        new, seen = request.logs[seen:], len(request.logs)
        yield event({**_state(request, queue, new if with_logs else None), "request_id": request.id})


def _answer(request: QueuedRequest, content: dict[str, Any], http: HttpRequest, status: int = 200) -> JSONResponse:
    """Something about a request, with the addresses at which the client goes on, as it sees this server."""
    here = f"{str(http.base_url).rstrip('/')}/queue{APP}/requests/{request.id}"
    urls = {"response_url": here, "status_url": f"{here}/status", "cancel_url": f"{here}/cancel"}
    return JSONResponse({**content, "request_id": request.id, **urls}, status, {REQUEST_ID: request.id})
