"""`moondream-cv serve --ray`: replicas on a local Ray, and the routes that need one process.

Run with `pytest tests/server/test_ray_serve.py`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from moondream_cv import Detector, connect, scenes
from moondream_cv.engine.local_model import LocalModel
from tests.helpers.processes import is_alive
from tests.helpers.serve_process import ServeProcess
from tests.helpers.served import served
from tests.helpers.waiting import until

KEY = "a-key-of-the-test"
NAMES = ["red circle", "blue square", "cat"]


def replicas_of(server: ServeProcess) -> set[int]:
    """Return the process IDs of the replicas."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    return {child.pid for child in children if is_alive(child, "ray::ServeReplica")}


@pytest.fixture
def ray_server() -> Iterator[ServeProcess]:
    pytest.importorskip("ray", reason="needs ray (make test-integrations)")
    server = ServeProcess("--model", "tiny", "--ray", "local", "--replicas", "2", key=KEY)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def test_routes_that_keep_state_need_one_process(tiny: LocalModel, uri: str) -> None:
    with served(tiny, replicas=2) as server:
        answers = {
            "/v1/tuning/finetunes": server.post("/v1/tuning/finetunes", {"name": "parts", "rank": 8}),
            "/queue/fal-ai/moondream2": server.post("/queue/fal-ai/moondream2", {"image_url": uri}),
            "/v1/batch": server.post("/v1/batch?action=mpu-create", {}),
            "/v1/batch/0": server.client.get("/v1/batch/0"),
            "/metrics": server.client.get("/metrics"),
        }
        for path, answer in answers.items():
            assert answer.status_code == 501, path
            assert f"{path} needs a server with one replica, and this one has 2" in answer.text
        assert server.post("/v1/detect", {"image_url": uri, "object": "cat"}).status_code == 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "tiny", "--replicas", "2"], "--replicas needs --ray"),
        (["--model", "http://localhost:9", "--ray", "local"], "--ray needs a local model"),
    ],
)
def test_invalid_options_are_rejected(arguments: list[str], message: str) -> None:
    status, log = ServeProcess(*arguments).finish()
    assert status == 2
    assert message in log
    assert "Traceback" not in log


@pytest.mark.integrations
@pytest.mark.slow
def test_error_of_a_replica_ends_the_command() -> None:
    pytest.importorskip("ray", reason="needs ray (make test-integrations)")
    status, log = ServeProcess("--model", "tiny", "--adapter", "missing.safetensors", "--ray", "local").finish()
    assert status == 1
    assert "Error: the replicas cannot start: the adapter 'missing.safetensors' does not exist" in log


@pytest.mark.integrations
@pytest.mark.slow
def test_replicas_serve_requests_until_sigterm(ray_server: ServeProcess, scene: scenes.Scene, uri: str) -> None:
    url, headers = ray_server.url, {"X-Moondream-Auth": KEY, "X-Request-Id": "one"}
    body: dict[str, Any] = {"image_url": uri, "object": "cat"}

    # Keys, request IDs, streams and errors are as without Ray
    assert httpx.post(f"{url}/v1/detect", json=body).status_code == 401
    found = httpx.post(f"{url}/v1/detect", json=body, headers=headers, timeout=240)
    assert len(found.json()["objects"]) == 1
    assert found.headers.get_list("x-request-id") == ["one"]
    streamed = httpx.post(f"{url}/v1/detect", json={**body, "stream": True}, headers=headers, timeout=240)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert '"completed":true' in streamed.text
    assert httpx.get(f"{url}/metrics", headers=headers).status_code == 501

    # A replica is killed while requests run
    expected = Detector("tiny")(scene.image[..., ::-1], NAMES)
    results: list[Any] = []
    stopping = threading.Event()

    def detect() -> None:
        detector = Detector(connect(url, api_key=KEY))
        while not stopping.is_set():
            try:
                results.append(detector(scene.image[..., ::-1], NAMES))
            except Exception as error:
                results.append(error)

    threads = [threading.Thread(target=detect) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: len(results) >= 6, message="the replicas return no detections")
    before = replicas_of(ray_server)
    killed = min(before)
    psutil.Process(killed).kill()
    num_before = len(results)
    until(lambda: len(results) >= num_before + 20, message="the other replica returns no detections")
    until(lambda: len(replicas_of(ray_server) - {killed}) == 2, message="the replica is not replaced")
    stopping.set()
    for thread in threads:
        thread.join()
    assert len(before) == 2
    for result in results:
        assert not isinstance(result, Exception), result
        np.testing.assert_array_equal(result.class_id, expected.class_id)
        np.testing.assert_allclose(result.xyxy, expected.xyxy, atol=2)  # pixels; sums differ by batch

    # The slots of a client that disconnects are released, and SIGTERM waits for a running request
    lines = [{"custom_id": str(i), "skill": "detect", "image_url": uri, "object": f"dog {i}"} for i in range(100)]
    content = "\n".join(map(json.dumps, lines))
    answered: list[dict[str, Any]] = []

    def send_batch() -> None:
        with httpx.stream("POST", f"{url}/v1/batch", content=content, **options) as response:
            answered.extend(map(json.loads, response.iter_lines()))

    options: dict[str, Any] = {"headers": {**headers, "Content-Type": "application/x-ndjson"}, "timeout": 240}
    with httpx.stream("POST", f"{url}/v1/batch", content=content, **options) as response:
        next(response.iter_lines())  # then the client disconnects
    idle = {"status": "ready", "requests": 0}
    until(lambda: all(httpx.get(f"{url}/ready").json() == idle for _ in range(8)), message="slots are not released")
    thread = threading.Thread(target=send_batch)
    thread.start()
    until(lambda: len(answered) > 0, message="the batch has no answers")
    children = psutil.Process(ray_server.process.pid).children(recursive=True)
    processes = [child for child in children if "Agent" not in child.name()]  # Ray's agents end later
    status, log = ray_server.end()
    thread.join()
    assert [line["custom_id"] for line in answered if "result" in line] == [line["custom_id"] for line in lines]

    # The log has no key, and nothing is left
    assert status == 0, log
    assert "Serving tiny at http://localhost:" in log
    entries = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    requests = [entry for entry in entries if entry.get("request_id") == "one" and entry.get("status") == 200]
    assert "POST /v1/detect 200" in {entry["message"] for entry in requests}
    assert KEY not in log
    until(lambda: not any(map(is_alive, processes)), message="processes are left")
