"""`moondream-cv serve`: the model over HTTP."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from . import options
from .models import ModelOptions, check_remote
from .report import shown_model

if TYPE_CHECKING:
    from moondream_cv.engine.local import LocalModel
    from moondream_cv.server.runtime.engine_process import ProcessEngine
    from moondream_cv.vision_model import VisionModel

KEYS_VARIABLE = "MOONDREAM_CV_API_KEYS"


def serve(
    model: options.Model = "moondream2",
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Address to listen on; 0.0.0.0 is every network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", min=1, max=65535, metavar="N", help="Port to listen on.")] = 2020,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="Model name shown to clients.", show_default=False),
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    adapter: options.Adapter = None,
    cache_images: Annotated[
        int,
        typer.Option("--cache-images", min=0, metavar="N", help="Encoded images to keep; about 160 MB each."),
    ] = 8,
    api_keys: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            envvar=KEYS_VARIABLE,
            metavar="KEY",
            help="API key clients must send; repeatable. Prefer the variable: other users can see command lines.",
            show_default=False,
        ),
    ] = None,
    queue: Annotated[
        int, typer.Option("--queue", min=1, metavar="N", help="Maximum concurrent requests; further ones get 429.")
    ] = 256,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.1, metavar="SECONDS", help="Limit per request; slower ones get 504.")
    ] = 120,
    drain: Annotated[
        float, typer.Option("--drain", min=0.1, metavar="SECONDS", help="Time that a shutdown waits for requests.")
    ] = 30,
    max_body: Annotated[int, typer.Option("--max-body", min=1, metavar="MIB", help="Maximum size of a request.")] = 32,
    max_pixels: Annotated[
        int, typer.Option("--max-pixels", min=1, metavar="N", help="Maximum number of pixels of an image.")
    ] = 50_000_000,
    decode_timeout: Annotated[
        float,
        typer.Option("--decode-timeout", min=0.1, metavar="SECONDS", help="Limit per image; slower ones get 400."),
    ] = 10,
    private_urls: Annotated[
        bool,
        typer.Option("--allow-private-urls", help="Fetch image URLs also from loopback and private addresses."),
    ] = False,
    cors: Annotated[
        list[str] | None,
        typer.Option("--cors", metavar="ORIGIN", help="Origin whose pages may call; repeatable.", show_default=False),
    ] = None,
    allowed_hosts: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-host",
            metavar="NAME",
            help="Host name to accept in the Host header, without port; repeatable; * accepts all.",
            show_default=False,
        ),
    ] = None,
    page: Annotated[bool, typer.Option("--page/--no-page", help="Serve the playground at /.")] = True,
    certificate: Annotated[
        Path | None,
        typer.Option("--tls-cert", metavar="FILE", help="PEM certificate for https.", show_default=False),
    ] = None,
    certificate_key: Annotated[
        Path | None,
        typer.Option("--tls-key", metavar="FILE", help="PEM private key for https.", show_default=False),
    ] = None,
    log_format: Annotated[
        Literal["auto", "json", "text"],
        typer.Option(
            "--log-format",
            metavar="auto|json|text",
            help="Format of the log; auto is text on a terminal, otherwise JSON.",
        ),
    ] = "auto",
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        typer.Option("--log-level", metavar="debug|info|warning|error", help="Minimum level of logged messages."),
    ] = "info",
) -> None:
    """Serve the model over HTTP, to the clients of Moondream, Roboflow Inference, OpenAI and fal.

    \b
    The page at / is a playground. /health and /ready are for
    orchestrators, /metrics for Prometheus. SIGTERM finishes what is
    running.

    \b
    [bold]Examples[/]
    $ moondream-cv serve --model tiny
    $ MOONDREAM_CV_API_KEYS="first second" moondream-cv serve --host 0.0.0.0
    $ moondream-cv detect street.jpg -c person --model http://localhost:2020
    """
    check_installed()
    # Threads of PyTorch that wait for work would else keep the cores busy that decode the next images.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from moondream_cv.server.app import create_app
    from moondream_cv.server.logs import set_up_logging
    from moondream_cv.server.origin_protection import allowed_hosts_for
    from moondream_cv.server.settings import MIB, ServerSettings
    from moondream_cv.server.uvicorn_server import run_server
    from moondream_cv.urls import is_url

    loading = ModelOptions(model, device, dtype, adapter)
    if is_url(model):
        check_remote(loading)
    if (certificate is None) != (certificate_key is None):
        raise ValueError("--tls-cert and --tls-key go together")
    for file in (certificate, certificate_key):
        if file is not None and not file.is_file():
            raise ValueError(f"there is no file {str(file)!r}")
    chosen = ServerSettings(
        api_keys=tuple(api_keys or ()),
        queue=queue,
        timeout=timeout,
        drain=drain,
        max_body=max_body * MIB,
        max_pixels=max_pixels,
        private_urls=private_urls,
        cors_origins=tuple(cors or ()),
        allowed_hosts=(*allowed_hosts_for(host), *(allowed_hosts or ())),
        decode_timeout=decode_timeout,
        page=page,
    )
    as_json = log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())
    set_up = partial(set_up_logging, log_level, as_json)
    set_up()
    app = create_app(
        partial(open_model, loading, cache_images, set_up),
        name=name or public_name(model),
        settings=chosen,
    )
    scheme = "http" if certificate is None else "https"
    shown_host = "localhost" if host == "127.0.0.1" else f"[{host}]" if ":" in host else host
    announcement = f"Serving {shown_model(model)} at {scheme}://{shown_host}:{port}"
    if not chosen.api_keys and host not in ("127.0.0.1", "::1", "localhost"):
        warning = f"Warning: without an API key, everyone who can reach {host} can use the server; set {KEYS_VARIABLE}"
        typer.echo(warning, err=True)
    files = (None if file is None else str(file) for file in (certificate, certificate_key))
    announce = partial(typer.echo, announcement, err=True)
    run_server(app, host, port, announce, **dict(zip(("certificate", "certificate_key"), files, strict=True)))


def check_installed() -> None:
    """Say how to install what serving takes.

    Raises:
        ValueError: It is missing.
    """
    try:
        import aiohttp  # noqa: F401
        import cachetools  # noqa: F401
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import pythonjsonlogger  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f'serving takes {error.name}; pip install "moondream-cv[server]"') from error


def open_model(options: ModelOptions, cache_images: int, set_up: Callable[[], None]) -> VisionModel | ProcessEngine:
    """Load what is served, in a process of its own, or connect to what answers in its place.

    Raises:
        MoondreamError: It cannot be loaded, or the server cannot be reached.
        ValueError: The device is not there.
    """
    from moondream_cv.urls import is_url

    if is_url(options.name):
        from moondream_cv.backends import connect

        return connect(options.name)
    from moondream_cv.server.runtime.engine_process import ProcessEngine

    return ProcessEngine(partial(load_model, options, cache_images), set_up)


def load_model(options: ModelOptions, cache_images: int) -> LocalModel:
    """Load a model onto this machine; called in the engine's process."""
    from moondream_cv.loading import load

    return load(
        options.name,
        device=options.device,
        dtype=options.dtype,
        adapter=options.adapter,
        cache_images=cache_images,
    )


def public_name(model: str) -> str:
    """What clients know a model as: its name, but of a folder the last part alone, and of a server nothing."""
    from moondream_cv.urls import is_url

    if is_url(model):
        return "moondream2"
    path = Path(model)
    return path.resolve().name if path.exists() or path.is_absolute() else model
