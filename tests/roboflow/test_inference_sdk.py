"""Test Roboflow's client with Roboflow's inference server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moondream_cv.engine.local_model import LocalModel
from moondream_cv.scenes import Scene
from tests.helpers.roboflow_app import MODEL_ID, boxes_of, encoded, expected_boxes, skip_without_server

skip_without_server()
pytestmark = pytest.mark.roboflow

INPUTS: dict[str, Callable[[np.ndarray, Path], Any]] = {
    "array": lambda rgb, _: np.ascontiguousarray(rgb[..., ::-1]),
    "BGRA array": lambda rgb, _: np.dstack([rgb[..., ::-1], np.full(rgb.shape[:2], 255, np.uint8)]),
    "PIL": lambda rgb, _: Image.fromarray(rgb),
    "JPEG file": lambda _, folder: str(folder / "scene.jpg"),
    "PNG file": lambda _, folder: str(folder / "scene.png"),
    "base64": lambda rgb, _: encoded(rgb),
    "data URI": lambda rgb, _: "data:image/png;base64," + encoded(rgb),
}


@pytest.fixture
def client(url: str) -> Any:
    from inference_sdk import InferenceHTTPClient

    return InferenceHTTPClient(url, api_key=None)


@pytest.fixture
def files(scene: Scene, tmp_path: Path) -> Path:
    for suffix in ("jpg", "png"):
        Image.fromarray(scene.image).save(tmp_path / f"scene.{suffix}")
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    return tmp_path


@pytest.mark.parametrize("form", INPUTS)
def test_client_accepts_all_image_types(client: Any, tiny: LocalModel, scene: Scene, files: Path, form: str) -> None:
    reply = client.infer_lmm(INPUTS[form](scene.image, files), model_id=MODEL_ID, prompt="dog")
    lossless = form in ("PNG file", "base64", "data URI")
    assert np.allclose(boxes_of(reply), expected_boxes(tiny, scene.image), atol=0 if lossless else 2)
    assert len(reply["predictions"]) == 1


def test_client_accepts_lists_of_images(client: Any, bgr: np.ndarray) -> None:
    replies = client.infer_lmm([bgr, bgr], model_id=MODEL_ID, prompt="dog")
    assert [len(reply["predictions"]) for reply in replies] == [1, 1]
    assert isinstance(client.infer_lmm([bgr], model_id=MODEL_ID, prompt="dog"), dict)


@pytest.mark.parametrize("transport", ["legacy", "header", "both"])
def test_client_sends_api_keys(client: Any, url: str, bgr: np.ndarray, transport: str) -> None:
    from inference_sdk import InferenceConfiguration, InferenceHTTPClient

    keyed = InferenceHTTPClient(url, api_key="a-key")
    with keyed.use_configuration(InferenceConfiguration(api_key_transport=transport)):
        reply = keyed.infer_lmm(bgr, model_id=MODEL_ID, prompt="dog", model_id_in_path=True)
    assert boxes_of(reply) == boxes_of(client.infer_lmm(bgr, model_id=MODEL_ID, prompt="dog"))


def test_client_raises_http_errors(client: Any, url: str, bgr: np.ndarray, files: Path) -> None:
    from inference_sdk import InferenceConfiguration, InferenceHTTPClient
    from inference_sdk.http.errors import HTTPCallErrorError

    def fails(use: Callable[[], Any]) -> tuple[int, str]:
        with pytest.raises(HTTPCallErrorError) as caught:
            use()
        return caught.value.status_code, caught.value.api_message

    fields = {"model_id": MODEL_ID, "prompt": "dog"}
    assert fails(lambda: client.infer_lmm(str(files / "broken.jpg"), **fields)) == (
        400,
        "Could not load input image. Cause: Malformed base64 input image.",
    )
    assert fails(lambda: client.infer_lmm(bgr, "nonsense/1", prompt="dog")) == (
        503,
        "Internal error. Could not connect to Roboflow API.",
    )
    slashed = InferenceHTTPClient(url + "/", api_key=None)
    assert fails(lambda: slashed.infer_lmm(bgr, **fields)) == (405, "Method Not Allowed")
    with client.use_configuration(InferenceConfiguration(max_batch_size=2)):
        assert fails(lambda: client.infer_lmm([bgr, bgr], **fields)) == (500, "Internal error.")


def test_asynchronous_client_matches_the_synchronous_one(client: Any, bgr: np.ndarray) -> None:
    reply = asyncio.run(client.infer_lmm_async(bgr, model_id=MODEL_ID, prompt="dog"))
    assert boxes_of(reply) == boxes_of(client.infer_lmm(bgr, model_id=MODEL_ID, prompt="dog"))


def test_client_reads_the_server_info(client: Any) -> None:
    assert client.get_server_info().name == "Roboflow Inference Server"
