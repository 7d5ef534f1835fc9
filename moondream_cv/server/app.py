"""The ASGI application: one service, its APIs, the playground and the middleware."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from moondream_cv import __version__
from moondream_cv.server.apis import batch, moondream, operations, roboflow, tuning, x_anylabeling
from moondream_cv.server.apis.base import find_api
from moondream_cv.server.apis.fal import routes as fal
from moondream_cv.server.apis.fal import wire as fal_wire
from moondream_cv.server.apis.openai import routes as openai
from moondream_cv.server.apis.uploaded_batches import routes as uploaded_batches
from moondream_cv.server.apis.uploaded_batches.store import BatchStore
from moondream_cv.server.errors import ClientDisconnected, ServerError, to_server_error, validation_error
from moondream_cv.server.middleware import AuthMiddleware, RequestLoggingMiddleware
from moondream_cv.server.playground import page
from moondream_cv.server.service import Service
from moondream_cv.server.settings import ServerSettings

if TYPE_CHECKING:
    from moondream_cv.masks import MaskFunction
    from moondream_cv.server.service import ModelSource

EXPOSED_HEADERS = ("X-Request-Id", "Retry-After", fal_wire.REQUEST_ID, fal_wire.ERROR_TYPE, fal_wire.TIMEOUT_TYPE)
APIS = (openai.API, roboflow.API, fal.API, x_anylabeling.API, moondream.API)


def create_app(
    model: ModelSource,
    *,
    name: str = "moondream2",
    settings: ServerSettings | None = None,
    load_masks: Callable[[], MaskFunction] | None = None,
) -> FastAPI:
    """Return the ASGI application of a server.

    Args:
        model: A model, an engine such as `ProcessEngine`, or a function that loads one of them. The function is called
            in a thread when the application starts, and the application closes the loaded model when it stops. Requests
            get 503 until the model is loaded.
        name: Model name that clients use.
        settings: Settings of the server; None uses the defaults.
        load_masks: Function that loads a mask function for `/v1/segment`, such as `SamMasks`. It is called in a thread
            when the application starts, and requests get 503 until it returns. The mask function runs in one thread;
            it is a mask function as for `Detector`, and gets a box without area for a point. None: no segmentation.
    """
    settings = settings or ServerSettings()
    service = Service(model, name, settings, load_masks)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()
        app.state.batches.close()

    app = FastAPI(
        title="moondream-cv",
        version=__version__,
        summary="Moondream 2 over HTTP, for clients of Moondream, Roboflow Inference, OpenAI, fal and X-AnyLabeling.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's documentation pages load scripts from other sites
        redoc_url=None,
    )
    app.state.service, app.state.batches = service, BatchStore(service)

    # Routes
    app.include_router(uploaded_batches.create_router)  # before the route with the same path
    for api in (operations, moondream, batch, uploaded_batches, tuning, openai, roboflow, fal, x_anylabeling):
        app.include_router(api.router)
    if settings.page:
        app.include_router(page.router)

    # Error handlers
    for kind in (ServerError, ClientDisconnected, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _handle_error)

    # Middleware; the last one added runs first
    app.add_middleware(AuthMiddleware, service=service, apis=APIS)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=list(EXPOSED_HEADERS),
        )
    app.add_middleware(RequestLoggingMiddleware, service=service, apis=APIS)
    return app


async def _handle_error(http: Request, error: Exception) -> Response:
    """Return the response for an error, in the format of the API that the path belongs to."""
    api = find_api(APIS, http.scope["path"])
    if isinstance(error, ClientDisconnected):
        return Response(status_code=499)
    if isinstance(error, RequestValidationError):
        return api.error_response(validation_error(error.errors(), api.invalid_status))
    if isinstance(error, HTTPException) and not isinstance(error, ServerError):
        response = api.error_response(ServerError(error.status_code, _message(http, error)))
        response.headers.update(error.headers or {})
        return response
    return api.error_response(to_server_error(error))


def _message(http: Request, error: HTTPException) -> str:
    path = http.scope["path"][:200]
    if error.status_code == 404:
        return f"no route at {path}"
    if error.status_code == 405:
        return f"{http.method} is not allowed for {path}"
    return str(error.detail)
