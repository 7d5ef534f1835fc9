"""`moondream-cv serve` as a process: starting, keys, signals, wrong arguments.

Run with `pytest tests/cli/test_serve.py`.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image

from moondream_cv.finetune.store import FinetuneStore
from moondream_cv.model.checkpoints import save_checkpoint
from moondream_cv.scenes import render_scene
from tests.helpers.models import endless_model
from tests.helpers.serve_process import ServeProcess, serving
from tests.helpers.served import data_uri
from tests.helpers.tuning import fine_tune, no_objects

KEY = "a-key-of-the-test"


@pytest.fixture(scope="module")
def uri() -> str:
    return data_uri(Image.fromarray(render_scene(5, names=("cat",), style="plain").image))


def test_server_logs_json_and_exits_with_0_on_sigterm(uri: str) -> None:
    with serving("--model", "tiny", key=f"other {KEY}") as server:
        headers = {"X-Moondream-Auth": KEY, "X-Request-Id": "one"}
        body = {"image_url": uri, "object": "cat"}
        assert httpx.post(f"{server.url}/v1/detect", json=body, timeout=240).status_code == 401
        found = httpx.post(f"{server.url}/v1/detect?api_key={KEY}", json=body, headers=headers, timeout=240)
        assert len(found.json()["objects"]) == 1
        status, log = server.end()
    assert status == 0
    assert "Serving tiny at http://localhost:" in log
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert {"time", "level", "logger", "message"} <= lines[0].keys()
    (answered,) = (line for line in lines if line.get("request_id") == "one" and line["logger"].endswith(".middleware"))
    assert (answered["message"], answered["status"]) == ("POST /v1/detect 200", 200)
    assert KEY not in log
    assert lines[-1]["message"].startswith("Finished server process")


def test_finetunes_option_selects_the_folder(tmp_path: Path, uri: str) -> None:
    folder = tmp_path / "finetunes"
    with serving("--model", "tiny", "--finetunes", str(folder)) as server:
        assert not folder.exists()
        ft = fine_tune(server.url)
        assert ft.train_step([no_objects(uri)])["step"] == 1
        ft.save_checkpoint()
        status, _ = server.end()
    assert status == 0
    with FinetuneStore(folder) as store:  # not locked any more
        assert [record.step for record in store.list_checkpoints(ft.finetune_id)[0]] == [1]


def test_signal_completes_running_requests_and_rejects_new_ones(tmp_path: Path, uri: str) -> None:
    model = endless_model()
    save_checkpoint(model.network, model.config, model.tokenizer, tmp_path)
    with serving("--model", str(tmp_path)) as server:
        listed = httpx.get(f"{server.url}/v1/models", timeout=240).json()["data"]
        assert [entry["id"] for entry in listed] == [tmp_path.name]  # without the parent folder
        answers: list[httpx.Response] = []
        body: dict[str, Any] = {"image_url": uri, "settings": {"temperature": 0, "max_tokens": 1500}}
        thread = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{server.url}/v1/caption", json=body, timeout=240))
        )
        thread.start()
        while httpx.get(f"{server.url}/ready", timeout=240).json()["requests"] == 0:
            time.sleep(0.01)
        _, log = server.end()
        thread.join()
    assert answers[0].status_code == 200
    assert answers[0].json()["truncated"]
    assert "shutting down: waiting for 1 requests" in log
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


@pytest.mark.parametrize(("sig", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_stop_a_server_while_it_loads(sig: int, status: int) -> None:
    server = ServeProcess("--model", "tiny")
    try:
        while True:  # until the server listens, seconds before the model is loaded
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{server.url}/health").status_code == 200:
                    break
            assert server.process.poll() is None
            time.sleep(0.01)
        ended, log = server.end(sig)
    finally:
        server.process.kill()
    assert (ended, "Traceback" in log) == (status, False), log


def test_ctrl_c_exits_with_130() -> None:
    with serving("--model", "tiny", "--log-format", "text") as server:
        status, log = server.end(signal.SIGINT)
    assert status == 130
    assert "Traceback" not in log
    assert " INFO " in log


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--model", "tinny"], 1, "there is no model 'tinny'"),
        (["--model", "tiny", "--device", "cuda:9"], 2, "there is no device 'cuda:9'"),
        (["--model", "tiny", "--tls-cert", "cert.pem"], 2, "--tls-cert and --tls-key must be used together"),
        (["--model", "tiny", "--tls-cert", "no.pem", "--tls-key", "no.pem"], 2, "must be files, got 'no.pem'"),
        (["--model", "tiny", "--finetunes", __file__], 2, "--finetunes must be a folder"),
        (["--model", "http://localhost:9", "--finetunes", "parts"], 2, "--finetunes needs a local model"),
        (["--model", "tiny", "--api-key", " "], 2, "API keys must"),
        (["--model", "tiny", "--queue", "0"], 2, "--queue"),
        (["--model", "tiny", "--log-level", "loud"], 2, "--log-level"),
        (["--model", "tiny", "--host", "256.1.1.1"], 1, "cannot listen on 256.1.1.1"),
    ],
)
def test_invalid_options_print_an_error_without_traceback(arguments: list[str], status: int, message: str) -> None:
    ended, log = ServeProcess(*arguments).finish()
    assert ended == status, log
    assert message in log
    assert "Traceback" not in log


def test_occupied_port_is_reported() -> None:
    with socket.socket() as occupied:
        occupied.bind(("127.0.0.1", 0))
        occupied.listen()
        process = subprocess.run(
            [sys.executable, "-m", "moondream_cv", "serve", "--model", "tiny", "-p", str(occupied.getsockname()[1])],
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert process.returncode == 1
    assert "Address already in use; choose another --host or --port" in process.stderr
    assert "Serving" not in process.stderr
    assert "Traceback" not in process.stderr


def test_server_url_as_the_model_of_a_command_and_a_server(tmp_path: Path) -> None:
    image = tmp_path / "cat.png"
    Image.fromarray(render_scene(5, names=("cat",), style="plain").image).save(image)

    def detected(model: str) -> dict[str, Any]:
        run = subprocess.run(
            [sys.executable, "-m", "moondream_cv", "detect", str(image), "-c", "cat", "-m", model, "--json"],
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert run.returncode == 0, run.stderr
        found: dict[str, Any] = json.loads(run.stdout)
        return found

    with serving("--model", "tiny") as server, serving("--model", server.url) as gateway:
        here = detected("tiny")
        for url in (server.url, gateway.url):
            there = detected(url.replace("http://", "http://someone:secret@"))
            assert there["images"] == here["images"]
            assert there["has_scores"]
            assert there["model"] == url
            assert "secret" not in json.dumps(there)


def test_device_with_a_server_url_is_rejected() -> None:
    refused = subprocess.run(
        [sys.executable, "-m", "moondream_cv", "serve", "--model", "http://u:secret@localhost:1", "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert refused.returncode == 2
    assert "http://localhost:1 is a server" in refused.stderr
    assert "secret" not in refused.stderr


def test_server_exits_if_its_engine_dies() -> None:
    with serving("--model", "tiny") as server:
        (engine,) = [
            child
            for child in psutil.Process(server.process.pid).children()
            if "spawn_main" in " ".join(child.cmdline())
        ]
        engine.kill()
        status, log = server.finish()
    assert status == 1
    assert "the engine has failed" in log
