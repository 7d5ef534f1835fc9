"""Test that a hanging server delays a step by one time-out only, for any number of images and classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from moondream_cv_blocks import ModelPool
from tests.helpers.remote_server import ReceivedRequest, RemoteServer, Reply, remote_server
from tests.helpers.roboflow_app import skip_without_server
from tests.helpers.workflows import (
    BLOCKS,
    CLASS_BLOCKS,
    assert_failed,
    compile_workflow,
    minimal_step,
    run_engine,
    video_frame,
    workflow,
)

skip_without_server()
pytestmark = pytest.mark.roboflow

CLASSES = [f"class {number}" for number in range(8)]
LISTED = Reply({"models": [{"id": "any", "has_scores": True}]})
INFO = Reply({"name": "Roboflow Inference Server", "version": "1.8.3", "uuid": "u"})
ROUTES = ("/v1/detect", "/v1/point", "/v1/query", "/v1/caption")
BOX = {"x_min": 0.1, "y_min": 0.25, "x_max": 0.5, "y_max": 0.75, "confidence": 0.5}
FAULTS = {
    "hang": Reply(fault="hang"),
    "trickle": Reply(b"{", fault="trickle"),
    "long wait before a retry": Reply({"error": "busy"}, 503, {"Retry-After": "25"}),
}


@pytest.fixture
def server() -> Iterator[RemoteServer]:
    with remote_server() as running:
        yield running.on("/v1/models", LISTED)


def make_engine(block: str, server: RemoteServer, models: ModelPool | None = None, **fields: Any) -> Any:
    """Compile a workflow of one block, by default with a time-out of 0.5 s for servers."""
    many = {"class_names": CLASSES, "confidence": 0.3} if block in CLASS_BLOCKS else {}
    definition = workflow(minimal_step(block, model=server.url, **many, **fields))
    return compile_workflow(definition, **{"moondream_cv_blocks.models": models or ModelPool(timeout=0.5)})


def frames(count: int) -> list[dict[str, Any]]:
    """Return images of different cameras."""
    return [video_frame(np.full((24, 32, 3), 8 * n, np.uint8), 1, f"camera {n}") for n in range(count)]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("fault", FAULTS)
def test_step_stops_after_its_first_timeout(block: str, fault: str, server: RemoteServer) -> None:
    for route in ROUTES:
        server.on(route, FAULTS[fault])
    outputs = run_engine(make_engine(block, server), frames(20))
    for one in outputs:
        assert_failed(block, one, f"{server.url}", "did not respond within 0.5 s")
    assert sum(len(server.to(route)) for route in ROUTES) == 8  # the number of concurrent requests


@pytest.mark.parametrize("block", ["detect", "track"])
def test_step_with_a_roboflow_server_stops_after_its_first_timeout(block: str) -> None:
    with remote_server() as server:

        def hang(asked: ReceivedRequest) -> Reply:
            return Reply(fault="hang")

        server.on("/info", INFO).on("/infer/lmm", hang).on("/infer/lmm/moondream2", hang)
        for one in run_engine(make_engine(block, server), frames(8)):
            assert_failed(block, one, "did not respond within 0.5 s")
        requests = [one for one in server.requests if one.path.startswith("/infer")]
    assert 0 < len(requests) <= 8


@pytest.mark.parametrize("block", ["detect", "query", "track"])
def test_step_works_after_the_server_recovers(block: str, server: RemoteServer) -> None:
    keyframes = {"every": 1} if block == "track" else {}
    models = ModelPool(timeout=0.5)
    engine = make_engine(block, server, models, **keyframes)
    for route in ROUTES:
        server.on(route, Reply(fault="hang"))
    assert all(one["error_status"] for one in run_engine(engine, frames(8)))
    models.get(server.url)._http.timeout = 60.0  # a busy machine may need more than 0.5 s for 64 requests
    for route in ROUTES:
        server.on(route, Reply({"objects": [BOX], "answer": "yes"}))
    recovered = [{**frame, "video_metadata": {**frame["video_metadata"], "frame_number": 2}} for frame in frames(8)]
    for one in run_engine(engine, recovered):
        assert (one["error_status"], one["error_message"]) == (False, "")


def test_results_before_the_timeout_are_kept(server: RemoteServer) -> None:
    """The requests are sent in the order of the images; the last one hangs."""

    def last_hangs(asked: ReceivedRequest) -> Reply:
        return Reply(fault="hang") if len(server.to("/v1/caption")) == 4 else Reply({"caption": "a picture"})

    server.on("/v1/caption", last_hangs)
    outputs = run_engine(make_engine("caption", server, ModelPool(timeout=3.0)), frames(4))
    assert sorted(one["caption"] for one in outputs) == ["", "a picture", "a picture", "a picture"]
    assert [one["error_status"] for one in outputs].count(True) == 1
