"""Test the outputs of the blocks with `serialize_results=True`: valid JSON that can be parsed again."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import supervision as sv

from moondream_cv.scenes import Scene, render_scene
from tests.helpers.roboflow_app import skip_without_server
from tests.helpers.workflows import BLOCKS, compile_workflow, run_engine, run_workflow, step, workflow

skip_without_server()
pytestmark = pytest.mark.roboflow

NAMES = ["dog", "red circle", "blue star", "bus"]
FIELDS: dict[str, dict[str, Any]] = {
    "detect": {"class_names": NAMES},
    "point": {"class_names": NAMES},
    "query": {"question": "How many dogs are there?", "reasoning": True},
    "caption": {"length": "long"},
    "track": {"class_names": NAMES},
}
CLASS_BLOCKS = {"detect": "predictions", "point": "predictions", "track": "tracked_detections"}
KINDS = {
    "detect": "object_detection_prediction",
    "point": "keypoint_detection_prediction",
    "track": "object_detection_prediction",
}
EMPTY = np.zeros((0, 0, 3), np.uint8)
GRAY = np.full((240, 320, 3), 127, np.uint8)
CLOSED_URL = "http://127.0.0.1:1"  # refuses connections


def definition_of(block: str, **changes: Any) -> dict[str, Any]:
    return workflow(step(block, **{**FIELDS[block], **changes}))


def assert_json(value: Any) -> None:
    """Assert that a value survives a round trip through standard JSON."""
    assert json.loads(json.dumps(value, allow_nan=False)) == value


def run_both(definition: dict[str, Any], images: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the outputs of a run and the serialized outputs of another run."""
    plain, serialized = (run_engine(compile_workflow(definition), images, serialize) for serialize in (False, True))
    assert_json(serialized)
    return plain, serialized


def assert_equal_detections(found: sv.Detections, expected: sv.Detections) -> None:
    assert len(found) == len(expected) > 0
    assert np.allclose(found.xyxy, expected.xyxy, atol=0.01)
    assert np.allclose(found.confidence, expected.confidence)
    assert found.class_id.tolist() == expected.class_id.tolist()
    assert found.data["class_name"].tolist() == expected.data["class_name"].tolist()
    if expected.tracker_id is not None:
        assert found.tracker_id.tolist() == expected.tracker_id.tolist()


@pytest.mark.parametrize("block", BLOCKS)
def test_serialized_outputs_match_the_outputs(block: str, bgr: np.ndarray) -> None:
    (plain,), (serialized,) = run_both(definition_of(block), bgr)
    assert serialized.keys() == plain.keys()
    assert (serialized["error_status"], serialized["error_message"]) == (False, "")
    for name in plain:
        if isinstance(plain[name], sv.Detections):
            assert serialized[name]["image"] == {"width": 320, "height": 240}
            assert len(serialized[name]["predictions"]) == len(plain[name])
        else:
            assert serialized[name] == plain[name]
            assert type(serialized[name]) is type(plain[name])


def test_grounding_refers_to_the_reasoning(bgr: np.ndarray) -> None:
    _, (serialized,) = run_both(definition_of("query"), bgr)
    (ground,) = serialized["grounding"]
    assert serialized["reasoning"][ground["start"] : ground["end"]] == ground["text"]
    assert [sorted(point) for point in ground["points"]] == [["x", "y"]]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    ("image", "changes", "message", "resolution_wh"),
    [
        (EMPTY, {}, "no pixels", (None, None)),
        (GRAY, {"model": CLOSED_URL}, CLOSED_URL, (320, 240)),
        (np.zeros((240, 320, 7), np.uint8), {}, "(240, 320, 7)", (None, None)),
    ],
    ids=["empty image", "no server", "seven channels"],
)
def test_serialized_outputs_of_a_failed_image(
    block: str, image: np.ndarray, changes: dict[str, Any], message: str, resolution_wh: tuple[int | None, int | None]
) -> None:
    (plain,), (serialized,) = run_both(definition_of(block, **changes), image)
    assert serialized.keys() == plain.keys()
    assert serialized["error_status"] is True
    assert message in serialized["error_message"]
    empty = {"image": dict(zip(("width", "height"), resolution_wh, strict=True)), "predictions": []}
    for name in serialized.keys() - {"error_status", "error_message"}:
        assert serialized[name] == (empty if isinstance(plain[name], sv.Detections) else plain[name])
        assert not plain[name]


@pytest.mark.parametrize("block", BLOCKS)
def test_serialized_outputs_of_an_invalid_array(block: str) -> None:
    (serialized,) = run_workflow(definition_of(block), np.zeros(9, np.uint8), serialize=True)
    assert_json(serialized)
    assert serialized["error_status"] is True
    assert "shape (9,)" in serialized["error_message"]


@pytest.mark.parametrize("block", CLASS_BLOCKS)
def test_serialized_outputs_without_detections(block: str) -> None:
    (plain,), (serialized,) = run_both(definition_of(block), GRAY)
    assert serialized["error_status"] is False
    for name in plain:
        if isinstance(plain[name], sv.Detections):
            assert serialized[name] == {"image": {"width": 320, "height": 240}, "predictions": []}


@pytest.mark.parametrize("block", BLOCKS)
def test_serialized_outputs_of_a_batch_have_the_same_keys(block: str, bgr: np.ndarray) -> None:
    _, serialized = run_both(definition_of(block), [bgr, EMPTY, bgr])
    assert [result["error_status"] for result in serialized] == [False, True, False]
    assert len({json.dumps(sorted(result)) for result in serialized}) == 1


# --- Parsing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", CLASS_BLOCKS)
def test_supervision_parses_serialized_detections(block: str, bgr: np.ndarray) -> None:
    (plain,), (serialized,) = run_both(definition_of(block), bgr)
    name = CLASS_BLOCKS[block]
    assert_equal_detections(sv.Detections.from_inference(serialized[name]), plain[name])


@pytest.mark.parametrize("block", CLASS_BLOCKS)
def test_engine_parses_serialized_detections(block: str, bgr: np.ndarray) -> None:
    """As an input of another workflow, the detections are filtered and drawn like the original ones."""
    (plain,), (serialized,) = run_both(definition_of(block), bgr)
    name = CLASS_BLOCKS[block]
    again = drawing(KINDS[block]).run(
        runtime_parameters={"image": [bgr], "found": [json.loads(json.dumps(serialized[name]))]}
    )
    (direct,) = drawing(KINDS[block]).run(runtime_parameters={"image": [bgr], "found": [plain[name]]})
    assert_equal_detections(again[0]["filter.predictions"], plain[name])
    ids = [box["detection_id"] for box in serialized[name]["predictions"]]
    assert again[0]["filter.predictions"].data["detection_id"].tolist() == ids
    assert np.array_equal(again[0]["boxes.image"].numpy_image, direct["boxes.image"].numpy_image)
    assert not np.array_equal(direct["boxes.image"].numpy_image, bgr)


def test_engine_parses_serialized_key_points(bgr: np.ndarray) -> None:
    (plain,), (serialized,) = run_both(definition_of("point"), bgr)
    engine = drawing(KINDS["point"])
    found = engine.run(runtime_parameters={"image": [bgr], "found": [serialized["predictions"]]})[0][
        "filter.predictions"
    ]
    for key in ("keypoints_xy", "keypoints_confidence", "keypoints_class_id", "keypoints_class_name"):
        assert np.array(found.data[key].tolist()).shape == np.array(plain["predictions"].data[key].tolist()).shape
    assert np.allclose(np.array(found.data["keypoints_xy"].tolist(), float), plain["predictions"].data["keypoints_xy"])


@pytest.mark.parametrize("block", CLASS_BLOCKS)
@pytest.mark.parametrize("image", [GRAY, EMPTY], ids=["no detections", "failed"])
def test_engine_parses_empty_serialized_detections(block: str, image: np.ndarray, bgr: np.ndarray) -> None:
    (serialized,) = run_workflow(definition_of(block), image, serialize=True)
    (again,) = drawing(KINDS[block]).run(
        runtime_parameters={"image": [bgr], "found": [serialized[CLASS_BLOCKS[block]]]}
    )
    assert len(again["filter.predictions"]) == 0
    assert np.array_equal(again["boxes.image"].numpy_image, bgr)


def drawing(kind: str) -> Any:
    """Compile a workflow that filters and draws detections of an input."""
    definition = workflow(
        {
            "type": "roboflow_core/detections_filter@v1",
            "name": "filter",
            "predictions": "$inputs.found",
            "operations": [
                {
                    "type": "DetectionsFilter",
                    "filter_operation": {
                        "type": "StatementGroup",
                        "statements": [
                            {
                                "type": "BinaryStatement",
                                "left_operand": {
                                    "type": "DynamicOperand",
                                    "operations": [{"type": "ExtractDetectionProperty", "property_name": "confidence"}],
                                },
                                "comparator": {"type": "(Number) >="},
                                "right_operand": {"type": "StaticOperand", "value": 0.1},
                            }
                        ],
                    },
                }
            ],
            "operations_parameters": {},
        },
        {
            "type": "roboflow_core/dot_visualization@v1",
            "name": "boxes",
            "image": "$inputs.image",
            "predictions": "$steps.filter.predictions",
        },
        outputs=["filter.predictions", "boxes.image"],
    )
    definition["inputs"].append({"type": "WorkflowBatchInput", "name": "found", "kind": [kind]})
    return compile_workflow(definition)


# --- Crops ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_dogs() -> Scene:
    return render_scene(5, resolution_wh=(480, 360), names=["dog", "dog", "red circle"], style="plain")


@pytest.fixture(scope="module")
def on_crops() -> dict[str, Any]:
    """Return a workflow that runs all blocks on the crops of detections."""
    crops = {
        "type": "roboflow_core/dynamic_crop@v1",
        "name": "crops",
        "images": "$inputs.image",
        "predictions": "$steps.all.predictions",
    }
    inner = [step(block, block, images="$steps.crops.crops", **FIELDS[block]) for block in BLOCKS]
    names = ("predictions", "points", "answer", "reasoning", "grounding", "caption", "tracked_detections")
    names_of_blocks = {
        "detect": names[:1],
        "point": names[:2],
        "query": names[2:5],
        "caption": names[5:6],
        "track": (*names[6:], "new_instances", "already_seen_instances"),
    }
    outputs = [
        f"{block}.{name}" for block in BLOCKS for name in (*names_of_blocks[block], "error_status", "error_message")
    ]
    definition = workflow(
        step("detect", "all", class_names=["dog", "red circle"]), crops, *inner, outputs=[*outputs, "crops.crops"]
    )
    return definition


@pytest.mark.parametrize("found", [True, False], ids=["crops", "no crops"])
def test_serialized_outputs_of_crops(on_crops: dict[str, Any], two_dogs: Scene, found: bool) -> None:
    image = np.ascontiguousarray(two_dogs.image[..., ::-1]) if found else GRAY
    (serialized,) = run_workflow(on_crops, image, serialize=True)
    serialized.pop("crops.crops")  # the engine does not convert the times of images
    assert_json(serialized)
    assert {len(values) for values in serialized.values()} == {3 if found else 0}
    for block in BLOCKS:
        assert not any(serialized[f"{block}.error_status"])


@pytest.mark.parametrize("block", CLASS_BLOCKS)
@pytest.mark.parametrize("system", ["own", "parent"])
def test_serialized_boxes_of_crops_have_the_coordinates_of_the_image(
    scene: Scene, bgr: np.ndarray, block: str, system: str
) -> None:
    """Boxes are in pixels of the whole image, or in pixels of the crop with the origin of the crop."""
    left, top, whole = 100, 70, np.full((400, 600, 3), 127, np.uint8)
    whole[top : top + 240, left : left + 320] = bgr
    crop = {
        "type": "roboflow_core/absolute_static_crop@v1",
        "name": "crop",
        "images": "$inputs.image",
        "x_center": left + 160,
        "y_center": top + 120,
        "width": 320,
        "height": 240,
    }
    definition = workflow(crop, step(block, images="$steps.crop.crops", **FIELDS[block]))
    definition["outputs"][0]["coordinates_system"] = system
    _, (serialized,) = run_both(definition, whole)
    prediction = serialized[CLASS_BLOCKS[block]]
    origin = {"offset_x": left, "offset_y": top, "width": 600, "height": 400}
    assert sorted(box["class"] for box in prediction["predictions"]) == sorted(NAMES)
    for box in prediction["predictions"]:
        x, y = box["x"], box["y"]
        if system == "own":
            assert (box["root_parent_id"], box["root_parent_origin"], box["parent_origin"]) == ("image", origin, origin)
        else:
            assert box["parent_id"] == "image"
            x, y = x - left, y - top
        (true,) = (o.xyxy for o in scene.objects if o.name == box["class"])
        assert true[0] < x < true[2]
        assert true[1] < y < true[3]
    size = (320, 240) if system == "own" else (600, 400)
    assert prediction["image"] == dict(zip(("width", "height"), size, strict=True))
