"""What the engine makes of our blocks' outputs with `serialize_results=True`: JSON, which can be read back."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import supervision as sv

from moondream_cv.scenes import Scene, render_scene
from tests.helpers.roboflow_app import skip_without_server
from tests.helpers.workflows import BLOCKS, compiled, results, run, step, workflow

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
FINDERS = {"detect": "predictions", "point": "predictions", "track": "tracked_detections"}
KINDS = {
    "detect": "object_detection_prediction",
    "point": "keypoint_detection_prediction",
    "track": "object_detection_prediction",
}
EMPTY = np.zeros((0, 0, 3), np.uint8)
NOTHING = np.full((240, 320, 3), 127, np.uint8)
NOBODY = "http://127.0.0.1:1"  # no server is there


def definition_of(block: str, **changes: Any) -> dict[str, Any]:
    return workflow(step(block, **{**FIELDS[block], **changes}))


def check_json(value: Any) -> None:
    """That JSON, without what only Python's has, says the same."""
    assert json.loads(json.dumps(value, allow_nan=False)) == value


def both(definition: dict[str, Any], images: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Outputs as they are, and serialised; of two runs, since an engine gives one or the other."""
    plain, written = (results(compiled(definition), images, serialize) for serialize in (False, True))
    check_json(written)
    return plain, written


def check_read_back(found: sv.Detections, expected: sv.Detections) -> None:
    assert len(found) == len(expected) > 0
    assert np.allclose(found.xyxy, expected.xyxy, atol=0.01)
    assert np.allclose(found.confidence, expected.confidence)
    assert found.class_id.tolist() == expected.class_id.tolist()
    assert found.data["class_name"].tolist() == expected.data["class_name"].tolist()
    if expected.tracker_id is not None:
        assert found.tracker_id.tolist() == expected.tracker_id.tolist()


@pytest.mark.parametrize("block", BLOCKS)
def test_outputs(block: str, bgr: np.ndarray) -> None:
    (plain,), (written,) = both(definition_of(block), bgr)
    assert written.keys() == plain.keys()
    assert (written["error_status"], written["error_message"]) == (False, "")
    for name in plain:
        if isinstance(plain[name], sv.Detections):
            assert written[name]["image"] == {"width": 320, "height": 240}
            assert len(written[name]["predictions"]) == len(plain[name])
        else:
            assert written[name] == plain[name]
            assert type(written[name]) is type(plain[name])


def test_thoughts_that_speak_of_points(bgr: np.ndarray) -> None:
    _, (written,) = both(definition_of("query"), bgr)
    (ground,) = written["grounding"]
    assert written["reasoning"][ground["start"] : ground["end"]] == ground["text"]
    assert [sorted(point) for point in ground["points"]] == [["x", "y"]]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    ("image", "changes", "says", "resolution_wh"),
    [
        (EMPTY, {}, "no pixels", (None, None)),
        (NOTHING, {"model": NOBODY}, NOBODY, (320, 240)),
        (np.zeros((240, 320, 7), np.uint8), {}, "(240, 320, 7)", (None, None)),
    ],
    ids=["empty image", "no server", "seven channels"],
)
def test_outputs_of_what_fails(
    block: str, image: np.ndarray, changes: dict[str, Any], says: str, resolution_wh: tuple[int | None, int | None]
) -> None:
    (plain,), (written,) = both(definition_of(block, **changes), image)
    assert written.keys() == plain.keys()
    assert written["error_status"] is True
    assert says in written["error_message"]
    nothing = {"image": dict(zip(("width", "height"), resolution_wh, strict=True)), "predictions": []}
    for name in written.keys() - {"error_status", "error_message"}:
        assert written[name] == (nothing if isinstance(plain[name], sv.Detections) else plain[name])
        assert not plain[name]


@pytest.mark.parametrize("block", BLOCKS)
def test_outputs_of_what_is_no_image(block: str) -> None:
    (written,) = run(definition_of(block), np.zeros(9, np.uint8), serialize=True)
    check_json(written)
    assert written["error_status"] is True
    assert "shape (9,)" in written["error_message"]


@pytest.mark.parametrize("block", FINDERS)
def test_outputs_where_nothing_is_found(block: str) -> None:
    (plain,), (written,) = both(definition_of(block), NOTHING)
    assert written["error_status"] is False
    for name in plain:
        if isinstance(plain[name], sv.Detections):
            assert written[name] == {"image": {"width": 320, "height": 240}, "predictions": []}


@pytest.mark.parametrize("block", BLOCKS)
def test_a_batch_of_good_and_bad(block: str, bgr: np.ndarray) -> None:
    _, written = both(definition_of(block), [bgr, EMPTY, bgr])
    assert [result["error_status"] for result in written] == [False, True, False]
    assert len({json.dumps(sorted(result)) for result in written}) == 1


# --- Reading it back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", FINDERS)
def test_supervision_reads_detections(block: str, bgr: np.ndarray) -> None:
    (plain,), (written,) = both(definition_of(block), bgr)
    name = FINDERS[block]
    check_read_back(sv.Detections.from_inference(written[name]), plain[name])


@pytest.mark.parametrize("block", FINDERS)
def test_the_engine_reads_detections(block: str, bgr: np.ndarray) -> None:
    """As an input of another workflow, they go through a filter and are drawn as if nothing had happened."""
    (plain,), (written,) = both(definition_of(block), bgr)
    name = FINDERS[block]
    again = drawing(KINDS[block]).run(
        runtime_parameters={"image": [bgr], "found": [json.loads(json.dumps(written[name]))]}
    )
    (direct,) = drawing(KINDS[block]).run(runtime_parameters={"image": [bgr], "found": [plain[name]]})
    check_read_back(again[0]["filter.predictions"], plain[name])
    ids = [box["detection_id"] for box in written[name]["predictions"]]
    assert again[0]["filter.predictions"].data["detection_id"].tolist() == ids
    assert np.array_equal(again[0]["boxes.image"].numpy_image, direct["boxes.image"].numpy_image)
    assert not np.array_equal(direct["boxes.image"].numpy_image, bgr)


def test_the_engine_reads_key_points(bgr: np.ndarray) -> None:
    (plain,), (written,) = both(definition_of("point"), bgr)
    engine = drawing(KINDS["point"])
    found = engine.run(runtime_parameters={"image": [bgr], "found": [written["predictions"]]})[0]["filter.predictions"]
    for key in ("keypoints_xy", "keypoints_confidence", "keypoints_class_id", "keypoints_class_name"):
        assert np.array(found.data[key].tolist()).shape == np.array(plain["predictions"].data[key].tolist()).shape
    assert np.allclose(np.array(found.data["keypoints_xy"].tolist(), float), plain["predictions"].data["keypoints_xy"])


@pytest.mark.parametrize("block", FINDERS)
@pytest.mark.parametrize("image", [NOTHING, EMPTY], ids=["nothing found", "failed"])
def test_the_engine_reads_nothing(block: str, image: np.ndarray, bgr: np.ndarray) -> None:
    (written,) = run(definition_of(block), image, serialize=True)
    (again,) = drawing(KINDS[block]).run(runtime_parameters={"image": [bgr], "found": [written[FINDERS[block]]]})
    assert len(again["filter.predictions"]) == 0
    assert np.array_equal(again["boxes.image"].numpy_image, bgr)


def drawing(kind: str) -> Any:
    """A workflow that takes detections from outside: filter → drawing."""
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
    return compiled(definition)


# --- Crops ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_dogs() -> Scene:
    return render_scene(5, resolution_wh=(480, 360), names=["dog", "dog", "red circle"], style="plain")


@pytest.fixture(scope="module")
def on_crops() -> dict[str, Any]:
    """Detect → crop → each of the blocks on the crops."""
    crops = {
        "type": "roboflow_core/dynamic_crop@v1",
        "name": "crops",
        "images": "$inputs.image",
        "predictions": "$steps.all.predictions",
    }
    inner = [step(block, block, images="$steps.crops.crops", **FIELDS[block]) for block in BLOCKS]
    names = ("predictions", "points", "answer", "reasoning", "grounding", "caption", "tracked_detections")
    there = {
        "detect": names[:1],
        "point": names[:2],
        "query": names[2:5],
        "caption": names[5:6],
        "track": (*names[6:], "new_instances", "already_seen_instances"),
    }
    outputs = [f"{block}.{name}" for block in BLOCKS for name in (*there[block], "error_status", "error_message")]
    definition = workflow(
        step("detect", "all", class_names=["dog", "red circle"]), crops, *inner, outputs=[*outputs, "crops.crops"]
    )
    return definition


@pytest.mark.parametrize("found", [True, False], ids=["crops", "no crops"])
def test_outputs_of_crops(on_crops: dict[str, Any], two_dogs: Scene, found: bool) -> None:
    image = np.ascontiguousarray(two_dogs.image[..., ::-1]) if found else NOTHING
    (written,) = run(on_crops, image, serialize=True)
    written.pop("crops.crops")  # times of images are no JSON, which is the engine's business
    check_json(written)
    assert {len(values) for values in written.values()} == {3 if found else 0}
    for block in BLOCKS:
        assert not any(written[f"{block}.error_status"])


@pytest.mark.parametrize("block", FINDERS)
@pytest.mark.parametrize("system", ["own", "parent"])
def test_boxes_on_a_crop(scene: Scene, bgr: np.ndarray, block: str, system: str) -> None:
    """They are in the whole image's pixels, or in the crop's and say where that is."""
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
    _, (written,) = both(definition, whole)
    prediction = written[FINDERS[block]]
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
