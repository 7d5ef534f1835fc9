"""Errors of the server and their conversion to HTTP responses, which never contain internal details."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from starlette.exceptions import HTTPException

from moondream_cv.errors import (
    BackendError,
    CheckpointError,
    ImageError,
    MoondreamError,
    RequestCancelled,
    SchemaError,
    UnsupportedSkill,
)

logger = logging.getLogger(__name__)

KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "service_unavailable",
    504: "timeout_error",
}


class ServerError(HTTPException):
    """An error response.

    This is an `HTTPException`, because FastAPI converts other errors that are raised while it reads a body.

    Attributes:
        status: HTTP status code.
        message: Message for people.
        kind: Error type for programs, one word.
        param: Name of the invalid field of the request, if there is one.
        retry_after: Time in seconds after which the client can try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        super().__init__(status, message, headers)
        self.status, self.message, self.param, self.retry_after = status, message, param, retry_after
        self.kind = kind or KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")


class ClientDisconnected(Exception):
    """The client disconnected before it received the response."""


def to_server_error(error: BaseException) -> ServerError:
    """Return the error response for an error that was raised while a request was processed.

    The traceback of `error` is dropped: its frames refer to data of the client, and often back to the error.
    """
    try:
        return _convert(error)
    finally:
        _drop_traceback(error)


def _drop_traceback(error: BaseException | None) -> None:
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _convert(error: BaseException) -> ServerError:
    if isinstance(error, ServerError):
        return error
    if isinstance(error, UnsupportedSkill):
        return ServerError(400, str(error), kind="unsupported_skill")
    if isinstance(error, ImageError):
        return ServerError(400, str(error), kind="invalid_image")
    if isinstance(error, SchemaError):
        return ServerError(400, f"response_format: {error}", param="response_format")
    if isinstance(error, ValueError):
        return ServerError(400, str(error))
    if isinstance(error, RequestCancelled):
        return ServerError(503, "the server is shutting down; try again", retry_after=5)
    if isinstance(error, BackendError):
        logger.warning("the remote model failed: %s", error)
        return ServerError(503, "the remote model behind this server failed; try again", retry_after=5)
    if isinstance(error, CheckpointError):  # the file was deleted, or belongs to another model
        logger.warning("a checkpoint cannot be loaded: %s", error)
        return ServerError(404, "the checkpoint was deleted or does not fit the model of this server", param="model")
    if isinstance(error, MoondreamError):
        logger.warning("the model failed: %s", error)
        return ServerError(503, str(error), retry_after=5)
    logger.error("unexpected error while handling a request", exc_info=error)
    return ServerError(500, "internal server error; see the server log for the request ID")


def validation_error(errors: Sequence[Any], status: int) -> ServerError:
    """Return the error response for a body that does not match the schema.

    Args:
        errors: Errors as pydantic lists them; the message has the first three.
        status: Status of the response.
    """
    messages = []
    for error in errors[:3]:
        place = ".".join(_location(error))[:200]
        messages.append(f"{place}: {error['msg']}" if place else str(error["msg"]))
    first = _location(errors[0]) if errors else []
    more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
    message = ("; ".join(messages) or "invalid request") + more
    return ServerError(status, message, param=first[0][:200] if first else None)


def _location(error: Any) -> list[str]:
    """Return the path of the invalid field; invalid JSON has none, only an offset."""
    if error["type"] == "json_invalid":
        return []
    return [str(part) for part in error["loc"] if part != "body"]
