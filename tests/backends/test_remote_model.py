"""What all remote models have in common: order, requests in flight, shared images, errors in place, closing."""

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
from tests.helpers.remote_server import Answer, Asked, RemoteServer

BOX = {"x_min": 0.1, "y_min": 0.25, "x_max": 0.5, "y_max": 0.75}


def remote(server: RemoteServer, **options: Any) -> MoondreamAPI:
    return MoondreamAPI(server.url, **{"backoff": 0.001, "has_scores": False, **options})


def echo(asked: Asked) -> Answer:
    return Answer({"answer": asked.body["question"]})


def jpeg(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG")
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
    assert not server.asked


def test_results_are_in_request_order(server: RemoteServer) -> None:
    first_may_answer = threading.Event()

    def late_first(asked: Asked) -> Answer:
        if asked.body["question"] == "0":
            assert first_may_answer.wait(240)
        if asked.body["question"] == "39":
            first_may_answer.set()
        return echo(asked)

    server.on("/v1/query", late_first)
    with remote(server) as model:
        results = model.run([Query(None, str(number)) for number in range(40)])
    assert [result.answer for result in results if isinstance(result, QueryResult)] == [str(n) for n in range(40)]


@pytest.mark.parametrize("max_in_flight", [1, 3, 8])
def test_max_in_flight_limits_concurrent_requests(server: RemoteServer, max_in_flight: int) -> None:
    together = threading.Barrier(max_in_flight)

    def wait_for_the_others(asked: Asked) -> Answer:
        together.wait(240)
        return echo(asked)

    server.on("/v1/query", wait_for_the_others)
    with remote(server, max_in_flight=max_in_flight, retries=0) as model:
        results = model.run([Query(None, "?")] * (3 * max_in_flight))
    assert {type(result) for result in results} == {QueryResult}
    assert server.most_in_flight == max_in_flight
    assert len({asked.connection for asked in server.asked}) == max_in_flight


def test_max_in_flight_applies_over_all_threads(server: RemoteServer) -> None:
    server.on("/v1/query", echo)
    with remote(server, max_in_flight=2) as model, ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda n: model.query(None, str(n))["answer"], range(30)))
    assert answers == [str(n) for n in range(30)]
    assert server.most_in_flight <= 2


def test_shared_image_is_encoded_once(server: RemoteServer, picture: np.ndarray) -> None:
    server.on("/v1/detect", Answer({"objects": [BOX]})).on("/v1/query", Answer({"answer": "yes"}))
    file = io.BytesIO(jpeg(picture))  # a second read would give nothing
    with remote(server) as model:
        results = model.run([Detect(file, "dog"), Query(None, "?"), Detect(file, "cat"), Query(file, "?")])
    assert [type(result) for result in results] == [DetectResult, QueryResult, DetectResult, QueryResult]
    assert len({asked.body["image_url"] for asked in server.asked if "image_url" in asked.body}) == 1


def test_failed_requests_return_error_results(server: RemoteServer, picture: np.ndarray) -> None:
    def moody(asked: Asked) -> Answer:
        return Answer({"error": "no"}, 400) if asked.body["length"] == "long" else Answer({"caption": "fine"})

    server.on("/v1/caption", moody)
    requests: list[Any] = [
        Caption(picture),
        Caption(picture, "long"),
        Gaze(picture, (0.5, 0.5)),
        Caption(b"junk"),
        Caption(b"junk"),
        "what?",
        Caption(picture, "short"),
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
    "hang": Answer(fault="hang"),
    "trickle": Answer(b"{", fault="trickle"),
    "long wait before a retry": Answer({"error": "busy"}, 503, {"Retry-After": "25"}),
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
        assert len(server.asked) == 4
        server.on("/v1/query", echo)
        assert model.run([Query(None, "still there?")]) == [QueryResult("still there?")]


def test_stop_after_timeout_keeps_earlier_results(server: RemoteServer) -> None:
    server.on("/v1/query", lambda asked: Answer(fault="hang") if asked.body["question"] == "3" else echo(asked))
    with remote(server, timeout=0.5, max_in_flight=1) as model:
        model.stop_after_timeout = True
        results = model.run([Query(None, str(number)) for number in range(6)])
    assert results[:3] == [QueryResult(str(number)) for number in range(3)]
    assert [type(getattr(result, "error", None)) for result in results[3:]] == [BackendTimeout] * 3
    assert len(server.asked) == 4


def test_stop_after_timeout_waits_for_workers_that_other_threads_use(server: RemoteServer) -> None:
    """A time-out counts from when a request is sent."""
    may_answer = threading.Event()

    def late(asked: Asked) -> Answer:
        assert may_answer.wait(240)
        return echo(asked)

    server.on("/v1/query", late, echo)
    with remote(server, timeout=30.0, max_in_flight=1) as model, ThreadPoolExecutor(2) as threads:
        model.stop_after_timeout = True
        first = threads.submit(model.run, [Query(None, "first")])
        while not server.asked:
            time.sleep(0.005)
        model._http.timeout = 0.05
        second = threads.submit(model.run, [Query(None, "second")])
        time.sleep(0.3)
        assert not second.done()
        may_answer.set()
        assert (first.result(240), second.result(240)) == ([QueryResult("first")], [QueryResult("second")])


def test_without_stop_after_timeout_each_request_has_its_own_timeout(server: RemoteServer) -> None:
    server.on("/v1/query", Answer(fault="hang"), echo)
    with remote(server, timeout=0.5, max_in_flight=1) as model:
        failed, answered = model.run([Query(None, "1"), Query(None, "2")])
    assert isinstance(failed, ErrorResult)
    assert isinstance(failed.error, BackendTimeout)
    assert answered == QueryResult("2")


def test_empty_run_sends_no_request(server: RemoteServer) -> None:
    with remote(server) as model:
        assert model.run([]) == []
    assert server.asked == []


def test_missing_skill_names_an_alternative(server: RemoteServer, picture: np.ndarray) -> None:
    says = r"MoondreamAPI cannot gaze, only caption, detect, point, query; use a model from moondream_cv.load\(\)"
    with remote(server) as model:
        with pytest.raises(UnsupportedSkill, match=says):
            model.detect_gaze(picture, (0.5, 0.5))
        with pytest.raises(UnsupportedSkill, match=says):
            model.stream(Gaze(picture, (0.5, 0.5)))
    assert {asked.path for asked in server.asked} <= {"/v1/models"}  # where a server lists gaze


def test_closed_model_raises(server: RemoteServer, picture: np.ndarray) -> None:
    with remote(server) as model:
        model.close()
    for call in (lambda: model.caption(picture), lambda: model.stream(Caption(picture)), lambda: model.run([])):
        with pytest.raises(MoondreamError, match=r"MoondreamAPI\('http://127.0.0.1:\d+/v1'\) is closed"):
            call()


def test_close_cancels_waiting_requests(server: RemoteServer) -> None:
    asked = threading.Event()

    def never(request: Asked) -> Answer:
        asked.set()
        return Answer(fault="hang")

    server.on("/v1/query", never)
    model = remote(server, max_in_flight=1, retries=0)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(model.run, [Query(None, "?")] * 3)
        assert asked.wait(240)
        model.close()
        server.stopping.set()
        with pytest.raises(MoondreamError, match="is closed"):
            running.result(240)
    assert len(server.asked) == 1


def test_image_encoded_by_a_local_model_raises(server: RemoteServer) -> None:
    class Encoded:
        size = (4, 3)

    with remote(server) as model, pytest.raises(ImageError, match=r"is encoded for a local model.*pass the image"):
        model.caption(Encoded())


def test_detector_accepts_a_remote_model(server: RemoteServer, picture: np.ndarray) -> None:
    server.on("/v1/detect", Answer({"objects": [BOX]}), Answer({"objects": []}))
    with remote(server, max_in_flight=1) as model:
        assert isinstance(model, VisionModel)
        found = Detector(model)(picture, ["patch", "dog"])
        with pytest.warns(UserWarning, match="MoondreamAPI returns no scores"):
            Detector(model, confidence=0.5)(picture, "patch")
    assert found.xyxy.tolist() == [[5, 10, 25, 30]]
    assert found.confidence is not None
    assert found.confidence.tolist() == [1.0]
    assert found.data["class_name"].tolist() == ["patch"]


@pytest.mark.parametrize("model_class", [MoondreamAPI, OpenAICompatible])
@pytest.mark.parametrize(
    ("answer", "scores", "queried_again"),
    [
        (Answer({"models": [{"id": "a", "has_scores": True}], "data": [{"id": "a"}]}), True, 0),
        (Answer({"object": "list", "data": [{"id": "a", "has_scores": True}]}), True, 0),
        (Answer({"models": [{"id": "a", "has_scores": False}]}), False, 0),
        (Answer({"models": [{"id": "a", "has_scores": "yes"}]}), False, 0),
        (Answer({"models": [{"id": "a"}]}), False, 0),
        (Answer({"models": []}), False, 0),
        (Answer({"models": 5, "data": [7, None]}), False, 0),
        (Answer([]), False, 0),
        (Answer(b"<html>", kind="text/html"), False, 0),
        (Answer({"detail": "Not Found"}, 404), False, 0),
        (Answer({"detail": "loading"}, 503), False, 1),
        (Answer(fault="reset"), False, 1),
    ],
)
def test_has_scores_is_queried_once(
    server: RemoteServer, model_class: Any, answer: Answer, scores: bool, queried_again: int
) -> None:
    server.on("/v1/models", answer)
    with model_class(server.url) as model:
        assert server.asked == []
        assert [model.has_scores, model.has_scores] == [scores, scores]
        assert len(server.asked) == 1 + queried_again
        model.has_scores = not scores
        assert model.has_scores is not scores


@pytest.mark.parametrize(("model", "scores"), [(None, True), ("b", False), ("a", True), ("unlisted", True)])
def test_has_scores_refers_to_the_model_in_use(server: RemoteServer, model: str | None, scores: bool) -> None:
    server.on("/v1/models", Answer({"models": [{"id": "a", "has_scores": True}, {"id": "b", "has_scores": False}]}))
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


def test_objects_and_points_stream_one_by_one(server: RemoteServer, picture: np.ndarray) -> None:
    server.on("/v1/detect", Answer({"objects": [BOX, BOX]})).on("/v1/point", Answer({"points": []}))
    with remote(server) as model:
        assert list(model.detect(picture, "dog", stream=True)["objects"]) == [{**BOX, "confidence": 1.0}] * 2
        assert list(model.stream(Point(picture, "dog"))) == []
