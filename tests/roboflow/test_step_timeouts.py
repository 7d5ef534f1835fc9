"""A server that hangs holds a step for one time-out, however many images and classes the step has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from moondream_cv_blocks import ModelPool
from tests.helpers.remote_server import Answer, Asked, RemoteServer, remote_server
from tests.helpers.roboflow_app import skip_without_server
from tests.helpers.workflows import BLOCKS, FINDERS, block_step, check_nothing, compiled, in_video, results, workflow

skip_without_server()
pytestmark = pytest.mark.roboflow

CLASSES = [f"thing {number}" for number in range(8)]
LISTED = Answer({"models": [{"id": "any", "has_scores": True}]})
INFO = Answer({"name": "Roboflow Inference Server", "version": "1.8.3", "uuid": "u"})
ROUTES = ("/v1/detect", "/v1/point", "/v1/query", "/v1/caption")
BOX = {"x_min": 0.1, "y_min": 0.25, "x_max": 0.5, "y_max": 0.75, "confidence": 0.5}
FAULTS = {
    "hang": Answer(fault="hang"),
    "trickle": Answer(b"{", fault="trickle"),
    "long wait before a retry": Answer({"error": "busy"}, 503, {"Retry-After": "25"}),
}


@pytest.fixture
def server() -> Iterator[RemoteServer]:
    with remote_server() as running:
        yield running.on("/v1/models", LISTED)


def engine_of(block: str, server: RemoteServer, **fields: Any) -> Any:
    """Return an engine with one block, whose servers have 0.5 s to answer."""
    many = {"class_names": CLASSES, "confidence": 0.3} if block in FINDERS else {}
    definition = workflow(block_step(block, model=server.url, **many, **fields))
    return compiled(definition, **{"moondream_cv_blocks.models": ModelPool(timeout=0.5)})


def frames(count: int) -> list[dict[str, Any]]:
    """Return images of different cameras."""
    return [in_video(np.full((24, 32, 3), 8 * n, np.uint8), 1, f"camera {n}") for n in range(count)]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_stops_sending_after_its_first_timeout(block: str, fault: str, server: RemoteServer) -> None:
    for route in ROUTES:
        server.on(route, FAULTS[fault])
    outputs = results(engine_of(block, server), frames(20))
    for one in outputs:
        check_nothing(block, one, f"{server.url}", "did not respond within 0.5 s")
    assert sum(len(server.to(route)) for route in ROUTES) == 8  # those that are in flight at once


@pytest.mark.parametrize("block", ["detect", "track"])
def test_a_step_with_a_roboflow_server_stops_after_its_first_timeout(block: str) -> None:
    with remote_server() as server:

        def hang(asked: Asked) -> Answer:
            return Answer(fault="hang")

        server.on("/info", INFO).on("/infer/lmm", hang).on("/infer/lmm/moondream2", hang)
        for one in results(engine_of(block, server), frames(8)):
            check_nothing(block, one, "did not respond within 0.5 s")
        asked = [one for one in server.asked if one.path.startswith("/infer")]
    assert 0 < len(asked) <= 8


@pytest.mark.parametrize("block", ["detect", "query", "track"])
def test_a_step_works_again_after_the_server_recovers(block: str, server: RemoteServer) -> None:
    every = {"every": 1} if block == "track" else {}
    engine = engine_of(block, server, **every)
    for route in ROUTES:
        server.on(route, Answer(fault="hang"))
    assert all(one["error_status"] for one in results(engine, frames(8)))
    for route in ROUTES:
        server.on(route, Answer({"objects": [BOX], "answer": "yes"}))
    recovered = [{**frame, "video_metadata": {**frame["video_metadata"], "frame_number": 2}} for frame in frames(8)]
    for one in results(engine, recovered):
        assert (one["error_status"], one["error_message"]) == (False, "")


def test_images_that_were_answered_before_the_timeout_keep_their_results(server: RemoteServer) -> None:
    """Images are sent in their order, and the last one hangs."""

    def last_hangs(asked: Asked) -> Answer:
        return Answer(fault="hang") if len(server.to("/v1/caption")) == 4 else Answer({"caption": "a picture"})

    server.on("/v1/caption", last_hangs)
    outputs = results(engine_of("caption", server), frames(4))
    assert sorted(one["caption"] for one in outputs) == ["", "a picture", "a picture", "a picture"]
    assert [one["error_status"] for one in outputs].count(True) == 1
