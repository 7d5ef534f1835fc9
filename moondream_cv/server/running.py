"""Runs the application with uvicorn until a signal ends it."""

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
from moondream_cv.server.connections import ConnectionTable, LimitedProtocol
from moondream_cv.server.memory import release_large_blocks
from moondream_cv.server.options import ServerOptions
from moondream_cv.server.service import Service

logger = logging.getLogger(__name__)

KEEP_ALIVE = 75  # seconds; longer than clients keep a connection for another request, so that none runs into its end
CONNECTIONS = 1024  # beyond those that hold a place: each may hold a request's body in memory
FILES = 65_536  # connections of which TLS is still being negotiated are not counted, and one address has fewer ports


class _Server(uvicorn.Server):
    """Tells the service when a signal has come, and gives up when there is no model, or no engine any more."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self._service.draining:
            # A signal comes in the middle of whatever is going on: what is said here belongs to no request.
            taken = self._service.taken
            contextvars.Context().run(logger.info, "shutting down: %d requests are being finished", taken)
        self._service.draining = True
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._failed()

    def _failed(self) -> bool:
        """Whether there is no model, or no engine any more: whoever supervises the server can start it again."""
        if self._service.broken:
            self._service.failure = MoondreamError("the engine has failed; its log says why")
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
    """Serve an application made by `create_app` until SIGTERM or SIGINT; requests in progress are finished first.

    Returns after SIGTERM, so that the process ends with status 0. After SIGINT, `KeyboardInterrupt` is raised.

    Args:
        app: The application.
        host: Address to listen on.
        port: Port to listen on.
        announce: Called when the address is known to be free.
        certificate: PEM file, for https.
        certificate_key: PEM file of its private key.

    Raises:
        MoondreamError: The address is taken, or is none of this machine's.
        MoondreamError: The engine has failed.
        Exception: Whatever kept the model from being loaded.
    """
    listening = listen(host, port)  # before the model is loaded, so that a taken address is known at once
    service: Service = app.state.service
    config = server_config(
        app, service.options, host=host, port=port, ssl_certfile=certificate, ssl_keyfile=certificate_key
    )
    raise_file_limit(FILES)
    release_large_blocks()
    announce()
    server = _Server(config, service)
    if threading.current_thread() is threading.main_thread():
        # uvicorn sends the process the signal once more after the shutdown; by default that ends it with status 143.
        signal.signal(signal.SIGTERM, lambda *_: setattr(server, "should_exit", True))
    server.run(sockets=listening)
    if service.failure is not None:
        raise service.failure


def server_config(app: Any, options: ServerOptions, **settings: Any) -> uvicorn.Config:
    """Return uvicorn's configuration with the limits of this server.

    Args:
        app: The ASGI application.
        options: How the server behaves.
        **settings: Further settings of `uvicorn.Config`, such as host and port.
    """
    table = ConnectionTable(options.queue + CONNECTIONS, options.connections_per_client)
    return uvicorn.Config(
        app,
        http=LimitedProtocol.configure(table),
        ws="none",
        access_log=False,  # ours has the request's id and its time
        log_config=None,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=int(options.drain) + 1,
        **settings,
    )


def raise_file_limit(count: int) -> None:
    """Raise the soft limit on open files as far as the system allows: each connection is one."""
    if os.name != "posix":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets at every address that a host name stands for.

    Raises:
        MoondreamError: An address is taken, or is none of this machine's.
    """
    listening: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        ):
            # With the protocol's number in it: asyncio turns Nagle's algorithm off only where it sees that, and with it
            # on, an answer of two parts waits 40 ms for its second one.
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
            f"cannot listen at {host}, port {port}: {error.strerror}; name another --host or --port"
        ) from error
    return listening
