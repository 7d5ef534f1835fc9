"""A server in a thread, for tests that send HTTP requests."""

from __future__ import annotations

import base64
import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from PIL import Image

from moondream_cv.server.app import create_app
from moondream_cv.server.service import Service
from moondream_cv.server.settings import ServerSettings
from moondream_cv.server.uvicorn_server import server_config


@dataclass
class Served:
    """A running server.

    Attributes:
        url: Base URL without a trailing slash.
        service: Service of the application.
        client: HTTP client for the server; error statuses raise no exception.
        app: The application.
    """

    url: str
    service: Service
    client: httpx.Client
    app: FastAPI

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)


@contextlib.contextmanager
def served(
    model: Any,
    *,
    name: str = "tiny",
    wrap: Callable[[FastAPI], Any] = lambda app: app,
    tls: tuple[str, str] | None = None,
    load_masks: Callable[[], Any] | None = None,
    **options: Any,
) -> Iterator[Served]:
    """Serve a model on a free port of localhost.

    Args:
        model: Model, engine or loader for `create_app`.
        name: Model name that clients use.
        wrap: Wraps the ASGI application.
        tls: Paths of the certificate and the key in PEM format.
        load_masks: Loads a mask function for `create_app`.
        **options: Fields of `ServerSettings`.
    """
    settings = ServerSettings(**{"drain": 240.0, **options})
    app = create_app(model, name=name, settings=settings, load_masks=load_masks)
    secure = {} if tls is None else {"ssl_certfile": tls[0], "ssl_keyfile": tls[1]}
    config = server_config(wrap(app), app.state.service.settings, host="127.0.0.1", port=0, **secure)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="server under test", daemon=True)
    thread.start()
    deadline = time.monotonic() + 240
    while not server.started:
        assert thread.is_alive(), "the server stopped during startup"
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"{'https' if tls else 'http'}://localhost:{port}"
    headers = {"Content-Type": "application/json"}  # httpx sets none for `content=`
    with httpx.Client(base_url=url, timeout=300, verify=tls is None, headers=headers) as client:
        try:
            yield Served(url, app.state.service, client, app)
        finally:
            client.close()  # uvicorn waits for idle TLS connections
            server.should_exit = True
            thread.join(timeout=300)
            assert not thread.is_alive(), "the server did not stop"


def data_uri(image: Image.Image, format: str = "PNG") -> str:
    """Return an image as a data URI."""
    file = io.BytesIO()
    image.convert("RGB").save(file, format)
    return f"data:image/{format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
