"""`ApiSpec`: the paths and the error format of one API, for middleware and error handlers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

from moondream_cv.server.errors import ServerError


@dataclass(frozen=True)
class ApiSpec:
    """The paths and the error format of one API.

    Attributes:
        name: Name for logs and metrics.
        prefixes: Prefixes of the paths of its routes.
        error_body: Returns the JSON body of an error.
        invalid_status: Status of a response to a body that does not match the schema.
        key_in_body: Whether clients can send their API key as `api_key` of the body.
    """

    name: str
    prefixes: tuple[str, ...]
    error_body: Callable[[ServerError], dict[str, Any]]
    invalid_status: int = 422
    key_in_body: bool = False

    def matches(self, path: str) -> bool:
        """Return whether a path belongs to this API."""
        return any(path == prefix or path.startswith(prefix.rstrip("/") + "/") for prefix in self.prefixes)

    def error_response(self, error: ServerError) -> JSONResponse:
        """Return the response for an error."""
        return JSONResponse(self.error_body(error), error.status, dict(error.headers or {}))


def find_api(apis: Sequence[ApiSpec], path: str) -> ApiSpec:
    """Return the API that a path belongs to; the last one if the path belongs to none."""
    return next((api for api in apis if api.matches(path)), apis[-1])
