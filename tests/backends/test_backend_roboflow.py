"""Client for Roboflow Inference, with replies of a Roboflow server."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
import threading
import warnings
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moondream_cv import Detector
from moondream_cv.backends import RoboflowInference
from moondream_cv.errors import BackendError, UnsupportedSkill
from moondream_cv.requests import Detect, DetectResult
from tests.helpers.remote_server import ReceivedRequest, RemoteServer, Reply

pytest.importorskip("inference_sdk")

PATH = "/infer/lmm"


def prediction(x: Any, y: float, width: float, height: float, **more: Any) -> dict[str, Any]:
    extras = {"confidence": 1.0, "class": "cat", "class_id": 0, "detection_id": "d"}
    return {"x": x, "y": y, "width": width, "height": height, **extras, **more}


def found(*predictions: Any, **more: Any) -> Reply:
    image = {"width": 50, "height": 40}
    return Reply({"inference_id": "i", "time": 0.1, "image": image, "predictions": list(predictions), **more})


@pytest.fixture
def model(server: RemoteServer) -> Any:
    with RoboflowInference(server.url, has_scores=False, backoff=0.001) as connected:
        yield connected


def test_boxes_are_converted_to_fractions(server: RemoteServer, model: RoboflowInference, frame: np.ndarray) -> None:
    server.on(PATH, found(prediction(15, 20, 20, 20), prediction(0, 0, 10, 8, confidence=0.25)))
    assert model.detect(frame, "cat") == {
        "objects": [
            {"x_min": 0.1, "y_min": 0.25, "x_max": 0.5, "y_max": 0.75, "confidence": 1.0},
            {"x_min": -0.1, "y_min": -0.1, "x_max": 0.1, "y_max": 0.1, "confidence": 1.0},
        ],
        "truncated": False,
    }
    (request,) = server.requests
    image = request.body.pop("image")
    assert image["type"] == "base64"
    assert Image.open(io.BytesIO(base64.b64decode(image["value"], validate=True))).size == (50, 40)
    assert request.body == {"api_key": None, "model_id": "moondream2/moondream2_2b_jul24", "prompt": "cat"}


def test_classes_are_requested_concurrently(server: RemoteServer, frame: np.ndarray) -> None:
    together = threading.Barrier(3)

    def answer(request: ReceivedRequest) -> Reply:
        together.wait(240)
        return found(prediction(15, 20, 20, 20)) if request.body["prompt"] == "cat" else found()

    server.on(PATH, answer)
    with RoboflowInference(server.url, max_in_flight=3, model_id="moondream2") as model:
        for _ in range(2):
            detections = Detector(model)(frame, ["dog", "cat", "red car"])
            assert detections.xyxy.tolist() == [[5, 10, 25, 30]]
            assert detections.class_id is not None
            assert detections.class_id.tolist() == [1]
    request = server.to(PATH)
    assert {a.body["model_id"] for a in request} == {"moondream2"}
    assert len(request) == 6
    assert len({a.connection for a in request}) == 3  # reused by the second call


@pytest.mark.parametrize("form", ["array", "pil", "rgba", "file object", "bytes", "floats"])
def test_every_image_type_is_sent(server: RemoteServer, model: RoboflowInference, frame: np.ndarray, form: str) -> None:
    server.on(PATH, found())
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    file.seek(0)
    forms: dict[str, Any] = {
        "array": frame,
        "pil": Image.fromarray(frame),
        "rgba": Image.fromarray(frame).convert("RGBA"),
        "file object": file,
        "bytes": file.getvalue(),
        "floats": frame / 255,
    }
    assert model.detect(forms[form], "cat")["objects"] == []
    image = base64.b64decode(server.requests[0].body["image"]["value"], validate=True)
    assert Image.open(io.BytesIO(image)).size == (50, 40)


def test_api_key_is_sent_in_the_body(server: RemoteServer, frame: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBOFLOW_API_KEY", "from-environment")
    server.on(PATH, found())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with RoboflowInference(server.url) as model:
            model.detect(frame, "cat")
        with RoboflowInference(server.url, api_key="given") as model:
            model.detect(frame, "cat")
    assert [request.body["api_key"] for request in server.to(PATH)] == ["from-environment", "given"]
    assert not [request for request in server.requests if "given" in request.path or "from-environment" in request.path]


def test_api_key_is_sent_as_a_header_to_roboflow_hosts() -> None:
    from inference_sdk.http.entities import ApiKeyTransport

    for url, transport in [
        ("https://serverless.roboflow.com", ApiKeyTransport.HEADER),
        ("http://localhost:9001", ApiKeyTransport.LEGACY),
    ]:
        with RoboflowInference(url, api_key="secret") as model:
            assert model._client().inference_configuration.api_key_transport is transport


def test_max_objects_truncates_the_response(server: RemoteServer, model: RoboflowInference, frame: np.ndarray) -> None:
    server.on(PATH, found(prediction(15, 20, 20, 20), prediction(5, 5, 2, 2)))
    for most, truncated in [(1, True), (2, False), (3, False)]:
        reply = model.detect(frame, "cat", settings={"max_objects": most})
        assert len(reply["objects"]) == min(most, 2)
        assert reply["truncated"] is truncated


@pytest.mark.parametrize(
    ("info", "scores"),
    [
        ({"name": "Roboflow Inference Server", "version": "1.8.3", "uuid": "u"}, False),
        ({"name": "moondream-cv", "version": "0.2", "uuid": "u", "has_scores": True}, True),
    ],
)
def test_has_scores_is_read_from_info(
    server: RemoteServer, frame: np.ndarray, info: dict[str, Any], scores: bool
) -> None:
    server.on(PATH, found(prediction(15, 20, 20, 20, confidence=0.25))).on("/info", Reply(info))
    with RoboflowInference(server.url) as model:
        results = model.run([Detect(frame, "cat"), Detect(frame, "dog")])
        assert model.has_scores is scores
    for result in results:
        assert isinstance(result, DetectResult)
        assert result.objects[0].confidence == (0.25 if scores else 1.0)
    assert len(server.to("/info")) == 1


def test_key_is_sent_by_the_sdk_only(server: RemoteServer, frame: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBOFLOW_API_KEY", "secret-key")
    server.on(PATH, found()).on("/info", Reply({"name": "server", "version": "1"}))
    with RoboflowInference(server.url) as model:
        model.run([Detect(frame, "cat")])
    (info,) = server.to("/info")
    assert not any("secret-key" in value for value in info.headers.values())
    (request,) = server.to(PATH)
    assert "secret-key" in repr(request.body)


@pytest.mark.parametrize("failure", [Reply({"message": "boom"}, 500), Reply({"message": "boom"}, 502)])
def test_server_errors_are_retried(
    server: RemoteServer, model: RoboflowInference, frame: np.ndarray, failure: Reply
) -> None:
    server.on(PATH, failure, failure, found())
    assert model.detect(frame, "cat")["objects"] == []
    assert len(server.requests) == 3


@pytest.mark.parametrize("failure", [Reply({"message": "busy"}, 503), Reply(fault="reset")])
def test_retries_of_the_sdk_are_not_repeated(
    server: RemoteServer, model: RoboflowInference, frame: np.ndarray, failure: Reply
) -> None:
    server.on(PATH, failure)
    with pytest.raises(BackendError, match=r"returned status 503: busy|is unreachable"):
        model.detect(frame, "cat")
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Reply({"message": "Bad image"}, 400), "returned status 400: Bad image"),
        (Reply({"message": "who?"}, 401), "returned status 401: who.*pass api_key= or set ROBOFLOW_API_KEY"),
        (Reply(b"<html>no</html>", 404, kind="text/html"), "returned status 404"),
        (Reply(["no"], 400), "returned a response that inference-sdk cannot parse"),
        (
            Reply(b"<html>hello</html>", kind="text/html"),
            "returned a response that inference-sdk cannot parse",
        ),
        (Reply(b""), "returned a response that inference-sdk cannot parse"),
        (Reply([1, 2]), r"returned no JSON object: \[1, 2\]"),
        (
            Reply({"response": "a cat", "image": {"width": 1, "height": 1}}),
            "returned text instead of boxes: 'a cat'",
        ),
        (Reply({"predictions": None}), "no valid 'predictions', expected a list"),
        (found("cat"), "invalid entry in 'predictions', expected an object: 'cat'"),
        (found(prediction("1", 1, 1, 1)), "invalid 'x', expected a number: '1'"),
        (found(prediction(float("nan"), 1, 1, 1)), "invalid 'x', expected a finite number: nan"),
        (found(prediction(1, 1, 1, 1), image={"width": 0, "height": 4}), "invalid image size: 0x4"),
        (found(prediction(1, 1, 1, 1), image={"width": "5", "height": 4}), "invalid 'width', expected a number: '5'"),
    ],
)
def test_invalid_responses_raise(
    server: RemoteServer, model: RoboflowInference, frame: np.ndarray, answer: Reply, message: str
) -> None:
    server.on(PATH, answer)
    with pytest.raises(BackendError, match=message) as caught:
        model.detect(frame, "cat")
    assert str(caught.value).startswith(f"{server.url}{PATH} ")
    assert len(server.requests) == 1


def test_image_size_is_used_if_the_response_has_none(
    server: RemoteServer, model: RoboflowInference, frame: np.ndarray
) -> None:
    server.on(PATH, found(prediction(25, 20, 50, 40), image=None))
    box = model.detect(frame, "cat")["objects"][0]
    assert [box[name] for name in ("x_min", "y_min", "x_max", "y_max")] == [0, 0, 1, 1]


def test_timeout_is_raised(server: RemoteServer, frame: np.ndarray) -> None:
    server.on(PATH, Reply(fault="hang"), found())
    with RoboflowInference(server.url, timeout=0.3, has_scores=False) as model:
        with pytest.raises(BackendError, match=r"did not respond within 0.3 s; increase timeout="):
            model.detect(frame, "cat")
        model._http.timeout = 240.0
        assert model.detect(frame, "cat")["objects"] == []


def test_hanging_server_does_not_prevent_exit(server: RemoteServer) -> None:
    server.on(PATH, Reply(fault="hang"))
    code = (
        "from moondream_cv.backends import RoboflowInference\n"
        "from moondream_cv import Detect\n"
        "import numpy, sys\n"
        f"model = RoboflowInference({server.url!r}, timeout=0.2)\n"
        "(result,) = model.run([Detect(numpy.zeros((4, 4, 3), 'u1'), 'x')])\n"
        "print(type(result.error).__name__)\n"
        "assert 'torch' not in sys.modules\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert (ended.returncode, ended.stdout) == (0, "BackendTimeout\n"), ended.stderr


@pytest.mark.parametrize("call", [("caption",), ("query", "?"), ("point", "cat")])
def test_other_skills_raise(model: RoboflowInference, frame: np.ndarray, call: tuple[str, ...]) -> None:
    message = rf"RoboflowInference cannot {call[0]}, only detect; use MoondreamAPI or a model from"
    with pytest.raises(UnsupportedSkill, match=message):
        getattr(model, call[0])(frame, *call[1:])


def test_missing_sdk_names_the_extra() -> None:
    code = (
        "import sys\n"
        "sys.modules['inference_sdk'] = None\n"
        "from moondream_cv.backends import RoboflowInference\n"
        "RoboflowInference('http://localhost:9001')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert 'MoondreamError: RoboflowInference needs inference-sdk; pip install "moondream-cv[roboflow]"' in ended.stderr


@pytest.mark.parametrize("model_id", ["", " ", None, 5])
def test_invalid_model_id_raises(model_id: Any) -> None:
    with pytest.raises(ValueError, match="model_id must be a name such as 'moondream2/moondream2_2b_jul24'"):
        RoboflowInference(model_id=model_id)
