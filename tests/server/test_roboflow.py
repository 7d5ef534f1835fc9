"""Roboflow's API with Roboflow's client, and with plain HTTP for requests that the client cannot send.

Run with `pytest tests/server/test_roboflow.py`.
"""

from __future__ import annotations

import asyncio
import base64
import pickle
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import supervision as sv
from fastapi import FastAPI, Response
from inference_sdk import InferenceConfiguration, InferenceHTTPClient
from inference_sdk.http.errors import HTTPCallErrorError
from PIL import Image

from moondream_cv import __version__, scenes
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.requests import DetectedObject, DetectResult, Request, Result
from moondream_cv.server.apis.roboflow import MAX_IMAGES
from moondream_cv.server.images import decode_base64
from moondream_cv.vision_model import PublishedMethods
from tests.helpers.remote_server import ReceivedRequest, remote_server
from tests.helpers.remote_server import Reply as RemoteAnswer
from tests.helpers.served import Served, data_uri, served

WIDTH, HEIGHT = 320, 240
KEY = "rf-key-4711"
NAME = "moondream2/moondream2_2b_jul24"


@pytest.fixture(scope="module")
def client(server: Served) -> Any:
    return InferenceHTTPClient(api_url=server.url)


@pytest.fixture(scope="module")
def bgr(scene_image: Image.Image) -> np.ndarray:
    return np.asarray(scene_image)[..., ::-1].copy()


@pytest.fixture(scope="module")
def other() -> Image.Image:
    """Another image with another size."""
    scene = scenes.render_scene(2, resolution_wh=(240, 240), names=("red circle",) * 3, style="plain")
    return Image.fromarray(scene.image)


def pixels(result: dict[str, Any], resolution_wh: tuple[int, int]) -> list[dict[str, Any]]:
    """Return the expected predictions for the objects of the model, in pixels."""
    width, height = resolution_wh
    found = []
    for box in result["objects"]:
        left, right = box["x_min"] * width, box["x_max"] * width
        top, bottom = box["y_min"] * height, box["y_max"] * height
        middle = {"x": (left + right) / 2, "y": (top + bottom) / 2}
        found.append({**middle, "width": right - left, "height": bottom - top, "confidence": box["confidence"]})
    return found


def assert_finds(answer: dict[str, Any], image: Image.Image, name: str, tiny: LocalModel, tolerance: float) -> None:
    """Compare an answer with the objects of the model, with a tolerance in pixels."""
    expected = pixels(tiny.detect(image, name), image.size)
    assert answer["image"] == {"width": image.width, "height": image.height}
    assert len(answer["predictions"]) == len(expected) > 0
    for found, box in zip(answer["predictions"], expected, strict=True):
        assert found.keys() == {*box, "class", "class_id", "detection_id"}
        assert (found["class"], found["class_id"]) == (name, 0)
        assert {key: found[key] for key in box} == pytest.approx(box, abs=tolerance)


@pytest.mark.parametrize("name", ["cat", "red circle", "blue square"])
@pytest.mark.parametrize("in_path", [True, False])
def test_predictions_equal_the_boxes_of_the_model(
    client: Any, tiny: LocalModel, scene_image: Any, tmp_path: Path, name: str, in_path: bool
) -> None:
    scene_image.save(tmp_path / "scene.png")
    answer = client.infer_lmm(str(tmp_path / "scene.png"), NAME, prompt=name, model_id_in_path=in_path)
    assert_finds(answer, scene_image, name, tiny, 1e-3)
    assert answer["time"] > 0
    assert answer["inference_id"]


@pytest.mark.parametrize("how", ["array", "pil", "data URI", "base64"])
def test_all_image_types_of_the_client_are_accepted(
    client: Any, tiny: LocalModel, scene_image: Any, bgr: np.ndarray, uri: str, how: str
) -> None:
    image = {"array": bgr, "pil": scene_image, "data URI": uri, "base64": uri.partition(",")[2]}[how]
    answer = client.infer_lmm(image, NAME, prompt="cat")
    assert_finds(
        answer, scene_image, "cat", tiny, 6.4 if how in ("array", "pil") else 1e-3
    )  # the client converts to JPEG


def test_no_objects_gives_an_empty_list(client: Any, uri: str) -> None:
    assert client.infer_lmm(uri, NAME, prompt="yellow star")["predictions"] == []


def test_supervision_reads_the_answers(client: Any, scene_image: Any, uri: str, tiny: LocalModel) -> None:
    detections = sv.Detections.from_inference(client.infer_lmm(uri, NAME, prompt="cat"))
    (box,) = tiny.detect(scene_image, "cat")["objects"]
    corners = [box["x_min"] * WIDTH, box["y_min"] * HEIGHT, box["x_max"] * WIDTH, box["y_max"] * HEIGHT]
    assert detections.xyxy[0] == pytest.approx(corners, abs=1e-2)
    assert detections.data["class_name"].tolist() == ["cat"]
    assert detections.confidence[0] == pytest.approx(box["confidence"], abs=1e-4)
    assert 0 < box["confidence"] < 1


class FakeModel(PublishedMethods):
    """A model that returns the same objects for every image and has no scores."""

    skills = frozenset({"detect"})
    has_scores = False

    def __init__(self, *objects: DetectedObject) -> None:
        self.objects = objects

    def run(self, requests: Sequence[Request]) -> list[Result]:
        return [DetectResult(self.objects) for _ in requests]

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((0.25, 0.5, 0.75, 1.0), (160.0, 180.0, 160.0, 120.0)),
        ((-0.25, -0.5, 0.5, 0.5), (80.0, 60.0, 160.0, 120.0)),  # Roboflow's older class moves such boxes
        ((0.5, 0.5, 1.5, 1.25), (240.0, 180.0, 160.0, 120.0)),
        ((-0.75, 0.25, -0.25, 0.75), (0.0, 120.0, 0.0, 120.0)),  # completely outside: kept, with no area
        ((0.001, 0.001, 0.002, 0.003), (0.48, 0.48, 0.32, 0.48)),  # smaller than a pixel: not rounded
    ],
)
def test_boxes_are_clipped_and_otherwise_unchanged(
    uri: str, given: tuple[float, ...], expected: tuple[float, ...]
) -> None:
    with served(FakeModel(DetectedObject(*given, confidence=0.5))) as running:
        client = InferenceHTTPClient(api_url=running.url)
        (found,) = client.infer_lmm(uri, "moondream2", prompt="dog")["predictions"]
        assert [found[key] for key in ("x", "y", "width", "height")] == pytest.approx(list(expected))
        assert found["confidence"] == 0.5
        assert running.client.get("/info").json()["has_scores"] is False


@pytest.mark.parametrize("most", [1, 2, 8])
def test_list_of_images_gets_a_list_of_answers(
    server: Served, tiny: LocalModel, scene_image: Any, other: Any, most: int
) -> None:
    client = InferenceHTTPClient(api_url=server.url).configure(InferenceConfiguration(max_batch_size=most))
    images = [scene_image, other, scene_image]
    answers = client.infer_lmm([data_uri(image) for image in images], NAME, prompt="red circle")
    if most == 2:  # the client sends two requests and does not join the answers
        answers = [*answers[0], answers[1]]
    assert len(answers) == 3
    for answer, image in zip(answers, images, strict=True):
        assert_finds(answer, image, "red circle", tiny, 1e-3)
    assert len({answer["inference_id"] for answer in answers}) == 3


@pytest.mark.parametrize(
    ("most", "count", "lengths"),
    [(4, 6, [4, 2]), (2, 6, [2, 2, 2]), (4, 5, [4, None]), (6, 6, None), (16, 6, None), (1, 6, None)],
)
def test_client_nests_the_lists_of_several_requests(
    server: Served, uri: str, most: int, count: int, lengths: list[int | None] | None
) -> None:
    """inference-sdk returns one entry per request and does not join them (see docs/server.md)."""
    asked: list[int] = []

    def as_roboflow(sent: ReceivedRequest) -> RemoteAnswer:  # the response that Roboflow's server declares for lists
        images = sent.body["image"]
        asked.append(len(images) if isinstance(images, list) else 1)
        return RemoteAnswer([{"predictions": []}] * len(images) if isinstance(images, list) else {"predictions": []})

    with remote_server() as other:
        other.on("/infer/lmm", as_roboflow)
        for url in (server.url, other.url):
            client = InferenceHTTPClient(api_url=url).configure(InferenceConfiguration(max_batch_size=most))
            answers = client.infer_lmm([uri] * count, NAME, prompt="cat")
            if lengths is None:
                assert [type(answer) for answer in answers] == [dict] * count
            else:
                assert [len(answer) if isinstance(answer, list) else None for answer in answers] == lengths
    assert sum(asked) == count


def test_list_with_one_image_gets_a_list(server: Served, uri: str) -> None:
    body = {"model_id": NAME, "prompt": "cat", "image": [{"type": "base64", "value": uri}]}
    answers = server.post("/infer/lmm", body).json()
    assert [len(answer["predictions"]) for answer in answers] == [1]


def test_unreadable_image_of_a_list_is_named(server: Served, uri: str) -> None:
    sent = [{"type": "base64", "value": uri}, {"type": "base64", "value": "aGFsbG8="}]
    answer = server.post("/infer/lmm", {"model_id": NAME, "prompt": "cat", "image": sent})
    assert answer.status_code == 400
    assert answer.json()["message"].startswith("image 1: ")


def test_length_of_lists_is_limited(server: Served, uri: str) -> None:
    body = {"model_id": NAME, "prompt": "cat", "image": [{"type": "base64", "value": uri}] * (MAX_IMAGES + 1)}
    answer = server.post("/infer/lmm", body)
    assert answer.status_code == 422
    assert str(MAX_IMAGES) in answer.json()["message"]


@pytest.mark.parametrize("in_path", [True, False])
def test_async_client_gets_predictions(
    client: Any, tiny: LocalModel, scene_image: Any, uri: str, in_path: bool
) -> None:
    asked = client.infer_lmm_async(uri, NAME, prompt="cat", model_id_in_path=in_path)
    assert_finds(asyncio.run(asked), scene_image, "cat", tiny, 1e-3)


def test_other_options_of_the_client_are_ignored(server: Served, uri: str) -> None:
    options = InferenceConfiguration(source="tests", source_info="mine", count_inference=True, service_secret="s")
    client = InferenceHTTPClient(api_url=f"{server.url}/").configure(options)
    answer = client.infer_lmm(uri, NAME, prompt="cat", max_new_tokens=10, enable_thinking=True)
    assert len(answer["predictions"]) == 1


@pytest.mark.parametrize("path", ["//infer/lmm", "/infer//lmm", f"//infer/lmm/{NAME}"])
def test_repeated_slashes_are_accepted(server: Served, uri: str, path: str) -> None:
    body = {"model_id": NAME, "prompt": "cat", "image": {"type": "base64", "value": uri}}
    assert server.client.post(server.url + path, json=body).status_code == 200


@pytest.mark.parametrize("model_id", ["moondream2", NAME, "moondream2/moondream2-2b", "Moondream-Next", "tiny"])
def test_names_of_the_served_model_are_accepted(server: Served, uri: str, model_id: str) -> None:
    body = {"prompt": "cat", "image": {"type": "base64", "value": uri}}
    assert server.post("/infer/lmm", {**body, "model_id": model_id}).status_code == 200
    assert server.post(f"/infer/lmm/{model_id}", body).status_code == 200


@pytest.mark.parametrize(
    ("call", "status", "message"),
    [
        (lambda c, i: c.infer_lmm(i, "florence-2-base", prompt="cat"), 404, "'florence-2-base'.*'tiny'"),
        (lambda c, i: c.infer_lmm(i, "smolvlm2/2b", prompt="cat", model_id_in_path=True), 404, "'smolvlm2/2b'"),
        (lambda c, i: c.infer_lmm(i, NAME), 400, "prompt.*None"),
        (lambda c, i: c.infer_lmm(i, NAME, prompt=" "), 400, "prompt.*' '"),
        (lambda c, i: c.infer_lmm("aGFsbG8=", NAME, prompt="cat"), 400, "not an image"),
        (lambda c, i: c.infer_lmm("data:image/png;base64,?", NAME, prompt="cat"), 400, "data URI"),
    ],
)
def test_client_raises_errors(
    client: Any, uri: str, call: Callable[[Any, Any], Any], status: int, message: str
) -> None:
    with pytest.raises(HTTPCallErrorError) as caught:
        call(client, uri)
    assert caught.value.status_code == status
    assert re.search(message, caught.value.api_message)


def test_async_client_raises_errors(client: Any, uri: str) -> None:
    with pytest.raises(HTTPCallErrorError) as caught:
        asyncio.run(client.infer_lmm_async(uri, "florence-2-base", prompt="cat"))
    assert caught.value.status_code == 404


def test_client_retries_when_the_queue_is_full(tiny: LocalModel, uri: str) -> None:
    with served(tiny, queue=1) as running, ThreadPoolExecutor(1) as pool:
        client = InferenceHTTPClient(api_url=running.url)
        running.service.acquire_slot()
        answer = pool.submit(client.infer_lmm, uri, NAME, prompt="cat")
        while "moondream_cv_refused_total 0.0" in running.client.get("/metrics").text:
            assert not answer.done()
            time.sleep(0.01)
        running.service.release_slot()
        assert len(answer.result(timeout=240)["predictions"]) == 1


def test_draining_server_gets_503(tiny: LocalModel, uri: str) -> None:
    with served(tiny) as running:
        running.service.draining = True
        body = {"model_id": NAME, "prompt": "cat", "image": {"type": "base64", "value": uri}}
        answer = running.post("/infer/lmm", body)
        assert (answer.status_code, answer.json()["error_type"]) == (503, "service_unavailable")
        assert int(answer.headers["Retry-After"]) > 0


def test_image_urls_are_downloaded(tiny: LocalModel, scene_image: Image.Image, uri: str) -> None:
    def with_picture(app: FastAPI) -> FastAPI:
        app.add_api_route("/scene.png", lambda: Response(decode_base64(uri), media_type="image/png"))
        return app

    with served(tiny, wrap=with_picture, private_urls=True) as running:
        url = f"{running.url}/scene.png"
        body = {"model_id": NAME, "prompt": "cat", "image": {"type": "url", "value": url}}
        assert_finds(running.post("/infer/lmm", body).json(), scene_image, "cat", tiny, 1e-3)
        assert_finds(
            InferenceHTTPClient(api_url=running.url).infer_lmm(url, NAME, prompt="cat"), scene_image, "cat", tiny, 1e-3
        )


def test_different_model_names_get_400(server: Served, uri: str) -> None:
    body = {"model_id": "moondream2", "prompt": "cat", "image": {"type": "base64", "value": uri}}
    answer = server.post(f"/infer/lmm/{NAME}", body)
    assert answer.status_code == 400
    assert NAME in answer.json()["message"]


def test_missing_model_name_gets_400(server: Served, uri: str) -> None:
    answer = server.post("/infer/lmm", {"prompt": "cat", "image": {"type": "base64", "value": uri}})
    assert answer.status_code == 400
    assert "model_id" in answer.json()["message"]


class FailsWhenUnpickled:
    """An object that fails the test when it is unpickled."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle that a client sent was opened",)


@pytest.mark.parametrize("several", [True, False])
def test_pickles_are_rejected_without_unpickling(server: Served, several: bool) -> None:
    value = base64.b64encode(pickle.dumps(FailsWhenUnpickled())).decode()
    image = {"type": "numpy", "value": value}
    answer = server.post("/infer/lmm", {"model_id": NAME, "prompt": "cat", "image": [image] if several else image})
    assert answer.status_code == 400
    assert "pickles" in answer.json()["message"]


@pytest.mark.parametrize(
    ("image", "status"),
    [
        ({"type": "file", "value": "/etc/hostname"}, 400),
        ({"type": "base64", "value": "/etc/hostname"}, 400),
        ({"type": "base64", "value": None}, 400),
        ({"type": "url", "value": "http://127.0.0.1/a.png"}, 400),
        ({"type": "url", "value": "file:///etc/hostname"}, 400),
        ({"type": "base64"}, 422),
        ("aGFsbG8=", 422),
        ([], 422),
        (None, 422),
    ],
)
def test_invalid_images_are_rejected(server: Served, image: Any, status: int) -> None:
    answer = server.post("/infer/lmm", {"model_id": NAME, "prompt": "cat", "image": image})
    assert answer.status_code == status
    assert answer.json().keys() == {"message", "error_type"}


@pytest.mark.parametrize("transport", ["legacy", "header", "both"])
def test_client_sends_api_keys(tiny: LocalModel, uri: str, transport: str) -> None:
    with served(tiny, api_keys=(KEY,)) as running:
        for key, status in ((KEY, None), ("another", 401), (None, 401)):
            options = InferenceConfiguration(api_key_transport=transport)
            client = InferenceHTTPClient(api_url=running.url, api_key=key).configure(options)
            if status is None:
                assert client.infer_lmm(uri, NAME, prompt="cat")["predictions"]
                assert asyncio.run(client.infer_lmm_async(uri, NAME, prompt="cat"))["predictions"]
                continue
            with pytest.raises(HTTPCallErrorError) as caught:
                client.infer_lmm(uri, NAME, prompt="cat")
            assert caught.value.status_code == status
            assert "API key" in caught.value.api_message
            assert KEY not in caught.value.api_message


def test_key_in_the_query_is_accepted_and_invalid_keys_get_401(tiny: LocalModel, uri: str) -> None:
    body = {"model_id": NAME, "prompt": "cat", "image": {"type": "base64", "value": uri}}
    with served(tiny, api_keys=(KEY,)) as running:
        assert running.post(f"/infer/lmm?api_key={KEY}", body).status_code == 200
        for sent in (body, {**body, "api_key": None}, {**body, "api_key": [KEY]}, {"api_key": "another"}, [], "x"):
            answer = running.post(f"/infer/lmm/{NAME}", sent)
            assert answer.status_code == 401
            assert KEY not in answer.text
        assert running.post("/infer/lmm", {"api_key": KEY}).status_code == 422
        assert running.service.in_flight == 0


def test_info_describes_the_server(tiny: LocalModel) -> None:
    with served(tiny, api_keys=(KEY,)) as running:
        info = InferenceHTTPClient(api_url=running.url, api_key=KEY).get_server_info()
        assert (info.name, info.version) == ("moondream-cv", __version__)
        answer = running.client.get("/info").json()
        assert answer == {"name": info.name, "version": info.version, "uuid": info.uuid, "has_scores": True}


def test_exif_orientation_is_applied(client: Any, scene_image: Any, tmp_path: Path) -> None:
    turned, exif = scene_image.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # rotate clockwise to display
    turned.save(tmp_path / "photo.png", exif=exif)
    answer = client.infer_lmm(str(tmp_path / "photo.png"), NAME, prompt="cat")
    assert answer["image"] == {"width": WIDTH, "height": HEIGHT}
    assert cv2.imread(str(tmp_path / "photo.png")).shape == (HEIGHT, WIDTH, 3)


def test_openapi_schema_documents_the_answers(server: Served) -> None:
    schema = server.client.get("/openapi.json").json()
    for path in ("/infer/lmm", "/infer/lmm/{model_id}"):
        assert {"200", "400", "401", "404", "422"} <= schema["paths"][path]["post"]["responses"].keys()
    assert "class" in schema["components"]["schemas"]["Prediction"]["properties"]
