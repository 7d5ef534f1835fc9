"""What a server answers when it does not answer: a status, a sentence, and nothing of its insides."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from starlette.exceptions import HTTPException

from moondream_cv.errors import (
    BackendError,
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
    """An answer other than the one that was asked for.

    An `HTTPException`, because FastAPI lets no other error pass that comes up while a body is read.

    Attributes:
        status: Of the HTTP response.
        message: For the person who reads it.
        kind: In one word, for the program that does.
        param: The field of the request that is to blame, where it is one.
        retry_after: Seconds after which another try makes sense.
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


class ClientLeft(Exception):
    """Nobody waits for this answer any more."""


def explain(error: BaseException) -> ServerError:
    """Return the error that the client gets for any error that came up on the way.

    The traceback of `error` is dropped: its frames refer to what the client sent, and often back to the error.
    """
    try:
        return _explained(error)
    finally:
        _drop_traceback(error)


def _drop_traceback(error: BaseException | None) -> None:
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _explained(error: BaseException) -> ServerError:
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
        return ServerError(503, "the model that this server passes requests on to failed; try again", retry_after=5)
    if isinstance(error, MoondreamError):
        logger.warning("the model failed: %s", error)
        return ServerError(503, str(error), retry_after=5)
    logger.error("a request failed for a reason that nobody foresaw", exc_info=error)
    return ServerError(500, "the server failed on this request; its log says more under the request's id")


def invalid(errors: Sequence[Any], status: int) -> ServerError:
    """An error about a body that is not what the schema says.

    Args:
        errors: As pydantic lists them.
        status: To answer with.
    """
    said = []
    for error in errors[:3]:
        place = ".".join(str(part) for part in error["loc"] if part != "body")[:200]
        said.append(f"{place}: {error['msg']}" if place else str(error["msg"]))
    first = [str(part) for part in errors[0]["loc"] if part != "body"] if errors else []
    more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
    return ServerError(status, ("; ".join(said) or "invalid request") + more, param=first[0][:200] if first else None)
