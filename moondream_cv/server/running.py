"""Runs the application with uvicorn until a signal ends it."""

from __future__ import annotations

import logging
from types import FrameType

import uvicorn
from fastapi import FastAPI

from moondream_cv.errors import MoondreamError

from .service import Service

logger = logging.getLogger(__name__)

KEEP_ALIVE = 75  # seconds; longer than clients keep a connection for another request, so that none runs into its end
CONNECTIONS = 1024  # beyond those that hold a place: each may hold a request's body in memory


class _Server(uvicorn.Server):
    """Tells the service when a signal has come, and gives up when the model cannot be loaded."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self._service.draining:
            logger.info("shutting down: %d requests are being finished", self._service.taken)
        self._service.draining = True
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._service.failure is not None


def run_server(
    app: FastAPI, host: str, port: int, *, certificate: str | None = None, certificate_key: str | None = None
) -> None:
    """Serve an application made by `create_app` until SIGTERM or SIGINT; what is running is finished first.

    Args:
        app: It.
        host: Address to listen at.
        port: Port to listen at.
        certificate: PEM file, for https.
        certificate_key: PEM file of its private key.

    Raises:
        MoondreamError: The address is taken, or is none of this machine's.
        Exception: Whatever kept the model from being loaded.
    """
    service: Service = app.state.service
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        access_log=False,  # ours has the request's id and its time
        log_config=None,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=int(service.options.drain) + 1,
        limit_concurrency=service.options.queue + CONNECTIONS,
        ssl_certfile=certificate,
        ssl_keyfile=certificate_key,
    )
    try:
        listening = config.bind_socket()  # before the model is loaded, so that a taken address is known at once
    except SystemExit as error:  # uvicorn has logged why
        raise MoondreamError(f"cannot listen at {host}, port {port}; name another --host or --port") from error
    _Server(config, service).run(sockets=[listening])
    if service.failure is not None:
        raise service.failure
