"""The server put together: one service, four dialects, and what every request goes through."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from moondream_cv import __version__
from moondream_cv.server.apis import batch, moondream, operations, roboflow
from moondream_cv.server.apis.base import find_dialect
from moondream_cv.server.apis.fal import routes as fal
from moondream_cv.server.apis.fal import wire as fal_wire
from moondream_cv.server.apis.openai import routes as openai
from moondream_cv.server.errors import ClientLeft, ServerError, explain, invalid
from moondream_cv.server.middleware import Entrance, Gate
from moondream_cv.server.options import ServerOptions
from moondream_cv.server.playground import page
from moondream_cv.server.service import Service

if TYPE_CHECKING:
    from moondream_cv.server.service import Source

EXPOSED = ("X-Request-Id", "Retry-After", fal_wire.REQUEST_ID, fal_wire.ERROR_TYPE, fal_wire.TIMEOUT_TYPE)
DIALECTS = (openai.DIALECT, roboflow.DIALECT, fal.DIALECT, moondream.DIALECT)


def create_app(model: Source, *, name: str = "moondream2", options: ServerOptions | None = None) -> FastAPI:
    """Make the ASGI application.

    Args:
        model: What answers: a model, or an `EngineProcess`. A function is called when the app starts, in a thread, and
            what it gives is closed at the end; until it is there, requests are answered with 503.
        name: What clients know the model as.
        options: How the server behaves.
    """
    options = options or ServerOptions()
    service = Service(model, name, options)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="moondream-cv",
        version=__version__,
        summary="Moondream 2 over HTTP, for the clients of Moondream, Roboflow Inference, OpenAI and fal.",
        lifespan=lifespan,
        docs_url=None,  # the pages that FastAPI makes fetch scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    for router in (operations.router, moondream.router, batch.router, openai.router, roboflow.router, fal.router):
        app.include_router(router)
    if options.page:
        app.include_router(page.router)
    for kind in (ServerError, ClientLeft, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _answer)
    app.add_middleware(Gate, service=service, dialects=DIALECTS)  # the one added last sees requests first
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=list(EXPOSED),
        )
    app.add_middleware(Entrance, service=service, dialects=DIALECTS)
    return app


async def _answer(http: Request, error: Exception) -> Response:
    """What an error is answered with, in the dialect of its path."""
    dialect = find_dialect(DIALECTS, http.scope["path"])
    if isinstance(error, ClientLeft):
        return Response(status_code=499)
    if isinstance(error, RequestValidationError):
        return dialect.answer(invalid(error.errors(), dialect.invalid_status))
    if isinstance(error, HTTPException) and not isinstance(error, ServerError):
        kept = ServerError(error.status_code, _described(http, error))
        answer = dialect.answer(kept)
        answer.headers.update(error.headers or {})
        return answer
    return dialect.answer(explain(error))


def _described(http: Request, error: HTTPException) -> str:
    if error.status_code == 404:
        return f"there is nothing at {http.scope['path'][:200]}"
    if error.status_code == 405:
        return f"{http.method} is not what {http.scope['path'][:200]} takes"
    return str(error.detail)
