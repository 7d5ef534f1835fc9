"""Test the blocks in Roboflow's HTTP server: runs, block descriptions, errors, and its client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import requests

from moondream_cv import Detector, Pointer
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.scenes import Scene
from tests.helpers.roboflow_app import boxes_of, encoded, expected_boxes, skip_without_server
from tests.helpers.workflows import ALL_BLOCKS, NAMESPACE, step, workflow

skip_without_server()
pytestmark = pytest.mark.roboflow

NAMES = ["bus", "dog", "red circle"]
FIELDS = {
    "detect": {"images", "model", "class_names", "confidence", "max_objects", "nms"},
    "point": {"images", "model", "class_names", "confidence", "max_objects"},
    "query": {"images", "model", "question", "parameters", "reasoning", "max_tokens", "temperature"},
    "caption": {"images", "model", "length", "max_tokens", "temperature"},
    "track": {"images", "model", "class_names", "confidence", "max_objects", "every", "nms", "tracker"},
    "segment": {"images", "model", "class_names", "confidence", "max_objects", "nms", "masks"},
}
OUTPUTS = {
    "detect": ["predictions"],
    "point": ["predictions", "points"],
    "query": ["answer", "reasoning", "grounding"],
    "caption": ["caption"],
    "track": ["tracked_detections", "new_instances", "already_seen_instances"],
    "segment": ["predictions"],
}
ERRORS = ["error_status", "error_message"]
ALLOWED = "MOONDREAM_CV_BLOCKS_MODELS"


def in_base64(rgb: np.ndarray) -> dict[str, str]:
    return {"type": "base64", "value": encoded(rgb)}


def post(url: str, definition: dict[str, Any], image: Any, **parameters: Any) -> requests.Response:
    inputs = {"image": image, **parameters}
    return requests.post(f"{url}/workflows/run", json={"specification": definition, "inputs": inputs}, timeout=240)


def outputs(answer: requests.Response) -> list[dict[str, Any]]:
    """Return the outputs of the last step for each image."""
    assert answer.status_code == 200, answer.text
    return [result["*"] for result in answer.json()["outputs"]]


def check_no_error(found: dict[str, Any]) -> None:
    assert (found["error_status"], found["error_message"]) == (False, "")


def check_prediction(reply: dict[str, Any], expected: Any, resolution_wh: Sequence[int]) -> None:
    """Assert that a prediction has the boxes, classes and confidences of detections."""
    found = reply["predictions"]
    assert reply["image"] == dict(zip(("width", "height"), resolution_wh, strict=True))
    assert [box["class"] for box in found] == expected.data["class_name"].tolist()
    assert [box["class_id"] for box in found] == expected.class_id.tolist()
    assert np.allclose([box["confidence"] for box in found], expected.confidence, atol=1e-3)
    centers, sizes = (expected.xyxy[:, :2] + expected.xyxy[:, 2:]) / 2, expected.xyxy[:, 2:] - expected.xyxy[:, :2]
    assert np.allclose(boxes_of(reply), np.hstack([centers, sizes]), atol=0.5)  # rounding depends on the batch size
    assert len({box["detection_id"] for box in found}) == len(found) > 0


# --- Running workflows ----------------------------------------------------------------------------------------------


def test_detect_returns_the_boxes_of_the_detector(url: str, tiny: LocalModel, scene: Scene, bgr: np.ndarray) -> None:
    (found,) = outputs(post(url, workflow(step("detect", class_names=NAMES)), in_base64(scene.image)))
    check_no_error(found)
    check_prediction(found["predictions"], Detector(tiny)(bgr, NAMES), (320, 240))


def test_point_returns_the_points_of_the_pointer(url: str, tiny: LocalModel, scene: Scene, bgr: np.ndarray) -> None:
    (found,) = outputs(post(url, workflow(step("point", class_names=NAMES)), in_base64(scene.image)))
    check_no_error(found)
    expected = Pointer(tiny)(bgr, NAMES)
    check_prediction(found["predictions"], expected, (320, 240))
    assert np.allclose([[point["x"], point["y"]] for point in found["points"]], expected.xyxy[:, :2], atol=0.5)


def test_caption_and_query_return_the_texts_of_the_model(
    url: str, tiny: LocalModel, scene: Scene, bgr: np.ndarray
) -> None:
    settings = {"temperature": 0}
    question = "How many dogs are there?"
    (found,) = outputs(post(url, workflow(step("caption", length="short")), in_base64(scene.image)))
    check_no_error(found)
    assert found["caption"] == tiny.caption(bgr, "short", settings=settings)["caption"] != ""
    (found,) = outputs(post(url, workflow(step("query", question=question)), in_base64(scene.image)))
    check_no_error(found)
    assert found["answer"] == tiny.query(bgr, question, settings=settings)["answer"] != ""
    assert (found["reasoning"], found["grounding"]) == ("", [])


def test_track_assigns_ids_to_detections(url: str, tiny: LocalModel, scene: Scene, bgr: np.ndarray) -> None:
    (found,) = outputs(post(url, workflow(step("track", class_names=NAMES)), in_base64(scene.image)))
    check_no_error(found)
    expected = Detector(tiny)(bgr, NAMES)
    check_prediction(found["tracked_detections"], expected, (320, 240))
    assert sorted(box["tracker_id"] for box in found["new_instances"]["predictions"]) == [1, 2, 3]
    assert found["already_seen_instances"]["predictions"] == []


def test_track_keeps_no_state_between_requests(url: str, scene: Scene) -> None:
    definition = workflow(step("track", class_names=NAMES))
    for _ in range(2):
        (found,) = outputs(post(url, definition, in_base64(scene.image)))
        assert [box["tracker_id"] for box in found["new_instances"]["predictions"]] == [1, 2, 3]


def test_list_of_images_returns_one_result_per_image(url: str, tiny: LocalModel, scene: Scene, bgr: np.ndarray) -> None:
    images = [scene.image, np.ascontiguousarray(scene.image[:, ::-1])]
    found = outputs(post(url, workflow(step("detect", class_names=NAMES)), [in_base64(image) for image in images]))
    for result, image in zip(found, images, strict=True):
        check_no_error(result)
        check_prediction(result["predictions"], Detector(tiny)(image[..., ::-1].copy(), NAMES), (320, 240))
    centers = [boxes_of(result["predictions"])[0][0] for result in found]
    assert sum(centers) == pytest.approx(320, abs=4)  # mirror images


def test_fields_accept_workflow_parameters(url: str, scene: Scene) -> None:
    definition = workflow(
        step("detect", class_names="$inputs.names", model="$inputs.model"), parameters=["names", "model"]
    )
    (found,) = outputs(post(url, definition, in_base64(scene.image), names=["dog"], model="tiny"))
    assert [box["class"] for box in found["predictions"]["predictions"]] == ["dog"]
    (found,) = outputs(post(url, definition, in_base64(scene.image), names="bus, dog", model="tiny"))
    assert [box["class_id"] for box in found["predictions"]["predictions"]] == [0, 1]


def test_model_failure_returns_error_outputs(url: str, scene: Scene) -> None:
    """The model's server refuses connections."""
    definition = workflow(step("detect", class_names=NAMES, model="http://127.0.0.1:1"))
    (found,) = outputs(post(url, definition, in_base64(scene.image)))
    assert found["error_status"] is True
    assert "http://127.0.0.1:1" in found["error_message"]
    assert found["predictions"] == {"image": {"width": 320, "height": 240}, "predictions": []}


def test_server_can_be_its_own_model(url: str, tiny: LocalModel, scene: Scene) -> None:
    (found,) = outputs(post(url, workflow(step("detect", class_names=NAMES, model=url)), in_base64(scene.image)))
    check_no_error(found)
    boxes = found["predictions"]["predictions"]
    assert [(box["class"], box["class_id"], box["confidence"]) for box in boxes] == [
        (name, index, 1.0) for index, name in enumerate(NAMES)
    ]
    expected = [box for name in NAMES for box in expected_boxes(tiny, scene.image, name)]
    assert np.allclose(boxes_of(found["predictions"]), expected, atol=2)  # images are sent as JPEG


def test_unsupported_skill_of_the_server_returns_error_outputs(url: str, scene: Scene) -> None:
    (found,) = outputs(post(url, workflow(step("caption", model=url)), in_base64(scene.image)))
    assert found["error_status"] is True
    assert "caption" in found["error_message"]
    assert url in found["error_message"]
    assert found["caption"] == ""


def test_roboflow_client_runs_a_workflow(url: str, tiny: LocalModel, bgr: np.ndarray) -> None:
    from inference_sdk import InferenceHTTPClient

    client = InferenceHTTPClient(url, api_key=None)
    definition = workflow(step("detect", class_names=NAMES), outputs=["step.predictions", "step.error_status"])
    first, second = client.run_workflow(specification=definition, images={"image": [bgr, bgr]})
    assert first["step.error_status"] is second["step.error_status"] is False
    expected = Detector(tiny)(bgr, NAMES)
    for result in (first, second):
        boxes = boxes_of(result["step.predictions"])
        assert np.allclose(boxes, np.array(expected_boxes_of(expected)), atol=3)  # the client sends JPEG


def expected_boxes_of(detections: Any) -> list[list[float]]:
    corners = detections.xyxy
    return np.hstack([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]]).tolist()  # type: ignore[no-any-return]


# --- Describing blocks ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def described(url: str) -> dict[str, dict[str, Any]]:
    blocks = requests.post(f"{url}/workflows/blocks/describe", json={}, timeout=240).json()["blocks"]
    return {
        block["manifest_type_identifier"]: block
        for block in blocks
        if block["manifest_type_identifier"].startswith(f"{NAMESPACE}/")
    }


def test_server_lists_all_blocks(described: dict[str, dict[str, Any]]) -> None:
    assert sorted(described) == sorted(f"{NAMESPACE}/{block}@v1" for block in ALL_BLOCKS)


@pytest.mark.parametrize("block", ALL_BLOCKS)
def test_server_describes_fields_and_outputs(described: dict[str, dict[str, Any]], block: str) -> None:
    found = described[f"{NAMESPACE}/{block}@v1"]
    properties = found["block_schema"]["properties"]
    assert properties.keys() - {"type", "name"} == FIELDS[block]
    for name in FIELDS[block]:
        assert properties[name]["description"]
        assert properties[name]["examples"]
    assert [output["name"] for output in found["outputs_manifest"]] == OUTPUTS[block] + ERRORS
    assert all(output["kind"] for output in found["outputs_manifest"])
    assert found["human_friendly_block_name"] == f"Moondream {block.capitalize()}"
    assert "images" in found["block_schema"]["required"]
    assert "model" not in found["block_schema"]["required"]


# --- Errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "fields", "invalid"),
    [
        ("detect", {"class_names": []}, "class_names"),
        ("detect", {"class_names": ["dog", "dog"]}, "class_names"),
        ("detect", {"class_names": ["dog"], "model": "nothing-here"}, "model"),
        ("detect", {"class_names": ["dog"], "confidence": 1.5}, "confidence"),
        ("point", {"class_names": ["dog"], "max_objects": 0}, "max_objects"),
        ("query", {"question": " "}, "question"),
        ("query", {"question": "Where is {it}?"}, "parameters"),
        ("caption", {"length": "endless"}, "length"),
        ("track", {"class_names": ["dog"], "every": 0}, "every"),
        ("track", {"class_names": ["dog"], "tracker": "hound"}, "tracker"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_definition_returns_400(
    url: str, scene: Scene, block: str, fields: dict[str, Any], invalid: str
) -> None:
    answer = post(url, workflow(step(block, "the_step", **fields)), in_base64(scene.image))
    assert answer.status_code == 400
    (error,) = {(error["block_id"], error["property_name"]) for error in answer.json()["blocks_errors"]}
    assert error == ("the_step", invalid)
    assert invalid in answer.json()["inner_error_message"]


def test_invalid_parameter_returns_error_outputs(url: str, scene: Scene) -> None:
    definition = workflow(step("detect", class_names="$inputs.names"), parameters=["names"])
    (found,) = outputs(post(url, definition, in_base64(scene.image), names=["dog", "dog"]))
    assert found["error_status"] is True
    assert found["error_message"] == "class_names must be unique; duplicates: 'dog'"
    assert found["predictions"]["predictions"] == []


def test_unreadable_image_returns_400(url: str) -> None:
    """The engine rejects the request before it runs a step."""
    answer = post(url, workflow(step("detect", class_names=NAMES)), {"type": "base64", "value": "bm90IGFuIGltYWdl"})
    assert answer.status_code == 400
    assert "image" in answer.json()["message"]


@pytest.mark.parametrize("model", ["http://127.0.0.1:1", "moondream2"])
def test_model_that_is_not_allowed_returns_400(
    url: str, scene: Scene, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setenv(ALLOWED, f"tiny, {url}")
    answer = post(url, workflow(step("detect", "the_step", class_names=NAMES, model=model)), in_base64(scene.image))
    assert answer.status_code == 400
    (error,) = answer.json()["blocks_errors"]
    assert (error["block_id"], error["property_name"]) == ("the_step", "model")
    assert "is not allowed" in error["property_details"]


def test_allowed_models_can_be_used(url: str, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOWED, f"tiny, {url}")
    for model in ("tiny", url, f"{url}/"):
        definition = workflow(step("detect", class_names=NAMES, model=model))
        check_no_error(outputs(post(url, definition, in_base64(scene.image)))[0])


def test_parameter_with_a_model_that_is_not_allowed_returns_error_outputs(
    url: str, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ALLOWED, "tiny")
    definition = workflow(step("detect", class_names=NAMES, model="$inputs.model"), parameters=["model"])
    check_no_error(outputs(post(url, definition, in_base64(scene.image), model="tiny"))[0])
    (found,) = outputs(post(url, definition, in_base64(scene.image), model=url))
    assert found["error_status"] is True
    assert "is not allowed" in found["error_message"]


def test_allowed_list_applies_to_compiled_workflows(url: str, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    definition = workflow(step("detect", class_names=NAMES))
    check_no_error(outputs(post(url, definition, in_base64(scene.image)))[0])
    monkeypatch.setenv(ALLOWED, "moondream2")
    (found,) = outputs(post(url, definition, in_base64(scene.image)))  # the server caches compiled workflows
    assert found["error_status"] is True
    assert "is not allowed" in found["error_message"]
    assert found["predictions"]["predictions"] == []
