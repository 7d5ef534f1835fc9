"""A model in a process of its own answers as one in this process, and its end is noticed.

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
from moondream_cv.engine.local import LocalModel
from moondream_cv.errors import CheckpointError, MoondreamError
from moondream_cv.server.runtime.engine_process import ProcessEngine
from tests.helpers.models import endless_model
from tests.helpers.served import Served, served
from tests.helpers.waiting import until

FIRM = {"temperature": 0}


@pytest.fixture(scope="module")
def apart() -> Iterator[Served]:
    """The tiny model, with room for encoded images."""
    engine = ProcessEngine(partial(load_model, ModelOptions("tiny", "cpu"), 4))
    with served(engine) as running:
        yield running
    engine.close()


@pytest.fixture
def talking() -> Iterator[tuple[ProcessEngine, Served]]:
    """A model whose texts go on for seconds."""
    engine = ProcessEngine(endless_model)
    with served(engine) as running:
        yield engine, running
    engine.close()


def long_caption(uri: str, stream: bool = False, max_tokens: int = 100_000) -> dict[str, Any]:
    return {"image_url": uri, "stream": stream, "settings": {**FIRM, "max_tokens": max_tokens}}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/detect", {"object": "blue square"}),
        ("/v1/detect", {"object": "blue square", "settings": {"max_crops": 1}}),
        ("/v1/point", {"object": "cat"}),
        ("/v1/query", {"question": "How many cats are there?", "settings": FIRM}),
        ("/v1/caption", {"length": "short", "settings": FIRM}),
        ("/v1/detect", {"object": "dog " * 2000}),
    ],
)
def test_answers_are_those_of_the_model_in_this_process(
    apart: Served, server: Served, uri: str, path: str, body: dict[str, Any]
) -> None:
    found, right = (running.post(path, {**body, "image_url": uri}) for running in (apart, server))
    assert found.status_code == right.status_code
    drop = {"request_id"}
    assert {k: v for k, v in found.json().items() if k not in drop} == {
        k: v for k, v in right.json().items() if k not in drop
    }


def test_pieces_come_as_they_are_made(apart: Served, server: Served, uri: str) -> None:
    body = {"image_url": uri, "stream": True, "settings": FIRM}
    streams = []
    for running in (apart, server):
        with running.client.stream("POST", "/v1/caption", json=body) as answer:
            streams.append([json.loads(line[6:]) for line in answer.iter_lines() if line])
    assert streams[0] == streams[1]
    assert len(streams[0]) > 5


def test_what_is_counted_arrives(apart: Served, uri: str) -> None:
    for name in ("cat", "red circle"):
        apart.post("/v1/detect", {"image_url": uri, "object": name})
    text = apart.client.get("/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(lines['moondream_cv_tokens_total{kind="prompt"}']) > 100
    assert float(lines["moondream_cv_batch_rows_count"]) > 0
    assert (
        float(lines['moondream_cv_image_cache_total{outcome="hit"}']) > 0
    )  # the crops alone travel, and it knows them


def test_many_at_once_are_not_mixed_up(apart: Served, uri: str) -> None:
    names = ["cat", "red circle", "blue square", "dog"]
    with ThreadPoolExecutor(16) as pool:
        asked = [names[i % 4] for i in range(48)]
        answers = list(pool.map(lambda name: apart.post("/v1/detect", {"image_url": uri, "object": name}), asked))
    counts = {
        name: len(apart.post("/v1/detect", {"image_url": uri, "object": name}).json()["objects"]) for name in names
    }
    assert set(counts.values()) == {0, 1}
    assert [len(answer.json()["objects"]) for answer in answers] == [counts[name] for name in asked]


def test_a_client_that_leaves_frees_its_place(talking: tuple[ProcessEngine, Served], uri: str) -> None:
    engine, running = talking
    with running.client.stream("POST", "/v1/caption", json=long_caption(uri, stream=True)) as answer:
        next(answer.iter_lines())
        assert len(engine._calls) == 1
    until(lambda: not engine._calls and running.service.in_flight == 0)


def test_a_process_that_dies_is_noticed(talking: tuple[ProcessEngine, Served], uri: str) -> None:
    engine, running = talking
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


def test_a_shutdown_finishes_what_is_running(uri: str) -> None:
    engine = ProcessEngine(endless_model)
    with ThreadPoolExecutor() as pool, served(engine) as running:
        answer = pool.submit(running.post, "/v1/caption", long_caption(uri, max_tokens=600))
        until(lambda: len(engine._calls) == 1)
        finished = answer  # the client of `served` is closed first, so wait for it
        assert finished.result().status_code == 200
    engine.close()
    assert not engine.alive


def refuse() -> LocalModel:
    raise CheckpointError("there is no such model")


def vanish() -> LocalModel:
    os._exit(3)


class Unportable(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def raise_what_does_not_travel() -> LocalModel:
    raise Unportable(1, 2)


@pytest.mark.parametrize(
    ("load", "error", "said"),
    [
        (refuse, CheckpointError, "no such model"),
        (vanish, MoondreamError, "ended while it loaded"),
        (raise_what_does_not_travel, MoondreamError, "Unportable: 1 and 2"),
    ],
)
def test_why_a_model_cannot_be_loaded_is_told(load: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        ProcessEngine(load)


def test_an_image_travels_without_its_pixels(tiny: LocalModel) -> None:
    prepared = tiny.preprocess_image(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    light = pickle.loads(pickle.dumps(prepared.without_pixels(None)))
    assert light.size == (400, 300)
    assert light.digest == prepared.digest
    default = tiny.config.vision.max_crops
    assert np.array_equal(light.crops(default).pixels, prepared.crops(default).pixels)
    assert len(pickle.dumps(light)) < prepared.rgb.nbytes
    assert prepared.without_pixels(1) is prepared  # other crops have to be cut there
    again = pickle.loads(pickle.dumps(prepared))
    assert np.array_equal(again.crops(1).pixels, prepared.crops(1).pixels)
