"""A model in a separate process: answers, cancellation, failure and shutdown.

Run with `pytest tests/server/test_engine_process.py`.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest

from moondream_cv.cli.models import ModelOptions
from moondream_cv.cli.serve import load_model
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.errors import CheckpointError, MoondreamError
from moondream_cv.requests import Chat, Turn
from moondream_cv.server.runtime.engine_process import ProcessEngine, _without_pixels
from tests.helpers.models import endless_model
from tests.helpers.served import Served, served
from tests.helpers.waiting import until

GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def process_server() -> Iterator[Served]:
    """A server of the tiny model in a separate process, with a cache of encoded images."""
    engine = ProcessEngine(partial(load_model, ModelOptions("tiny", "cpu"), 4))
    with served(engine) as running:
        yield running
    engine.close()


@pytest.fixture
def endless_process() -> Iterator[tuple[ProcessEngine, Served]]:
    """A server of a model with endless replies in a separate process."""
    engine = ProcessEngine(partial(endless_model, 16_384))
    with served(engine) as running:
        yield engine, running
    engine.close()


def long_caption(uri: str, stream: bool = False, max_tokens: int = 100_000) -> dict[str, Any]:
    return {"image_url": uri, "stream": stream, "settings": {**GREEDY, "max_tokens": max_tokens}}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/detect", {"object": "blue square"}),
        ("/v1/detect", {"object": "blue square", "settings": {"max_crops": 1}}),
        ("/v1/point", {"object": "cat"}),
        ("/v1/query", {"question": "How many cats are there?", "settings": GREEDY}),
        ("/v1/caption", {"length": "short", "settings": GREEDY}),
        ("/v1/detect", {"object": "dog " * 2000}),
    ],
)
def test_answers_equal_those_of_a_thread_engine(
    process_server: Served, server: Served, uri: str, path: str, body: dict[str, Any]
) -> None:
    found, right = (running.post(path, {**body, "image_url": uri}) for running in (process_server, server))
    assert found.status_code == right.status_code
    drop = {"request_id"}
    assert {k: v for k, v in found.json().items() if k not in drop} == {
        k: v for k, v in right.json().items() if k not in drop
    }


def test_conversation_equals_that_of_a_thread_engine(process_server: Served, server: Served, uri: str) -> None:
    image = {"type": "image_url", "image_url": {"url": uri}}
    messages = [
        {"role": "user", "content": [image, {"type": "text", "text": "A cat?"}]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": [image, {"type": "text", "text": "How many cats are there?"}]},
    ]
    body = {"messages": messages, "max_tokens": 20, "seed": 3}
    found, right = (running.post("/v1/chat/completions", body).json() for running in (process_server, server))
    assert (found["choices"], found["usage"]) == (right["choices"], right["usage"])


def test_repeated_image_of_a_conversation_is_pickled_once(tiny: LocalModel) -> None:
    image = tiny.preprocess_image(np.zeros((60, 80, 3), np.uint8))
    first, second = _without_pixels(Chat((Turn("What?", "Black.", (image,)), Turn("Why?", images=(image,))))).images
    assert first is second
    assert pickle.loads(pickle.dumps(first)).size == image.size


def test_streamed_pieces_equal_those_of_a_thread_engine(process_server: Served, server: Served, uri: str) -> None:
    body = {"image_url": uri, "stream": True, "settings": GREEDY}
    streams = []
    for running in (process_server, server):
        with running.client.stream("POST", "/v1/caption", json=body) as answer:
            streams.append([json.loads(line[6:]) for line in answer.iter_lines() if line])
    assert streams[0] == streams[1]
    assert len(streams[0]) > 5


def test_metrics_include_counts_of_the_engine_process(process_server: Served, uri: str) -> None:
    for name in ("cat", "red circle"):
        process_server.post("/v1/detect", {"image_url": uri, "object": name})
    text = process_server.client.get("/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(lines['moondream_cv_tokens_total{kind="prompt"}']) > 100
    assert float(lines["moondream_cv_batch_rows_count"]) > 0
    assert (
        float(lines['moondream_cv_image_cache_total{outcome="hit"}']) > 0
    )  # repeated images are found by their digest


def test_concurrent_requests_get_their_own_answers(process_server: Served, uri: str) -> None:
    names = ["cat", "red circle", "blue square", "dog"]
    with ThreadPoolExecutor(16) as pool:
        asked = [names[i % 4] for i in range(48)]
        answers = list(
            pool.map(lambda name: process_server.post("/v1/detect", {"image_url": uri, "object": name}), asked)
        )
    counts = {
        name: len(process_server.post("/v1/detect", {"image_url": uri, "object": name}).json()["objects"])
        for name in names
    }
    assert set(counts.values()) == {0, 1}
    assert [len(answer.json()["objects"]) for answer in answers] == [counts[name] for name in asked]


def test_disconnect_cancels_the_call_and_releases_the_slot(
    endless_process: tuple[ProcessEngine, Served], uri: str
) -> None:
    engine, running = endless_process
    with running.client.stream("POST", "/v1/caption", json=long_caption(uri, stream=True)) as answer:
        next(answer.iter_lines())
        assert len(engine._calls) == 1
    until(lambda: not engine._calls and running.service.in_flight == 0)


def test_killed_engine_process_fails_requests_and_readiness(
    endless_process: tuple[ProcessEngine, Served], uri: str
) -> None:
    engine, running = endless_process
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(running.post, "/v1/caption", long_caption(uri))
        until(lambda: len(engine._calls) == 1)
        assert engine._process.pid is not None
        os.kill(engine._process.pid, signal.SIGKILL)
        answer = waiting.result()
    assert answer.status_code == 503
    assert "restart the server" in answer.json()["error"]["message"]
    until(lambda: running.client.get("/ready").status_code == 503)
    assert running.client.get("/health").status_code == 200
    assert running.post("/v1/caption", long_caption(uri)).status_code == 503


def test_shutdown_finishes_running_requests(uri: str) -> None:
    engine = ProcessEngine(partial(endless_model, 16_384))
    with ThreadPoolExecutor() as pool, served(engine) as running:
        answer = pool.submit(running.post, "/v1/caption", long_caption(uri, max_tokens=600))
        until(lambda: len(engine._calls) == 1)
        finished = answer  # wait here, because `served` closes the client first
        assert finished.result().status_code == 200
    engine.close()
    assert not engine.alive


def raise_checkpoint_error() -> LocalModel:
    raise CheckpointError("there is no such model")


def exit_process() -> LocalModel:
    os._exit(3)


class UnpicklableError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def raise_unpicklable_error() -> LocalModel:
    raise UnpicklableError(1, 2)


@pytest.mark.parametrize(
    ("load", "error", "message"),
    [
        (raise_checkpoint_error, CheckpointError, "no such model"),
        (exit_process, MoondreamError, "ended while it loaded"),
        (raise_unpicklable_error, MoondreamError, "UnpicklableError: 1 and 2"),
    ],
)
def test_load_errors_are_raised_in_the_server_process(load: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ProcessEngine(load)


def test_pickled_image_has_crops_without_pixels(tiny: LocalModel) -> None:
    prepared = tiny.preprocess_image(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    light = pickle.loads(pickle.dumps(prepared.without_pixels(None)))
    assert light.size == (400, 300)
    assert light.digest == prepared.digest
    default = tiny.config.vision.max_crops
    assert np.array_equal(light.crops(default).pixels, prepared.crops(default).pixels)
    assert len(pickle.dumps(light)) < prepared.rgb.nbytes
    assert prepared.without_pixels(1) is prepared  # other crops need the pixels
    again = pickle.loads(pickle.dumps(prepared))
    assert np.array_equal(again.crops(1).pixels, prepared.crops(1).pixels)
