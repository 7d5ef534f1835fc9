"""Division of a Ray cluster into workers. Run with `pytest tests/test_ray_cluster.py`."""

from __future__ import annotations

import socket
import sys

import pytest

from moondream_cv.errors import MoondreamError
from moondream_cv.ray_cluster import WorkerResources, check_reachable, connected, divide_nodes, last_error

GPU_NODE = {"CPU": 16.0, "GPU": 2.0}
HEAD = {"CPU": 0.0}


@pytest.mark.parametrize(
    ("nodes", "count", "device", "expected"),
    [
        ([{"CPU": 8.0}], None, None, WorkerResources(1, 8, 0)),
        ([{"CPU": 8.0}], 3, None, WorkerResources(3, 2, 0)),
        ([{"CPU": 8.0}, {"CPU": 8.0}], None, None, WorkerResources(2, 8, 0)),
        ([{"CPU": 8.0}, {"CPU": 8.0}], 3, None, WorkerResources(3, 4, 0)),  # 5 cores per worker would fit only twice
        ([HEAD, {"CPU": 2.0}, {"CPU": 6.0}], 4, "cpu", WorkerResources(4, 2, 0)),
        ([HEAD, GPU_NODE, GPU_NODE], None, None, WorkerResources(4, 1, 1)),
        ([GPU_NODE], 1, "cuda", WorkerResources(1, 1, 1)),
        ([GPU_NODE], None, "cpu", WorkerResources(1, 16, 0)),
    ],
)
def test_workers_get_one_gpu_or_equal_numbers_of_cores(
    nodes: list[dict[str, float]], count: int | None, device: str | None, expected: WorkerResources
) -> None:
    assert divide_nodes(nodes, count, device) == expected


@pytest.mark.parametrize(
    ("nodes", "count", "device", "message"),
    [
        ([{"CPU": 2.0}], 3, None, "3 workers need 3 CPU cores, and the Ray cluster has 2"),
        ([HEAD], None, None, "1 workers need 1 CPU cores, and the Ray cluster has 0"),
        ([GPU_NODE], 3, None, "3 workers need 3 GPUs, and the Ray cluster has 2"),
        ([{"CPU": 8.0}], None, "cuda", "1 workers need 1 GPUs, and the Ray cluster has 0"),
    ],
)
def test_small_clusters_are_rejected(
    nodes: list[dict[str, float]], count: int | None, device: str | None, message: str
) -> None:
    with pytest.raises(MoondreamError, match=message):
        divide_nodes(nodes, count, device)


def test_single_gpu_is_rejected() -> None:
    with pytest.raises(ValueError, match="device must be 'cuda' on Ray"):
        divide_nodes([GPU_NODE], None, "cuda:1")


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_address_without_a_cluster_is_reported(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"{scheme}127.0.0.1:{server.getsockname()[1]}"
        check_reachable(address)
    with pytest.raises(MoondreamError, match=r"cannot connect to the Ray cluster .*127\.0\.0\.1:.*; check the address"):
        check_reachable(address)
    for other in ("local", "auto"):
        check_reachable(other)


def test_missing_ray_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    error = pytest.raises(ValueError, match=r"Ray needs the package ray; pip install .moondream-cv\[ray\]")
    with error, connected("local", show_logs=False):
        pass


@pytest.mark.parametrize(
    ("traceback", "message"),
    [
        ('Traceback:\n  File "a.py"\nmoondream_cv.errors.CheckpointError: no file: a\n', "no file: a"),
        ("the actor died", "the actor died"),
        ("", "no reason is given"),
    ],
)
def test_last_error_is_the_message_of_a_traceback(traceback: str, message: str) -> None:
    assert last_error(traceback) == message
