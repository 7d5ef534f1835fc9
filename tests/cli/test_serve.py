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

from moondream_cv.model.checkpoints import save_checkpoint
from moondream_cv.scenes import render_scene
from tests.helpers.models import endless_model
from tests.helpers.serve_process import ServeProcess, serving
from tests.helpers.served import data_uri

KEY = "a-key-of-the-test"


@pytest.fixture(scope="module")
def uri() -> str:
    return data_uri(Image.fromarray(render_scene(5, names=("cat",), style="plain").image))


def test_serves_logs_in_json_and_ends_well_with_sigterm(uri: str) -> None:
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


def test_a_signal_lets_requests_finish_and_takes_no_new_ones(tmp_path: Path, uri: str) -> None:
    model = endless_model()
    save_checkpoint(model.network, model.config, model.tokenizer, tmp_path)
    with serving("--model", str(tmp_path)) as server:
        listed = httpx.get(f"{server.url}/v1/models", timeout=240).json()["data"]
        assert [entry["id"] for entry in listed] == [tmp_path.name]  # the folder above it is nobody's business
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
def test_signals_stop_a_server_that_is_still_loading(sig: int, status: int) -> None:
    server = ServeProcess("--model", "tiny")
    try:
        while True:  # until it listens; the model takes seconds longer
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{server.url}/health").status_code == 200:
                    break
            assert server.process.poll() is None
            time.sleep(0.01)
        ended, log = server.end(sig)
    finally:
        server.process.kill()
    assert (ended, "Traceback" in log) == (status, False), log


def test_ctrl_c_ends_it_as_well() -> None:
    with serving("--model", "tiny", "--log-format", "text") as server:
        status, log = server.end(signal.SIGINT)
    assert status == 130
    assert "Traceback" not in log
    assert " INFO " in log


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--model", "tinny"], 1, "there is no model 'tinny'"),
        (["--model", "tiny", "--device", "cuda:9"], 2, "there is no device 'cuda:9'"),
        (["--model", "tiny", "--tls-cert", "cert.pem"], 2, "--tls-cert and --tls-key go together"),
        (["--model", "tiny", "--tls-cert", "no.pem", "--tls-key", "no.pem"], 2, "there is no file 'no.pem'"),
        (["--model", "tiny", "--api-key", " "], 2, "API keys must"),
        (["--model", "tiny", "--queue", "0"], 2, "--queue"),
        (["--model", "tiny", "--log-level", "loud"], 2, "--log-level"),
        (["--model", "tiny", "--host", "256.1.1.1"], 1, "cannot listen on 256.1.1.1"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(arguments: list[str], status: int, said: str) -> None:
    ended, log = ServeProcess(*arguments).finish()
    assert ended == status, log
    assert said in log
    assert "Traceback" not in log


def test_a_port_that_is_taken_is_said() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        process = subprocess.run(
            [sys.executable, "-m", "moondream_cv", "serve", "--model", "tiny", "-p", str(holder.getsockname()[1])],
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert process.returncode == 1
    assert "Address already in use; choose another --host or --port" in process.stderr
    assert "Serving" not in process.stderr
    assert "Traceback" not in process.stderr


def test_a_server_may_stand_in_for_the_model_wherever_one_is_named(tmp_path: Path) -> None:
    picture = tmp_path / "cat.png"
    Image.fromarray(render_scene(5, names=("cat",), style="plain").image).save(picture)

    def detected(model: str) -> dict[str, Any]:
        run = subprocess.run(
            [sys.executable, "-m", "moondream_cv", "detect", str(picture), "-c", "cat", "-m", model, "--json"],
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


def test_a_gateway_loads_nothing() -> None:
    refused = subprocess.run(
        [sys.executable, "-m", "moondream_cv", "serve", "--model", "http://u:secret@localhost:1", "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert refused.returncode == 2
    assert "http://localhost:1 is a server" in refused.stderr
    assert "secret" not in refused.stderr


def test_without_its_engine_a_server_ends() -> None:
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
