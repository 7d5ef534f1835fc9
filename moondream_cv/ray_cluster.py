"""Connection to a Ray cluster, and the resources of workers that each run a model."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from moondream_cv.errors import MoondreamError

LOCAL = "local"
"""Address of a new Ray instance on this machine."""

_CONNECT_SECONDS = 10.0

ENVIRONMENT = {
    "RAY_COLOR_PREFIX": "0",  # no escape sequences in logs
    "RAY_DEDUP_LOGS": "0",  # Ray would drop log lines that differ only in numbers
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",  # a prefix would break logs in JSON
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray would send statistics to its vendor
}


@dataclass(frozen=True)
class WorkerResources:
    """Workers that each run a model.

    Attributes:
        count: Number of workers.
        num_cpus: CPU cores per worker.
        num_gpus: GPUs per worker, 0 or 1.
    """

    count: int
    num_cpus: int
    num_gpus: int


@contextlib.contextmanager
def connected(address: str, *, show_logs: bool) -> Iterator[bool]:
    """Connect to a Ray cluster, or start a local one, for the length of a `with`.

    A connection that the process already has is used, and stays open.

    Args:
        address: "local", "auto" for the cluster that this machine belongs to, "HOST:PORT", or "ray://HOST:PORT".
        show_logs: Whether to write the logs of the workers to standard error. Ray writes them to files in any case.

    Yields:
        Whether all processes of Ray end with the `with`, as those of a local Ray do.

    Raises:
        ValueError: Ray is not installed.
        MoondreamError: The cluster is unreachable.
    """
    # Import Ray with its settings
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise ValueError(f'Ray needs the package {error.name}; pip install "moondream-cv[ray]"') from error

    # Connect
    if ray.is_initialized():
        yield False
        return
    check_reachable(address)
    try:
        with _sigterm_handler_kept():
            ray.init(
                address,
                include_dashboard=False if address == LOCAL else None,
                logging_level=logging.ERROR,
                log_to_driver=show_logs,
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise MoondreamError(f"cannot connect to the Ray cluster {address!r}: {error}") from error
    try:
        yield address == LOCAL
    finally:
        ray.shutdown()


def plan_workers(count: int | None, device: str | None) -> WorkerResources:
    """Return the workers for the connected cluster: one GPU per worker, or the same number of CPU cores.

    Args:
        count: Number of workers; None selects one per GPU, or one per node of a cluster without GPUs.
        device: Device of the model; None selects GPUs if the cluster has any.

    Raises:
        ValueError: The device is one GPU of several.
        MoondreamError: The cluster is too small.
    """
    import ray

    return divide_nodes([node["Resources"] for node in ray.nodes() if node["Alive"]], count, device)


def divide_nodes(nodes: Sequence[Mapping[str, float]], count: int | None, device: str | None) -> WorkerResources:
    """Return the workers for nodes.

    Args:
        nodes: Resources of each node, such as `{"CPU": 8.0, "GPU": 1.0}`.
        count: Number of workers, or None, as in `plan_workers`.
        device: Device of the model, or None, as in `plan_workers`.

    Raises:
        ValueError: The device is one GPU of several.
        MoondreamError: The nodes are too small.
    """
    # One GPU per worker
    if device is not None and device.startswith("cuda:"):
        raise ValueError(f"device must be 'cuda' on Ray, which assigns a GPU to each worker, got {device!r}")
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if device == "cuda" or (device is None and gpus):
        count = count or max(gpus, 1)
        if gpus < count:
            raise MoondreamError(f"{count} workers need {count} GPUs, and the Ray cluster has {gpus}")
        return WorkerResources(count, 1, 1)

    # Divide the CPU cores: each worker runs on one node
    cores = [int(node.get("CPU", 0)) for node in nodes]
    count = count or max(sum(number > 0 for number in cores), 1)
    sizes = range(max(cores, default=0), 0, -1)
    num_cpus = next((size for size in sizes if sum(number // size for number in cores) >= count), None)
    if num_cpus is None:
        raise MoondreamError(f"{count} workers need {count} CPU cores, and the Ray cluster has {sum(cores)}")
    return WorkerResources(count, num_cpus, 0)


def last_error(traceback: str) -> str:
    """Return the message of the last error in a traceback, without its type.

    Args:
        traceback: Text that Ray returns for an error in a worker.
    """
    lines = traceback.strip().splitlines()
    return re.sub(r"^[\w.]+: ", "", lines[-1]) if lines else "no reason is given"


def check_reachable(address: str) -> None:
    """Check that something listens at the address of a cluster, because Ray tries for minutes to connect.

    Args:
        address: Address as for `connected`. Only "HOST:PORT" and "ray://HOST:PORT" are checked.

    Raises:
        MoondreamError: The address does not accept connections.
    """
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise MoondreamError(f"cannot connect to the Ray cluster {address!r}: {error}; check the address") from error


@contextlib.contextmanager
def _sigterm_handler_kept() -> Iterator[None]:
    """Restore the handler of SIGTERM, which Ray replaces by one that exits with status 15."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        signal.signal(signal.SIGTERM, handler)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)
