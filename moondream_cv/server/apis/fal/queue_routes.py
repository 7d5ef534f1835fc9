"""Routes of fal's queue: submit, status, result and cancel.

They are under `/queue`, for clients with `FAL_QUEUE_RUN_HOST=localhost:8000/queue`. Webhooks are rejected, because the
server would have to call any address that a client chooses.
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
    API,
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
    run,
    with_time_limit,
)
from moondream_cv.server.apis.sse import event, event_stream
from moondream_cv.server.errors import ServerError
from moondream_cv.server.service import check_single_process, get_service

router = APIRouter(prefix=f"/queue{APP}", tags=["fal"], dependencies=[Depends(check_single_process)])
Seconds = Annotated[float | None, Header(alias="X-Fal-Request-Timeout", gt=0, allow_inf_nan=False)]


class QueueTicket(BaseModel):
    """The ID of a queued request and the URLs of its routes."""

    request_id: str
    response_url: str
    status_url: str
    cancel_url: str


class QueueAccepted(QueueTicket):
    """The response to a submission."""

    status: State
    queue_position: int


class QueueLog(BaseModel):
    """A log line; `timestamp` is in ISO 8601, UTC."""

    message: str
    level: str
    source: str
    timestamp: str


class QueueMetrics(BaseModel):
    """`inference_time` is the time from submission to the end, in seconds."""

    inference_time: float


class QueueStatus(QueueTicket):
    """The state of a request: `logs` on request, `metrics` once it has ended, `error` if it has failed."""

    status: State
    logs: list[QueueLog] | None
    queue_position: int | None = None
    metrics: QueueMetrics | None = None
    error: str | None = None
    error_type: str | None = None


class QueueCancellation(QueueTicket):
    """The response to a cancellation."""

    status: Literal["CANCELLATION_REQUESTED", "ALREADY_COMPLETED"]


_SUBMIT: dict[str, Any] = {
    "responses": {
        200: {"model": QueueAccepted, "headers": HEADERS},
        **fal_error_responses(400, 401, 403, 408, 413, 415, 422, 429, 503),
    }
}
_STATUS: dict[int | str, dict[str, Any]] = {
    200: {"model": QueueStatus, "headers": HEADERS, "description": "The request has ended."},
    202: {"model": QueueStatus, "headers": HEADERS, "description": "The request has not ended yet."},
    **fal_error_responses(401, 404, 422),
}
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The status, after every change.",
        "headers": HEADERS,
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    },
    **fal_error_responses(401, 404, 422),
}
_RESULT: dict[int | str, dict[str, Any]] = {
    200: {"model": TextOutput | ObjectsOutput | PointsOutput, "headers": HEADERS},
    **fal_error_responses(400, 401, 404, 503, 504, "default"),
}
_CANCEL: dict[int | str, dict[str, Any]] = {
    202: {"model": QueueCancellation, "headers": HEADERS, "description": "The request is cancelled."},
    400: {"model": QueueCancellation, "headers": HEADERS, "description": "The request had already ended."},
    **fal_error_responses(401, 404, "4XX"),
}


def queue_of(http: HttpRequest) -> RequestQueue:
    """Return the queue of the application that received a request. The first call creates it."""
    state = http.app.state
    if not hasattr(state, "fal_queue"):
        state.fal_queue = RequestQueue(get_service(http))
    queue: RequestQueue = state.fal_queue
    return queue


class Submission:
    """Submits a request body; holds the time limit and the URL parameters of the submission."""

    def __init__(
        self,
        http: HttpRequest,
        seconds: Seconds = None,
        webhook: Annotated[str | None, Query(alias="fal_webhook")] = None,
    ) -> None:
        if webhook is not None:
            raise ServerError(
                400,
                "webhooks are not supported; leave fal_webhook out and poll the status",
                kind="unsupported_parameter",
                param="fal_webhook",
            )
        self._http, self._seconds = http, seconds

    def submit(self, body: Arguments, description: str) -> JSONResponse:
        """Submit a request body to the queue and return the response."""
        queue, seconds = queue_of(self._http), self._seconds  # do not keep the HTTP request with its body
        request = queue.submit(
            lambda context, started: with_time_limit(seconds, run(body, context, started)), description
        )
        return _answer(request, {"status": request.state, "queue_position": queue.position(request)}, self._http)


def _find_request(request_id: str, http: HttpRequest) -> QueuedRequest:
    return queue_of(http).find(request_id)


Submitted = Annotated[Submission, Depends()]
Found = Annotated[QueuedRequest, Depends(_find_request)]


@router.post("", summary="Submit a caption", **_SUBMIT)
async def submit_caption(body: CaptionArguments, submission: Submitted) -> Response:
    """Queue a request for a caption."""
    return submission.submit(body, "caption")


@router.post("/visual-query", summary="Submit a question", **_SUBMIT)
async def submit_query(body: QueryArguments, submission: Submitted) -> Response:
    """Queue a question."""
    return submission.submit(body, "visual query")


@router.post("/object-detection", summary="Submit a detection", **_SUBMIT)
async def submit_detection(body: DetectArguments, submission: Submitted) -> Response:
    """Queue a request for the boxes of objects."""
    return submission.submit(body, "object detection")


@router.post("/point-object-detection", summary="Submit a point detection", **_SUBMIT)
async def submit_points(body: PointArguments, submission: Submitted) -> Response:
    """Queue a request for points on objects."""
    return submission.submit(body, "point detection")


@router.get("/requests/{request_id}/status", summary="State of a request", responses=_STATUS)
async def status(request: Found, http: HttpRequest, logs: bool = False) -> Response:
    """Return the state of a request: 202 until it has ended, then 200, with `error` if it has failed."""
    done = request.state == "COMPLETED"
    return _answer(
        request, _state_body(request, queue_of(http), request.logs if logs else None), http, 200 if done else 202
    )


@router.get(
    "/requests/{request_id}/status/stream",
    summary="Stream of the states of a request",
    response_class=StreamingResponse,
    responses=_STREAM,
)
async def status_stream(request: Found, http: HttpRequest, logs: bool = False) -> Response:
    """Send the state of a request after every change, with new log lines, until the request has ended."""
    answer = event_stream(_states(request, queue_of(http), logs))
    answer.headers[REQUEST_ID] = request.id
    return answer


@router.get("/requests/{request_id}", summary="Result of a request", responses=_RESULT)
async def result(request: Found, http: HttpRequest) -> Response:
    """Return the result of a request that has ended, or its error."""
    error = request.error
    if request.state != "COMPLETED":
        error = ServerError(400, f"the request is still in progress: {request.state}", kind="request_in_progress")
    if error is not None:
        response = API.error_response(error)
        response.headers[REQUEST_ID] = request.id
        return response
    return JSONResponse(request.result, headers={REQUEST_ID: request.id})


@router.put("/requests/{request_id}/cancel", summary="Cancel a request", status_code=202, responses=_CANCEL)
async def cancel(request: Found, http: HttpRequest) -> Response:
    """Cancel a request; 400 if it has already ended."""
    if request.state != "COMPLETED":
        await queue_of(http).cancel(request)
        if request.error is not None and request.error.kind == CANCELLED:
            return _answer(request, {"status": "CANCELLATION_REQUESTED"}, http, 202)
    return _answer(request, {"status": "ALREADY_COMPLETED"}, http, 400)


def _state_body(request: QueuedRequest, queue: RequestQueue, logs: list[dict[str, str]] | None) -> dict[str, Any]:
    body: dict[str, Any] = {"status": request.state, "logs": logs}
    if request.state == "IN_QUEUE":
        body["queue_position"] = queue.position(request)
    if request.state == "COMPLETED":
        body["metrics"] = {"inference_time": request.seconds}
        if request.error is not None:
            body |= {"error": request.error.message, "error_type": request.error.kind}
    return body


async def _states(request: QueuedRequest, queue: RequestQueue, with_logs: bool) -> AsyncIterator[bytes]:
    num_sent = 0
    async for _ in request.changes():
        new, num_sent = request.logs[num_sent:], len(request.logs)
        yield event({**_state_body(request, queue, new if with_logs else None), "request_id": request.id})


def _answer(request: QueuedRequest, content: dict[str, Any], http: HttpRequest, status: int = 200) -> JSONResponse:
    """Return a response about a request, with the URLs of its routes as the client addresses this server."""
    base = f"{str(http.base_url).rstrip('/')}/queue{APP}/requests/{request.id}"
    urls = {"response_url": base, "status_url": f"{base}/status", "cancel_url": f"{base}/cancel"}
    return JSONResponse({**content, "request_id": request.id, **urls}, status, {REQUEST_ID: request.id})
