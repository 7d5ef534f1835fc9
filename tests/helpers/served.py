"""A real server in a thread, for tests that talk HTTP to it."""

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
        url: Without a slash at the end.
        service: Its insides.
        client: Talks to it; errors are answers, not exceptions.
    """

    url: str
    service: Service
    client: httpx.Client

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)


@contextlib.contextmanager
def served(
    model: Any,
    *,
    name: str = "tiny",
    wrap: Callable[[FastAPI], Any] = lambda app: app,
    tls: tuple[str, str] | None = None,
    **options: Any,
) -> Iterator[Served]:
    """Serve a model on a free port of localhost.

    Args:
        model: What `create_app` takes.
        name: What clients know it as.
        wrap: Makes the ASGI application that is really run.
        tls: Certificate and key, both paths of PEM files.
        **options: Of `ServerSettings`.
    """
    app = create_app(model, name=name, settings=ServerSettings(**{"drain": 240.0, **options}))
    secure = {} if tls is None else {"ssl_certfile": tls[0], "ssl_keyfile": tls[1]}
    config = server_config(wrap(app), app.state.service.settings, host="127.0.0.1", port=0, **secure)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="server under test", daemon=True)
    thread.start()
    deadline = time.monotonic() + 240
    while not server.started:
        assert thread.is_alive(), "the server ended while it started"
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"{'https' if tls else 'http'}://localhost:{port}"
    headers = {"Content-Type": "application/json"}  # for `content=`, which has none of its own
    with httpx.Client(base_url=url, timeout=300, verify=tls is None, headers=headers) as client:
        try:
            yield Served(url, app.state.service, client)
        finally:
            client.close()  # uvicorn waits for connections with TLS that are kept for another request
            server.should_exit = True
            thread.join(timeout=300)
            assert not thread.is_alive(), "the server did not stop"


def data_uri(image: Image.Image, format: str = "PNG") -> str:
    """An image as clients send it."""
    file = io.BytesIO()
    image.convert("RGB").save(file, format)
    return f"data:image/{format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
