"""Runs the application with uvicorn until a signal stops it."""

from __future__ import annotations

import contextvars
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from moondream_cv.errors import MoondreamError
from moondream_cv.memory_trimming import release_large_blocks
from moondream_cv.server.connections import ConnectionTable, LimitedProtocol
from moondream_cv.server.runtime.engines import Engine, ThreadEngine
from moondream_cv.server.service import Service
from moondream_cv.server.settings import ServerSettings

logger = logging.getLogger(__name__)

KEEP_ALIVE = 75  # seconds; longer than clients reuse idle connections, so the server never closes one in use
CONNECTIONS = 1024  # in addition to those with a queue slot; each can hold a request body in memory
FILES = 65_536  # open files; connections in a TLS handshake are not limited, and one address has fewer ports


class _Server(uvicorn.Server):
    """uvicorn server that reports signals to the service, and stops if the model or the engine has failed."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self._service.draining:
            # A signal can interrupt a request; an empty context keeps its ID out of this log line.
            contextvars.Context().run(logger.info, "shutting down: waiting for %d requests", self._service.in_flight)
        self._service.draining = True
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._has_failed()

    def _has_failed(self) -> bool:
        """Return whether the server has to exit, so that a supervisor can restart it."""
        if self._service.engine_failed:
            self._service.failure = MoondreamError("the engine has failed; see the log for the reason")
        return self._service.failure is not None


def run_server(
    app: FastAPI,
    host: str,
    port: int,
    announce: Callable[[], None] = lambda: None,
    *,
    certificate: str | None = None,
    certificate_key: str | None = None,
) -> None:
    """Serve an application made by `create_app` until SIGTERM or SIGINT; running requests are finished first.

    The function returns after SIGTERM, so that the process exits with status 0. After SIGINT, it raises
    `KeyboardInterrupt`.

    Args:
        app: The application.
        host: Host name or IP address to listen on.
        port: Port to listen on.
        announce: Called when the server has bound the address.
        certificate: Path of a PEM certificate for https.
        certificate_key: Path of the PEM private key of the certificate.

    Raises:
        MoondreamError: The address is in use or does not belong to this machine, or the engine has failed.
        Exception: The error that prevented the model from loading.
    """
    # Bind the address before the model is loaded, so that an address in use is reported at once
    listening = listen(host, port)

    # Configure uvicorn and the process
    service: Service = app.state.service
    config = server_config(
        app, service.settings, host=host, port=port, ssl_certfile=certificate, ssl_keyfile=certificate_key
    )
    raise_file_limit(FILES)
    service.on_engine_start = _limit_memory

    # Serve until a signal arrives
    announce()
    server = _Server(config, service)
    if threading.current_thread() is threading.main_thread():
        # uvicorn raises the signal again after the shutdown; by default, that exits with status 143.
        signal.signal(signal.SIGTERM, lambda *_: setattr(server, "should_exit", True))
    server.run(sockets=listening)
    if service.failure is not None:
        raise service.failure


def _limit_memory(engine: Engine) -> None:
    """Return large blocks to the system, unless a model in this process would map its activations again each time."""
    if not isinstance(engine, ThreadEngine):
        release_large_blocks()


def server_config(app: Any, settings: ServerSettings, **options: Any) -> uvicorn.Config:
    """Return uvicorn's configuration with the limits of this server.

    Args:
        app: The ASGI application.
        settings: Settings of the server.
        **options: Further options of `uvicorn.Config`, such as host and port.
    """
    table = ConnectionTable(settings.queue + CONNECTIONS, settings.connections_per_client)
    return uvicorn.Config(
        app,
        http=LimitedProtocol.configure(table),
        ws="none",
        access_log=False,  # RequestLoggingMiddleware logs requests, with ID and duration
        log_config=None,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=int(settings.drain) + 1,
        **options,
    )


def raise_file_limit(count: int) -> None:
    """Raise the soft limit on open files to `count`, or as far as the system allows. Each connection is a file."""
    if os.name != "posix":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def listen(host: str, port: int) -> list[socket.socket]:
    """Return sockets that are bound to all addresses of a host name.

    Raises:
        MoondreamError: An address is in use or does not belong to this machine.
    """
    listening: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        ):
            # asyncio disables Nagle's algorithm only for sockets with an explicit protocol number. With the algorithm,
            # a response in two parts is delayed by 40 ms.
            opened = socket.socket(family, kind, protocol)
            listening.append(opened)
            if os.name == "posix":
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            opened.bind(address)
    except OSError as error:
        for opened in listening:
            opened.close()
        raise MoondreamError(
            f"cannot listen on {host}, port {port}: {error.strerror}; choose another --host or --port"
        ) from error
    return listening
