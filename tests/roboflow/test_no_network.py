"""Test that the blocks make no network connections with a local model, including at import, and test the guard."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moondream_cv.tiny
from moondream_cv_blocks import ModelPool
from tests.helpers.network_guard import NetworkRefused, is_here, refusing_network
from tests.helpers.roboflow_app import skip_without_server
from tests.helpers.workflows import BLOCKS, compile_workflow, run_engine, step, workflow

skip_without_server()
pytestmark = pytest.mark.roboflow

ROOT = Path(__file__).parents[2]
FOLDER = str(Path(moondream_cv.tiny.__file__).parent)  # a local checkpoint folder
ELSEWHERE = "192.0.2.1"  # reserved for documentation
FIELDS: dict[str, dict[str, Any]] = {
    "detect": {"class_names": ["dog", "bus"]},
    "point": {"class_names": ["dog", "bus"]},
    "query": {"question": "How many dogs are there?", "reasoning": True},
    "caption": {},
    "track": {"class_names": ["dog", "bus"]},
}

# A process that installs the guard before any other import, and runs every block. Arguments: the packages to import
# first, a writable folder, and models. It prints the outputs of the blocks and the blocked attempts for each model.
PROCESS = """
import json, os, sys
from pathlib import Path

packages, folder, *models = sys.argv[1:]
from tests.helpers.network_guard import refusing_network

reports = {}
with refusing_network() as attempts:
    from tests.helpers.roboflow_app import declare_torchvision_schemas, prepare
    if packages == "server":
        prepare(Path(folder))
    else:
        declare_torchvision_schemas()
        os.environ["WORKFLOWS_PLUGINS"] = "moondream_cv_blocks"
    from moondream_cv.scenes import render_scene
    from tests.helpers.workflows import run_workflow, step, workflow

    image = render_scene(5, resolution_wh=(320, 240), names=["dog", "bus"], style="plain").image[..., ::-1].copy()
    for model in models:
        outputs = {
            block: run_workflow(workflow(step(block, model=model, **fields)), image, serialize=True)[0]
            for block, fields in json.loads(os.environ["FIELDS"]).items()
        }
        reports[model] = {"outputs": outputs, "attempts": list(attempts)}
print(json.dumps({"reports": reports, "server": "inference" in sys.modules}))
"""
LOCAL = ["tiny", FOLDER]
UNAVAILABLE = "nobody/nothing-here@main"


@pytest.mark.parametrize("model", LOCAL, ids=["tiny", "folder"])
def test_blocks_with_a_local_model_make_no_connection(bgr: np.ndarray, model: str) -> None:
    with refusing_network() as attempts:
        pool = ModelPool()  # a new pool, so that the model is loaded within the guard
        for block in BLOCKS:
            definition = workflow(step(block, model=model, **FIELDS[block]))
            engine = compile_workflow(definition, **{"moondream_cv_blocks.models": pool})
            for outputs in run_engine(engine, [bgr, bgr]):
                assert (outputs["error_status"], outputs["error_message"]) == (False, "")
        pool.close()
    assert attempts == []


@pytest.mark.parametrize("model", ["moondream2", "vikhyatk/moondream2@2025-06-21", f"http://{ELSEWHERE}:2020"])
def test_compiling_makes_no_connection(model: str) -> None:
    """Models are loaded with the first image."""
    with refusing_network() as attempts:
        for block in BLOCKS:
            compile_workflow(workflow(step(block, model=model, **FIELDS[block])))
    assert attempts == []


def test_guard_reports_the_connection_to_a_remote_model(bgr: np.ndarray) -> None:
    with refusing_network() as attempts:
        engine = compile_workflow(
            workflow(step("detect", model=f"http://{ELSEWHERE}:2020", class_names=["dog"])),
            **{"moondream_cv_blocks.models": ModelPool(timeout=1)},
        )
        (outputs,) = run_engine(engine, bgr)
    assert outputs["error_status"] is True
    assert any(ELSEWHERE in attempt for attempt in attempts)


def test_new_process_with_the_engine_makes_no_connection(tmp_path: Path) -> None:
    """Network access is enabled in the process: the download of an unavailable model is attempted and blocked."""
    reply = run_process(tmp_path, "engine", *LOCAL, UNAVAILABLE)
    assert not reply["server"]
    for model in LOCAL:
        assert_local(reply["reports"][model])
    assert any("huggingface.co" in attempt for attempt in reply["reports"][UNAVAILABLE]["attempts"])
    assert all(outputs["error_status"] for outputs in reply["reports"][UNAVAILABLE]["outputs"].values())


def test_new_process_with_the_server_makes_no_connection(tmp_path: Path) -> None:
    reply = run_process(tmp_path, "server", *LOCAL)
    assert reply["server"]
    for model in LOCAL:
        assert_local(reply["reports"][model])


def assert_local(report: dict[str, Any]) -> None:
    assert report["attempts"] == []
    assert report["outputs"].keys() == set(BLOCKS)
    for outputs in report["outputs"].values():
        assert (outputs["error_status"], outputs["error_message"]) == (False, "")
    assert len(report["outputs"]["detect"]["predictions"]["predictions"]) == 2


def run_process(folder: Path, packages: str, *models: str) -> dict[str, Any]:
    """Run `PROCESS` with a minimal environment and return the JSON that it prints."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
    environment = {
        **kept,
        "FIELDS": json.dumps(FIELDS),
        "HF_HOME": str(folder / "hub"),
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, packages, str(folder), *models],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


# --- The guard itself -----------------------------------------------------------------------------------------------


def connect(host: str) -> None:
    with socket.create_connection((host, 9), timeout=1):
        pass


def send(host: str, method: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        if method == "sendto":
            sender.sendto(b"x", (host, 9))
        elif method == "sendmsg":
            sender.sendmsg([b"x"], [], 0, (host, 9))
        else:
            sender.connect_ex((host, 9))


def open_connection(host: str) -> None:
    loop = asyncio.SelectorEventLoop()  # uvloop, which another test may have set, does not use Python's sockets
    try:
        loop.run_until_complete(asyncio.open_connection(host, 9))
    finally:
        loop.close()


ATTEMPTS: dict[str, Callable[[], Any]] = {
    "connect": lambda: connect(ELSEWHERE),
    "connect_ex": lambda: send(ELSEWHERE, "connect_ex"),
    "sendto": lambda: send(ELSEWHERE, "sendto"),
    "sendmsg": lambda: send(ELSEWHERE, "sendmsg"),
    "name": lambda: connect("name.example"),
    "getaddrinfo": lambda: socket.getaddrinfo(b"name.example", 80),
    "gethostbyname": lambda: socket.gethostbyname("name.example"),
    "gethostbyname_ex": lambda: socket.gethostbyname_ex("name.example"),
    "gethostbyaddr": lambda: socket.gethostbyaddr(ELSEWHERE),
    "getnameinfo": lambda: socket.getnameinfo((ELSEWHERE, 80), 0),
    "asyncio": lambda: open_connection(ELSEWHERE),
    "asyncio name": lambda: open_connection("name.example"),
}


@pytest.mark.parametrize("method", ATTEMPTS)
def test_guard_blocks_connections(method: str) -> None:
    with refusing_network() as attempts, pytest.raises(NetworkRefused):
        ATTEMPTS[method]()
    assert len(attempts) >= 1
    assert all(ELSEWHERE in attempt or "name.example" in attempt for attempt in attempts)


def test_guard_records_attempts_whose_error_is_caught() -> None:
    with refusing_network() as attempts:
        for _ in range(2):
            with pytest.raises(OSError, match="network access is blocked"):
                connect(ELSEWHERE)
    assert len(attempts) == 2


def test_guard_applies_to_other_threads() -> None:
    with refusing_network() as attempts:
        thread = threading.Thread(target=try_to_connect)
        thread.start()
        thread.join(240)
    assert len(attempts) == 1


def try_to_connect() -> None:
    with pytest.raises(NetworkRefused):
        connect(ELSEWHERE)


def test_guard_allows_local_connections(url: str) -> None:
    import requests

    with refusing_network() as attempts:
        assert requests.get(f"{url}/info", timeout=240).status_code == 200
        assert requests.get(url.replace("127.0.0.1", "localhost") + "/info", timeout=240).status_code == 200
        left, right = socket.socketpair()
        with left, right:
            left.sendall(b"x")
            assert right.recv(1) == b"x"
    assert attempts == []


def test_guard_can_be_removed() -> None:
    with refusing_network() as outer, refusing_network() as inner, pytest.raises(NetworkRefused):
        connect(ELSEWHERE)
    assert len(outer) == len(inner) == 1
    try:
        send(ELSEWHERE, "connect_ex")  # connecting a datagram socket sends no packets
    except NetworkRefused:
        pytest.fail("the guard is still active")
    assert len(outer) == 1


@pytest.mark.parametrize(
    ("host", "here"),
    [
        *(
            (None, True),
            ("", True),
            ("localhost", True),
            (b"localhost", True),
            ("127.0.0.1", True),
            ("127.1.2.3", True),
        ),
        *(("::1", True), ("0.0.0.0", True), ("::", True), ("::ffff:127.0.0.1", True)),
        *((ELSEWHERE, False), (b"192.0.2.1", False), ("name.example", False), ("localhost.name.example", False)),
        *(("10.0.0.1", False), ("fe80::1%eth0", False), ("::ffff:192.0.2.1", False), ("1270.0.0.1", False)),
    ],
)
def test_is_here_recognizes_local_addresses(host: Any, here: bool) -> None:
    assert is_here(host) is here
