"""`moondream-cv serve`: serve a model over HTTP."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from . import options
from .models import ModelOptions, check_remote, load_masks
from .report import shown_model

if TYPE_CHECKING:
    from moondream_cv.engine.local_model import LocalModel
    from moondream_cv.server.runtime.engine_process import ProcessEngine
    from moondream_cv.vision_model import VisionModel

KEYS_VARIABLE = "MOONDREAM_CV_API_KEYS"


def serve(
    model: options.Model = "moondream2",
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Address to listen on; 0.0.0.0 for all interfaces.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", min=1, max=65535, metavar="N", help="Port to listen on.")] = 2020,
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            metavar="NAME",
            help="Model name for clients. [dim]\\[default: the name of --model][/]",
            show_default=False,
        ),
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = None,
    adapter: options.Adapter = None,
    masks: options.Masks = None,
    cache_images: Annotated[
        int,
        typer.Option(
            "--cache-images", min=0, metavar="N", help="Maximum number of cached encoded images, about 160 MB each."
        ),
    ] = 8,
    finetunes: Annotated[
        Path | None,
        typer.Option(
            "--finetunes",
            metavar="FOLDER",
            help="Folder of the finetunes. [dim]\\[default: MOONDREAM_CV_FINETUNES or a user data folder][/]",
            show_default=False,
        ),
    ] = None,
    api_keys: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            envvar=KEYS_VARIABLE,
            metavar="KEY",
            help="API key clients must send; repeatable. Prefer the environment variable: command lines are visible to "
            "other users.",
            show_default=False,
        ),
    ] = None,
    queue: Annotated[
        int, typer.Option("--queue", min=1, metavar="N", help="Maximum concurrent requests; further ones get 429.")
    ] = 256,
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout", min=0.1, metavar="SECONDS", help="Per-request time limit in seconds; slower requests get 504."
        ),
    ] = 120,
    drain: Annotated[
        float, typer.Option("--drain", min=0.1, metavar="SECONDS", help="Time limit of a graceful shutdown in seconds.")
    ] = 30,
    max_body: Annotated[
        int, typer.Option("--max-body", min=1, metavar="MIB", help="Maximum request size in MiB.")
    ] = 32,
    max_pixels: Annotated[
        int, typer.Option("--max-pixels", min=1, metavar="N", help="Maximum number of pixels per image.")
    ] = 50_000_000,
    decode_timeout: Annotated[
        float,
        typer.Option(
            "--decode-timeout",
            min=0.1,
            metavar="SECONDS",
            help="Time limit for decoding an image in seconds; slower images get 400.",
        ),
    ] = 10,
    private_urls: Annotated[
        bool,
        typer.Option("--allow-private-urls", help="Allow image URLs with loopback and private addresses."),
    ] = False,
    cors: Annotated[
        list[str] | None,
        typer.Option("--cors", metavar="ORIGIN", help="Allowed origin for CORS; repeatable.", show_default=False),
    ] = None,
    allowed_hosts: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-host",
            metavar="NAME",
            help="Allowed name in the Host header, without port; repeatable; * allows all names.",
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
            help="Log format; auto is text on a terminal and JSON otherwise.",
        ),
    ] = "auto",
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        typer.Option("--log-level", metavar="debug|info|warning|error", help="Minimum level of log messages."),
    ] = "info",
    ray: options.Ray = None,
    replicas: Annotated[
        int | None,
        typer.Option(
            "--replicas",
            min=1,
            metavar="N",
            help="Number of Ray Serve replicas. [dim]\\[default: one per GPU, or per machine without GPUs][/]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve a model over HTTP, with the APIs of Moondream, Roboflow Inference, OpenAI and fal.

    \b
    / is a playground, /health and /ready are probes, and /metrics is
    for Prometheus. SIGTERM waits for running requests before exiting.

    \b
    [bold]Examples[/]
    $ moondream-cv serve --model tiny
    $ MOONDREAM_CV_API_KEYS="first second" moondream-cv serve --host 0.0.0.0
    $ moondream-cv serve --masks facebook/sam2.1-hiera-small
    $ moondream-cv serve --ray local --replicas 2
    $ moondream-cv detect street.jpg -c person --model http://localhost:2020
    """
    check_installed()
    # Without this, idle PyTorch threads spin on the cores that decode images.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from moondream_cv.server.app import create_app
    from moondream_cv.server.logs import set_up_logging
    from moondream_cv.server.origin_protection import allowed_hosts_for
    from moondream_cv.server.settings import MIB, ServerSettings
    from moondream_cv.server.uvicorn_server import run_server
    from moondream_cv.urls import is_url

    # Check the options
    loading = ModelOptions(model, device, dtype, adapter, quantize)
    if is_url(model):
        check_remote(loading)
        if finetunes is not None:
            raise ValueError(f"--finetunes needs a local model, and {shown_model(model)} is a server; remove it")
        if ray is not None:
            raise ValueError(f"--ray needs a local model, and {shown_model(model)} is a server; remove it")
    if replicas is not None and ray is None:
        raise ValueError("--replicas needs --ray, such as --ray local")
    if (certificate is None) != (certificate_key is None):
        raise ValueError("--tls-cert and --tls-key must be used together")
    if finetunes is not None and finetunes.exists() and not finetunes.is_dir():
        raise ValueError(f"--finetunes must be a folder, got {str(finetunes)!r}, which is a file")
    for file in (certificate, certificate_key):
        if file is not None and not file.is_file():
            raise ValueError(f"--tls-cert and --tls-key must be files, got {str(file)!r}, which does not exist")
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
        finetunes=finetunes,
    )

    # Announce the address
    as_json = log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())
    set_up = partial(set_up_logging, log_level, as_json)
    set_up()
    scheme = "http" if certificate is None else "https"
    shown_host = "localhost" if host == "127.0.0.1" else f"[{host}]" if ":" in host else host
    announcement = f"Serving {shown_model(model)} at {scheme}://{shown_host}:{port}"
    if not chosen.api_keys and host not in ("127.0.0.1", "::1", "localhost"):
        warning = (
            f"Warning: no API key is set, so everyone who can reach {host} can use the server; set {KEYS_VARIABLE}"
        )
        typer.echo(warning, err=True)
    announce = partial(typer.echo, announcement, err=True)

    # Run the server
    load_mask_function = None
    if masks is not None:
        load_mask_function = partial(load_masks, _with_absolute_path(masks), device, False)
    files = (None if file is None else str(file.absolute()) for file in (certificate, certificate_key))
    tls = dict(zip(("certificate", "certificate_key"), files, strict=True))
    name = name or public_name(model)
    if ray is not None:
        from moondream_cv.loading import check_name
        from moondream_cv.server.ray_serve import run_on_ray

        check_name(model)
        load = partial(open_replica_model, with_absolute_paths(loading), cache_images, set_up)
        run_on_ray(
            load, name, chosen, host, port, announce, address=ray, replicas=replicas, device=device,
            json_logs=as_json, load_masks=load_mask_function, **tls,
        )  # fmt: skip
        return
    load = partial(open_model, loading, cache_images, set_up)
    app = create_app(load, name=name, settings=chosen, load_masks=load_mask_function)
    run_server(app, host, port, announce, **tls)


def check_installed() -> None:
    """Check that the packages of the extra `server` are installed.

    Raises:
        ValueError: A package is missing.
    """
    try:
        import aiohttp  # noqa: F401
        import cachetools  # noqa: F401
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import pythonjsonlogger  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f'serve needs the package {error.name}; pip install "moondream-cv[server]"') from error


def open_model(options: ModelOptions, cache_images: int, set_up: Callable[[], None]) -> VisionModel | ProcessEngine:
    """Load the model in a separate process, or connect to another server.

    Args:
        options: Model and loading options.
        cache_images: Maximum number of cached encoded images.
        set_up: Function that sets up logging in the process.

    Raises:
        MoondreamError: The model cannot be loaded, or the server is unreachable.
        ValueError: The device does not exist.
    """
    from moondream_cv.urls import is_url

    if is_url(options.name):
        from moondream_cv.backends import connect

        return connect(options.name)
    from moondream_cv.server.runtime.engine_process import ProcessEngine

    return ProcessEngine(partial(load_model, options, cache_images), set_up)


def open_replica_model(
    options: ModelOptions, cache_images: int, set_up: Callable[[], None]
) -> VisionModel | ProcessEngine:
    """Set up the process of a replica, and load the model in another process, as `open_model` does."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    set_up()
    return open_model(options, cache_images, set_up)


def with_absolute_paths(options: ModelOptions) -> ModelOptions:
    """Return the options with absolute paths, for processes with another working directory."""
    adapter = options.adapter and _with_absolute_path(options.adapter)
    return replace(options, name=_with_absolute_path(options.name), adapter=adapter)


def _with_absolute_path(name: str) -> str:
    """Return the absolute path of an existing file or folder, and any other name unchanged."""
    return os.path.abspath(name) if os.path.exists(name) else name


def load_model(options: ModelOptions, cache_images: int) -> LocalModel:
    """Load a local model; called in the engine process."""
    from moondream_cv.loading import load

    return load(options.name, **options.load_arguments(), cache_images=cache_images)


def public_name(model: str) -> str:
    """Return the model name for clients: the last part of a folder, "moondream2" for a server, or else the name."""
    from moondream_cv.urls import is_url

    if is_url(model):
        return "moondream2"
    path = Path(model)
    return path.resolve().name if path.exists() or path.is_absolute() else model
