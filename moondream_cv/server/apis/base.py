"""What sets one dialect apart where requests are judged before any of its routes sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

from moondream_cv.server.errors import ServerError


@dataclass(frozen=True)
class Dialect:
    """A family of routes.

    Attributes:
        name: For logs and metrics.
        prefixes: What the paths of its routes start with.
        error_body: What an error looks like in it.
        invalid_status: What a body that does not fit the schema is answered with.
        key_in_body: Whether clients may send their API key as `api_key` of the body; then the route itself asks for it.
    """

    name: str
    prefixes: tuple[str, ...]
    error_body: Callable[[ServerError], dict[str, Any]]
    invalid_status: int = 422
    key_in_body: bool = False

    def owns(self, path: str) -> bool:
        return any(path == prefix or path.startswith(prefix.rstrip("/") + "/") for prefix in self.prefixes)

    def answer(self, error: ServerError) -> JSONResponse:
        return JSONResponse(self.error_body(error), error.status, dict(error.headers or {}))


def find_dialect(dialects: Sequence[Dialect], path: str) -> Dialect:
    """The dialect that a path belongs to; the last one where it belongs to none."""
    return next((dialect for dialect in dialects if dialect.owns(path)), dialects[-1])
