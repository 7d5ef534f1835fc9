"""A server that is killed and restarted under load: clients that retry get the correct answers.

Run with `pytest tests/server/test_restart.py`; `make soak` runs it longer.
"""

from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from moondream_cv.backends import MoondreamAPI
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.requests import Caption, Detect, Query, Request, Result, Settings
from moondream_cv.scenes import render_scene
from tests.helpers.serve_process import ServeProcess, free_port

CLIENTS = 8
ALWAYS_SAME = Settings(temperature=0)


def requests_of(client: int, number: int) -> list[Request]:
    """Return the requests of one client: separate images and all skills."""
    made: list[Request] = []
    for index in range(number):
        scene = render_scene(100 * client + index, resolution_wh=(160, 120), names=("cat", "red circle"))
        image = Image.fromarray(scene.image)
        made.append(
            (
                Detect(image, "cat"),
                Query(image, "How many cats are there?", settings=ALWAYS_SAME),
                Caption(image, "short", ALWAYS_SAME),
            )[index % 3]
        )
    return made


def run_through_kills(tiny: LocalModel, requests: int, kills: int) -> None:
    """Run clients while the server is killed several times, and check every answer."""
    port, answered = free_port(), threading.Semaphore(0)
    server = ServeProcess("--model", "tiny", port=port)
    server.wait_until_ready()

    def work(client: int) -> list[Result]:
        results = []
        with MoondreamAPI(server.url, retries=12, backoff=0.2, image_format="png") as remote:
            for request in requests_of(client, requests):
                results += remote.run([request])
                answered.release()
        return results

    try:
        with ThreadPoolExecutor(CLIENTS) as pool:
            work_done = [pool.submit(work, client) for client in range(CLIENTS)]
            for _ in range(kills):
                for _ in range(CLIENTS * requests // (kills + 2)):  # answers between two kills
                    assert answered.acquire(timeout=240)
                server.process.send_signal(signal.SIGKILL)
                server.process.wait()
                time.sleep(0.3)  # without a server
                server = ServeProcess("--model", "tiny", port=port)
            for client, done in enumerate(work_done):
                expected = tiny.run(requests_of(client, requests))
                for found, right in zip(done.result(timeout=300), expected, strict=True):
                    assert_alike(found, right)
    finally:
        server.process.kill()
        server.process.wait()


def assert_alike(found: Result, right: Result) -> None:
    """Check that answers are equal up to rounding, which depends on the batch."""
    one, other = found.to_dict(), right.to_dict()  # type: ignore[union-attr]
    assert one.keys() == other.keys()
    for key in one.keys() - {"logprob", "objects"}:
        assert one[key] == other[key]
    for box, true_box in zip(one.get("objects", []), other.get("objects", []), strict=True):
        assert box == pytest.approx(true_box, abs=2e-3)


def test_retrying_clients_finish_after_a_restart(tiny: LocalModel) -> None:
    run_through_kills(tiny, requests=12, kills=1)


@pytest.mark.soak
def test_retrying_clients_finish_after_many_restarts(tiny: LocalModel) -> None:
    run_through_kills(tiny, requests=300, kills=10)
