"""Runs the application on Ray Serve replicas until a signal stops it.

Each replica is one process with the application and its engine. Ray Serve receives HTTP requests, distributes them to
the replicas, and replaces replicas that fail.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moondream_cv.errors import MoondreamError
from moondream_cv.ray_cluster import WorkerResources, connected, last_error, plan_workers
from moondream_cv.server.app import create_app
from moondream_cv.server.settings import ServerSettings
from moondream_cv.server.uvicorn_server import CONNECTIONS, KEEP_ALIVE, listen

if TYPE_CHECKING:
    from ray.serve import Application

    from moondream_cv.masks import MaskFunction
    from moondream_cv.server.service import ModelSource

APPLICATION = "moondream-cv"
HEALTH_SECONDS = 2.0  # between two health checks of a replica
LOAD_ATTEMPTS = 3  # starts of a replica that fail before the application fails
STOP_SECONDS = 30.0  # in addition to the time for running requests: the time limit for stopping a replica
POLL_SECONDS = 0.1


class Replica:
    """The deployment class of Ray Serve, which adds the application as `app`."""

    app: FastAPI

    async def check_health(self) -> None:
        """Raise an error if the engine has failed; Ray Serve then replaces the replica."""
        if self.app.state.service.engine_failed:
            raise MoondreamError("the engine has failed; see the log for the reason")


class ProxyRequestIds:
    """ASGI middleware that removes the header X-Request-Id of responses, because the proxy of Ray Serve adds it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI event stream."""

        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["X-Request-Id"]
            await send(message)

        await self._app(scope, receive, send_without_id)


def run_on_ray(
    load: Callable[[], ModelSource],
    name: str,
    settings: ServerSettings,
    host: str,
    port: int,
    announce: Callable[[], None] = lambda: None,
    *,
    address: str,
    replicas: int | None = None,
    device: str | None = None,
    json_logs: bool = True,
    load_masks: Callable[[], MaskFunction] | None = None,
    certificate: str | None = None,
    certificate_key: str | None = None,
) -> None:
    """Serve a model on Ray Serve replicas until SIGTERM or SIGINT; running requests are finished first.

    The function returns after SIGTERM, so that the process exits with status 0. After SIGINT, it raises
    `KeyboardInterrupt`. Call it in the main thread.

    Args:
        load: Loads the model or the engine of a replica. It must be picklable, and can also set up the process.
        name: Model name that clients use.
        settings: Settings of each replica. They are stored in the cluster, with the API keys.
        host: IP address that the proxies of Ray Serve listen on.
        port: Port that the proxies listen on.
        announce: Called when all replicas are ready.
        address: Address of the Ray cluster, see `ray_cluster.connected`.
        replicas: Number of replicas; None starts one per GPU, or one per node of a cluster without GPUs.
        device: Device of the model; None selects GPUs if the cluster has any.
        json_logs: Whether Ray Serve logs JSON.
        load_masks: Loads the mask function of a replica, as for `create_app`. It must be picklable.
        certificate: Path of a PEM certificate for https, on every node.
        certificate_key: Path of the PEM private key of the certificate.

    Raises:
        MoondreamError: The address is in use, the cluster is unreachable or too small, or the replicas cannot start.
        ValueError: Ray is not installed, or the device is one GPU of several.
    """
    # Ray Serve reports an address in use only in the log of its proxy
    if not address.startswith("ray://"):
        for opened in listen(host, port):
            opened.close()

    with _until_sigterm(), connected(address, show_logs=True) as is_local:
        from ray import serve

        # Plan the replicas
        workers = plan_workers(replicas, device)
        deployment = create_deployment(load, name, replace(settings, replicas=workers.count), workers, load_masks)
        http_options = {
            "host": host,
            "port": port,
            "keep_alive_timeout_s": KEEP_ALIVE,
            "ssl_certfile": certificate,
            "ssl_keyfile": certificate_key,
        }
        _check_unused()

        # Start the replicas
        is_ready = False
        try:
            serve.start(http_options=http_options, logging_config=_logging_config(json_logs))
            try:
                serve.run(deployment, name=APPLICATION, route_prefix="/")
            except RuntimeError as error:
                raise MoondreamError(f"the replicas cannot start: {_reason()}") from error

            # Serve until a signal arrives
            is_ready = True
            announce()
            threading.Event().wait()
        finally:
            if is_ready:
                _finish_requests(settings.drain)
            if not is_local:
                serve.shutdown()


def create_deployment(
    load: Callable[[], ModelSource],
    name: str,
    settings: ServerSettings,
    workers: WorkerResources,
    load_masks: Callable[[], MaskFunction] | None = None,
) -> Application:
    """Return the application for `ray.serve.run`.

    Args:
        load: Loads the model or the engine of a replica, as for `run_on_ray`.
        name: Model name that clients use.
        settings: Settings of each replica, with their number.
        workers: Number and resources of the replicas.
        load_masks: Loads the mask function of a replica, as for `run_on_ray`.
    """
    from ray import serve

    def build_app() -> FastAPI:  # a function: Ray Serve calls it in each replica
        app = create_app(load(), name=name, settings=settings, load_masks=load_masks)
        app.add_middleware(ProxyRequestIds)
        return app

    deploy = serve.deployment(
        num_replicas=workers.count,
        ray_actor_options={"num_cpus": workers.num_cpus, "num_gpus": workers.num_gpus},
        max_ongoing_requests=settings.queue + CONNECTIONS,  # the service rejects requests above its own limit
        health_check_period_s=HEALTH_SECONDS,
        graceful_shutdown_wait_loop_s=POLL_SECONDS,
        graceful_shutdown_timeout_s=settings.drain + STOP_SECONDS,
        max_constructor_retry_count=LOAD_ATTEMPTS,
        logging_config={"enable_access_log": False},  # RequestLoggingMiddleware logs requests
    )
    return deploy(serve.ingress(build_app)(Replica)).bind()


def _logging_config(as_json: bool) -> dict[str, str]:
    return {"log_level": "WARNING", "encoding": "JSON" if as_json else "TEXT"}


def _check_unused() -> None:
    """Check that the cluster has no Ray Serve yet, because a second one would change neither address nor options.

    Raises:
        MoondreamError: Ray Serve runs on the cluster.
    """
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if serve.status().proxies:
        raise MoondreamError(
            "Ray Serve already runs on this cluster, with its own address; stop it with `serve shutdown`, or use"
            " another cluster"
        )


@contextlib.contextmanager
def _until_sigterm() -> Iterator[None]:
    """Leave the `with` on SIGTERM. Further signals do not interrupt the shutdown."""
    received = False

    def leave(*_: Any) -> None:
        nonlocal received
        if not received:
            received = True
            sys.exit(0)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except SystemExit:
        if not received:
            raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def _finish_requests(drain: float) -> None:
    """Stop the replicas after their running requests."""
    from ray import serve

    deadline = time.monotonic() + drain + STOP_SECONDS
    serve.delete(APPLICATION, _blocking=False)
    while APPLICATION in serve.status().applications and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _reason() -> str:
    """Return the message of the error that a replica has raised."""
    from ray import serve

    status = serve.status().applications.get(APPLICATION)
    messages = [] if status is None else [deployment.message for deployment in status.deployments.values()]
    return last_error("\n".join(messages))
