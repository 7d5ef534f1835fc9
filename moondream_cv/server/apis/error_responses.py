"""Documentation of error responses for the OpenAPI schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

_DESCRIPTIONS: dict[int | str, str] = {
    400: "A value is out of range, the image cannot be read, or Moondream 2 does not support the request.",
    401: "The API key is missing or invalid.",
    403: "The host or the origin is not allowed.",
    404: "The server does not have this model.",
    408: "The request body did not arrive in time.",
    413: "The request body is too large.",
    415: "The content type is neither JSON nor multipart.",
    422: "The request body does not match the schema.",
    429: "The queue is full.",
    503: "The model is not loaded or has failed.",
    504: "The time limit has expired.",
    "4XX": "The request is invalid for another reason.",
}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait before a retry.", "schema": {"type": "integer"}}}
SKILL_ERRORS = (400, 401, 403, 404, 408, 413, 415, 422, 429, 503, 504)  # statuses of routes that run the model


def error_responses(
    model: type[BaseModel],
    *statuses: int | str,
    headers: Mapping[str, Any] | None = None,
    descriptions: Mapping[int | str, str] | None = None,
) -> dict[int | str, dict[str, Any]]:
    """Return the error responses of a route, for the `responses` argument of FastAPI.

    Args:
        model: Schema of an error body.
        *statuses: Statuses of the route. "4XX" keeps FastAPI from documenting a status 422 that never occurs.
        headers: Headers of all error responses.
        descriptions: Descriptions that differ from the default ones, by status.
    """
    texts = {**_DESCRIPTIONS, **(descriptions or {})}
    return {
        status: {
            "model": model,
            "description": texts[status],
            "headers": {**(headers or {}), **(_RETRY_AFTER if status in (429, 503) else {})},
        }
        for status in statuses
    }
