"""Common behavior of the remote models: order, concurrency, shared images, errors and closing."""

from __future__ import annotations

import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moondream_cv import Detector
from moondream_cv.backends import MoondreamAPI, OpenAICompatible
from moondream_cv.backends.base import changed_settings
from moondream_cv.errors import BackendError, BackendTimeout, ImageError, MoondreamError, UnsupportedSkill
from moondream_cv.requests import (
    Caption,
    CaptionResult,
    Detect,
    DetectResult,
    ErrorResult,
    Gaze,
    Point,
    Query,
    QueryResult,
    Settings,
)
from moondream_cv.vision_model import VisionModel
from tests.helpers.remote_server import ReceivedRequest, RemoteServer, Reply

BOX = {"x_min": 0.1, "y_min": 0.25, "x_max": 0.5, "y_max": 0.75}


def remote(server: RemoteServer, **options: Any) -> MoondreamAPI:
    return MoondreamAPI(server.url, **{"backoff": 0.001, "has_scores": False, **options})


def echo(request: ReceivedRequest) -> Reply:
    return Reply({"answer": request.body["question"]})


def jpeg(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("options", "message"), [({"stop": ("a",)}, "stop strings"), ({"json_schema": {}}, "JSON schema")]
)
def test_unsupported_query_arguments_are_rejected_instead_of_ignored(
    server: RemoteServer, options: dict[str, Any], message: str
) -> None:
    request = Query(None, "What?", **options)
    with remote(server) as model:
        (result,) = model.run([request])
        assert isinstance(result, ErrorResult)
        assert isinstance(result.error, UnsupportedSkill)
        with pytest.raises(UnsupportedSkill, match=message):
            model.stream(request)
    assert not server.requests


def test_results_are_in_request_order(server: RemoteServer) -> None:
    first_may_answer = threading.Event()

    def late_first(request: ReceivedRequest) -> Reply:
        if request.body["question"] == "0":
            assert first_may_answer.wait(240)
        if request.body["question"] == "39":
            first_may_answer.set()
        return echo(request)

    server.on("/v1/query", late_first)
    with remote(server) as model:
        results = model.run([Query(None, str(number)) for number in range(40)])
    assert [result.answer for result in results if isinstance(result, QueryResult)] == [str(n) for n in range(40)]


@pytest.mark.parametrize("max_in_flight", [1, 3, 8])
def test_max_in_flight_limits_concurrent_requests(server: RemoteServer, max_in_flight: int) -> None:
    together = threading.Barrier(max_in_flight)

    def wait_for_the_others(request: ReceivedRequest) -> Reply:
        together.wait(240)
        return echo(request)

    server.on("/v1/query", wait_for_the_others)
    with remote(server, max_in_flight=max_in_flight, retries=0) as model:
        results = model.run([Query(None, "?")] * (3 * max_in_flight))
    assert {type(result) for result in results} == {QueryResult}
    assert server.max_in_flight_seen == max_in_flight
    assert len({request.connection for request in server.requests}) == max_in_flight


def test_max_in_flight_applies_over_all_threads(server: RemoteServer) -> None:
    server.on("/v1/query", echo)
    with remote(server, max_in_flight=2) as model, ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda n: model.query(None, str(n))["answer"], range(30)))
    assert answers == [str(n) for n in range(30)]
    assert server.max_in_flight_seen <= 2


def test_shared_image_is_encoded_once(server: RemoteServer, frame: np.ndarray) -> None:
    server.on("/v1/detect", Reply({"objects": [BOX]})).on("/v1/query", Reply({"answer": "yes"}))
    file = io.BytesIO(jpeg(frame))  # can be read only once
    with remote(server) as model:
        results = model.run([Detect(file, "dog"), Query(None, "?"), Detect(file, "cat"), Query(file, "?")])
    assert [type(result) for result in results] == [DetectResult, QueryResult, DetectResult, QueryResult]
    assert len({request.body["image_url"] for request in server.requests if "image_url" in request.body}) == 1


def test_failed_requests_return_error_results(server: RemoteServer, frame: np.ndarray) -> None:
    def moody(request: ReceivedRequest) -> Reply:
        return Reply({"error": "no"}, 400) if request.body["length"] == "long" else Reply({"caption": "fine"})

    server.on("/v1/caption", moody)
    requests: list[Any] = [
        Caption(frame),
        Caption(frame, "long"),
        Gaze(frame, (0.5, 0.5)),
        Caption(b"junk"),
        Caption(b"junk"),
        "what?",
        Caption(frame, "short"),
    ]
    with remote(server) as model:
        results = model.run(requests)
    kinds = [type(r.error) if isinstance(r, ErrorResult) else type(r) for r in results]
    assert kinds == [
        CaptionResult,
        BackendError,
        UnsupportedSkill,
        ImageError,
        ImageError,
        ValueError,
        CaptionResult,
    ]


FAULTS = {
    "hang": Reply(fault="hang"),
    "trickle": Reply(b"{", fault="trickle"),
    "long wait before a retry": Reply({"error": "busy"}, 503, {"Retry-After": "25"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_stop_after_timeout_fails_unsent_requests_with_the_first_timeout(server: RemoteServer, fault: str) -> None:
    server.on("/v1/query", FAULTS[fault])
    with remote(server, timeout=0.5, max_in_flight=4) as model:
        model.stop_after_timeout = True
        start = time.monotonic()
        results = model.run([Query(None, str(number)) for number in range(40)])
        assert time.monotonic() - start < 20  # 40 requests in turn, or one retry, would take longer
        assert [type(getattr(result, "error", None)) for result in results] == [BackendTimeout] * 40
        assert all("did not respond within 0.5 s" in str(result.error) for result in results)  # type: ignore[union-attr]
        assert len(server.requests) == 4
        server.on("/v1/query", echo)
        assert model.run([Query(None, "still there?")]) == [QueryResult("still there?")]


def test_stop_after_timeout_keeps_earlier_results(server: RemoteServer) -> None:
    server.on("/v1/query", lambda request: Reply(fault="hang") if request.body["question"] == "3" else echo(request))
    with remote(server, timeout=0.5, max_in_flight=1) as model:
        model.stop_after_timeout = True
        results = model.run([Query(None, str(number)) for number in range(6)])
    assert results[:3] == [QueryResult(str(number)) for number in range(3)]
    assert [type(getattr(result, "error", None)) for result in results[3:]] == [BackendTimeout] * 3
    assert len(server.requests) == 4


def test_stop_after_timeout_waits_for_workers_that_other_threads_use(server: RemoteServer) -> None:
    """The timeout of a request starts when it is sent."""
    may_answer = threading.Event()

    def late(request: ReceivedRequest) -> Reply:
        assert may_answer.wait(240)
        return echo(request)

    server.on("/v1/query", late, echo)
    with remote(server, timeout=30.0, max_in_flight=1) as model, ThreadPoolExecutor(2) as threads:
        model.stop_after_timeout = True
        first = threads.submit(model.run, [Query(None, "first")])
        while not server.requests:
            time.sleep(0.005)
        model._http.timeout = 0.05
        second = threads.submit(model.run, [Query(None, "second")])
        time.sleep(0.3)
        assert not second.done()
        may_answer.set()
        assert (first.result(240), second.result(240)) == ([QueryResult("first")], [QueryResult("second")])


def test_without_stop_after_timeout_each_request_has_its_own_timeout(server: RemoteServer) -> None:
    server.on("/v1/query", Reply(fault="hang"), echo)
    with remote(server, timeout=0.5, max_in_flight=1) as model:
        failed, answered = model.run([Query(None, "1"), Query(None, "2")])
    assert isinstance(failed, ErrorResult)
    assert isinstance(failed.error, BackendTimeout)
    assert answered == QueryResult("2")


def test_empty_run_sends_no_request(server: RemoteServer) -> None:
    with remote(server) as model:
        assert model.run([]) == []
    assert server.requests == []


def test_missing_skill_names_an_alternative(server: RemoteServer, frame: np.ndarray) -> None:
    message = r"MoondreamAPI cannot gaze, only caption, detect, point, query; use a model from moondream_cv.load\(\)"
    with remote(server) as model:
        with pytest.raises(UnsupportedSkill, match=message):
            model.detect_gaze(frame, (0.5, 0.5))
        with pytest.raises(UnsupportedSkill, match=message):
            model.stream(Gaze(frame, (0.5, 0.5)))
    assert {request.path for request in server.requests} <= {"/v1/models"}  # where a server lists gaze


def test_closed_model_raises(server: RemoteServer, frame: np.ndarray) -> None:
    with remote(server) as model:
        model.close()
    for call in (lambda: model.caption(frame), lambda: model.stream(Caption(frame)), lambda: model.run([])):
        with pytest.raises(MoondreamError, match=r"MoondreamAPI\('http://127.0.0.1:\d+/v1'\) is closed"):
            call()


def test_close_cancels_waiting_requests(server: RemoteServer) -> None:
    received = threading.Event()

    def never(request: ReceivedRequest) -> Reply:
        received.set()
        return Reply(fault="hang")

    server.on("/v1/query", never)
    model = remote(server, max_in_flight=1, retries=0)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(model.run, [Query(None, "?")] * 3)
        assert received.wait(240)
        model.close()
        server.stopping.set()
        with pytest.raises(MoondreamError, match="is closed"):
            running.result(240)
    assert len(server.requests) == 1


def test_image_encoded_by_a_local_model_raises(server: RemoteServer) -> None:
    class Encoded:
        size = (4, 3)

    with remote(server) as model, pytest.raises(ImageError, match=r"is encoded for a local model.*pass the image"):
        model.caption(Encoded())


def test_detector_accepts_a_remote_model(server: RemoteServer, frame: np.ndarray) -> None:
    server.on("/v1/detect", Reply({"objects": [BOX]}), Reply({"objects": []}))
    with remote(server, max_in_flight=1) as model:
        assert isinstance(model, VisionModel)
        found = Detector(model)(frame, ["patch", "dog"])
        with pytest.warns(UserWarning, match="MoondreamAPI returns no scores"):
            Detector(model, confidence=0.5)(frame, "patch")
    assert found.xyxy.tolist() == [[5, 10, 25, 30]]
    assert found.confidence is not None
    assert found.confidence.tolist() == [1.0]
    assert found.data["class_name"].tolist() == ["patch"]


@pytest.mark.parametrize("model_class", [MoondreamAPI, OpenAICompatible])
@pytest.mark.parametrize(
    ("answer", "scores", "queried_again"),
    [
        (Reply({"models": [{"id": "a", "has_scores": True}], "data": [{"id": "a"}]}), True, 0),
        (Reply({"object": "list", "data": [{"id": "a", "has_scores": True}]}), True, 0),
        (Reply({"models": [{"id": "a", "has_scores": False}]}), False, 0),
        (Reply({"models": [{"id": "a", "has_scores": "yes"}]}), False, 0),
        (Reply({"models": [{"id": "a"}]}), False, 0),
        (Reply({"models": []}), False, 0),
        (Reply({"models": 5, "data": [7, None]}), False, 0),
        (Reply([]), False, 0),
        (Reply(b"<html>", kind="text/html"), False, 0),
        (Reply({"detail": "Not Found"}, 404), False, 0),
        (Reply({"detail": "loading"}, 503), False, 1),
        (Reply(fault="reset"), False, 1),
    ],
)
def test_has_scores_is_queried_once(
    server: RemoteServer, model_class: Any, answer: Reply, scores: bool, queried_again: int
) -> None:
    server.on("/v1/models", answer)
    with model_class(server.url) as model:
        assert server.requests == []
        assert [model.has_scores, model.has_scores] == [scores, scores]
        assert len(server.requests) == 1 + queried_again
        model.has_scores = not scores
        assert model.has_scores is not scores


@pytest.mark.parametrize(("model", "scores"), [(None, True), ("b", False), ("a", True), ("unlisted", True)])
def test_has_scores_refers_to_the_model_in_use(server: RemoteServer, model: str | None, scores: bool) -> None:
    server.on("/v1/models", Reply({"models": [{"id": "a", "has_scores": True}, {"id": "b", "has_scores": False}]}))
    with MoondreamAPI(server.url, model=model) as connected:
        assert connected.has_scores is scores


def test_only_changed_settings_are_sent() -> None:
    assert changed_settings(Settings()) == {}
    assert changed_settings(Settings(temperature=0, max_crops=3, seed=0, repeat_suffix=False)) == {
        "temperature": 0,
        "max_crops": 3,
        "seed": 0,
        "repeat_suffix": False,
    }


def test_objects_and_points_stream_one_by_one(server: RemoteServer, frame: np.ndarray) -> None:
    server.on("/v1/detect", Reply({"objects": [BOX, BOX]})).on("/v1/point", Reply({"points": []}))
    with remote(server) as model:
        assert list(model.detect(frame, "dog", stream=True)["objects"]) == [{**BOX, "confidence": 1.0}] * 2
        assert list(model.stream(Point(frame, "dog"))) == []
