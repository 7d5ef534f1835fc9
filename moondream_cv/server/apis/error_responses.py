"""How the published schema describes what is answered in the place of a success."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

_MEANINGS: dict[int | str, str] = {
    400: "A value is out of range, the image cannot be read, or Moondream 2 cannot do that.",
    401: "The API key is missing or wrong.",
    403: "The host or the origin is not allowed.",
    404: "The model is not the one that is served.",
    408: "The body stopped coming.",
    413: "The body is too large.",
    415: "The content type is neither JSON nor multipart.",
    422: "The body does not fit the schema.",
    429: "The queue is full.",
    503: "There is no model, or it failed.",
    504: "The time limit has passed.",
    "4XX": "Something else is wrong with the request.",
}
_RETRY = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
OF_A_SKILL = (400, 401, 403, 404, 408, 413, 415, 422, 429, 503, 504)  # of a route that asks the model


def refusals(
    model: type[BaseModel],
    *statuses: int | str,
    headers: Mapping[str, Any] | None = None,
    meanings: Mapping[int | str, str] | None = None,
) -> dict[int | str, dict[str, Any]]:
    """What a route answers beside its success, as FastAPI's `responses`.

    Args:
        model: What an error looks like in the dialect.
        *statuses: Those that the route can answer; "4XX" keeps FastAPI from documenting a 422 that is never answered.
        headers: Of all of them.
        meanings: Of statuses that mean something else here.
    """
    described = {**_MEANINGS, **(meanings or {})}
    return {
        status: {
            "model": model,
            "description": described[status],
            "headers": {**(headers or {}), **(_RETRY if status in (429, 503) else {})},
        }
        for status in statuses
    }
