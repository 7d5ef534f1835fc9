"""Test that every workflow in `blocks/workflows` compiles and returns the ground truth with the tiny model.

Each file has a test of the same name.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import supervision as sv
from PIL import Image

from moondream_cv.engine.local_model import LocalModel
from moondream_cv.scenes import Scene, SceneObject, render_clip, render_scene
from moondream_cv.scenes.clips import TrackedObject
from moondream_cv_blocks import ModelPool
from tests.helpers.roboflow_app import skip_without_server
from tests.helpers.workflows import NAMESPACE, as_bgr, compile_workflow, run_engine, video_frame

skip_without_server()
pytestmark = pytest.mark.roboflow

FOLDER = Path(__file__).parents[2] / "blocks" / "workflows"
NAMES = sorted(path.stem for path in FOLDER.iterdir())
MIN_IOU = 0.7  # minimum IoU of a detection and an object
NO_SERVER = "http://127.0.0.1:1"
LABEL_MARGIN = 40  # pixels around an object that its box and label can cover

every_sample = pytest.mark.parametrize("name", NAMES)


class UnopenedPool(ModelPool):
    """A pool that fails if a model is opened."""

    def get(self, name: str) -> Any:
        raise AssertionError(f"{name} was opened")


def read(name: str) -> dict[str, Any]:
    definition: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return definition


def run_sample(name: str, image: Any, model: str = "tiny", **parameters: Any) -> dict[str, Any]:
    """Return the outputs of a sample for one image."""
    (result,) = run_engine(compile_workflow(read(name)), image, model=model, **parameters)
    return result


def objects_of(detections: sv.Detections, objects: Sequence[SceneObject]) -> list[SceneObject]:
    """Return the object of each detection.

    Raises:
        AssertionError: A detection has no object, or two detections have the same.
    """
    truth = np.array(boxes_of(objects))
    overlaps = sv.box_iou_batch(detections.xyxy, truth)
    assert (overlaps.max(axis=1) > MIN_IOU).all(), overlaps
    nearest = overlaps.argmax(axis=1).tolist()
    assert len(set(nearest)) == len(nearest), nearest
    return [objects[index] for index in nearest]


def frame(rgb: np.ndarray, number: int, fps: float = 10) -> dict[str, Any]:
    """Return a video frame, with a 0-based number, as the engine accepts it."""
    return video_frame(as_bgr(rgb), number + 1, "clip", fps)


def area(item: SceneObject) -> float:
    left, top, right, bottom = item.xyxy
    return (right - left) * (bottom - top)


def named(objects: Sequence[SceneObject]) -> list[str]:
    return [item.name for item in objects]


def boxes_of(objects: Sequence[SceneObject]) -> list[tuple[float, float, float, float]]:
    return [item.xyxy for item in objects]


def around(xyxy: Sequence[float], margin: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return a mask of a box with a margin, [H, W] bool."""
    left, top, right, bottom = (round(value) for value in xyxy)
    mask = np.zeros(shape[:2], bool)
    mask[max(0, top - margin) : bottom + margin, max(0, left - margin) : right + margin] = True
    return mask


def changed(output: Any, image: np.ndarray) -> np.ndarray:
    """Return a mask of the pixels that a workflow has changed, [H, W] bool."""
    drawn = output.numpy_image
    assert drawn.shape == image.shape
    mask: np.ndarray = (drawn != image).any(axis=2)
    return mask


def inside(point: dict[str, Any], xyxy: Sequence[float]) -> bool:
    left, top, right, bottom = xyxy
    return left <= point["x"] <= right and top <= point["y"] <= bottom


def mean_gradient(image: np.ndarray, region: np.ndarray) -> float:
    """Return the mean difference of horizontally adjacent pixels within a region."""
    steps = np.abs(np.diff(image.astype(int), axis=1, prepend=image[:, :1].astype(int))).sum(axis=2)
    return float(steps[region].mean())


def matched_ids(tracked: sv.Detections, objects: Sequence[TrackedObject]) -> list[tuple[int, int]]:
    """Return the track ID of each detection, and the true ID of the object of its class with the highest IoU."""
    pairs = []
    for box, name, number in zip(tracked.xyxy, tracked["class_name"], tracked.tracker_id, strict=True):
        same_class = [item for item in objects if item.name == name]
        overlaps = sv.box_iou_batch(box[None], np.array(boxes_of(same_class)))[0]
        pairs.append((int(number), same_class[int(overlaps.argmax())].track_id))
    return pairs


class Crossings:
    """Count objects whose whole box moves from one side of a horizontal line to the other."""

    def __init__(self, line_y: float) -> None:
        self.up = self.down = 0
        self._line_y = line_y
        self._above: dict[int, bool] = {}  # by track id

    def add(self, objects: Sequence[TrackedObject]) -> None:
        """Add the objects of the next frame."""
        for item in objects:
            _, top, _, bottom = item.xyxy
            if top < self._line_y < bottom:
                continue
            above = bottom <= self._line_y
            before = self._above.get(item.track_id, above)
            self.up += above and not before
            self.down += before and not above
            self._above[item.track_id] = above


def check_drawn(output: Any, image: np.ndarray, boxes: Sequence[Sequence[float]], margin: int = LABEL_MARGIN) -> None:
    """Assert that pixels change within a margin of each box, and nowhere else."""
    drawn = changed(output, image)
    regions = [around(xyxy, margin, image.shape) for xyxy in boxes]
    assert all((drawn & region).any() for region in regions)
    assert not (drawn & ~np.any(regions, axis=0)).any()


def test_every_sample_is_tested() -> None:
    assert NAMES == ["blur_faces", "crop_and_ask", "detect_filter_visualize", "point_and_count", "track_count_line"]
    assert {path.suffix for path in FOLDER.iterdir()} == {".json"}
    assert {f"test_{name}" for name in NAMES} <= set(globals())


@every_sample
def test_sample_compiles_without_opening_a_model(name: str) -> None:
    compile_workflow(read(name), **{f"{NAMESPACE}_blocks.models": UnopenedPool()})


@every_sample
def test_sample_has_defaults_for_all_parameters(name: str) -> None:
    """The default model is Moondream 2."""
    image, *parameters = read(name)["inputs"]
    assert image == {"type": "WorkflowImage", "name": "image"}
    defaults = {item["name"]: item["default_value"] for item in parameters}
    assert defaults["model"] == "moondream2"
    assert defaults["class_names"]


@every_sample
def test_sample_uses_all_inputs_and_steps(name: str) -> None:
    definition = read(name)
    wiring = json.dumps([definition["steps"], definition["outputs"]])
    assert all(f'"$inputs.{item["name"]}"' in wiring for item in definition["inputs"])
    flow_control = [item for item in definition["steps"] if "next_steps" in item]
    assert all(f'"$steps.{item["name"]}.' in wiring for item in definition["steps"] if item not in flow_control)


@every_sample
def test_sample_outputs_the_errors_of_all_moondream_steps(name: str) -> None:
    definition = read(name)
    selectors = {output["selector"] for output in definition["outputs"]}
    ours = [step["name"] for step in definition["steps"] if step["type"].startswith(f"{NAMESPACE}/")]
    assert {f"$steps.{step}.{error}" for step in ours for error in ("error_status", "error_message")} <= selectors


@every_sample
def test_sample_outputs_are_json_serializable(name: str, bgr: np.ndarray) -> None:
    definition = read(name)
    (result,) = run_engine(compile_workflow(definition), bgr, serialize=True, model="tiny", class_names=["dog"])
    text = json.dumps(result, allow_nan=False, default=datetime.isoformat)  # outputs contain the time of the image
    sent = json.loads(text)
    assert set(sent) == {output["name"] for output in definition["outputs"]}
    (found,) = sent["predictions"]["predictions"]
    assert found["class"] == "dog"
    decoded = cv2.imdecode(np.frombuffer(base64.b64decode(sent["image"]["value"]), np.uint8), cv2.IMREAD_COLOR)
    assert decoded.shape == bgr.shape
    assert np.abs(decoded.astype(int) - bgr).max() > 50  # more than compression artifacts


@every_sample
@pytest.mark.parametrize(
    ("parameters", "failed"),
    [({"class_names": ["umbrella"]}, False), ({"class_names": ["dog"], "model": NO_SERVER}, True)],
    ids=["nothing found", "no server"],
)
def test_sample_continues_without_detections(
    name: str, bgr: np.ndarray, parameters: dict[str, Any], failed: bool
) -> None:
    """The output image is unchanged, and the error outputs give the reason of a failure."""
    result = run_sample(name, bgr, **parameters)
    assert len(result["predictions"]) == 0
    assert result["error_status"] is failed
    assert (NO_SERVER in result["error_message"]) is failed
    if name == "blur_faces" and failed:  # no image is returned if detection failed
        assert result["image"] is None
    elif name != "track_count_line":  # the line is always drawn
        assert not changed(result["image"], bgr).any()


def test_detect_filter_visualize() -> None:
    """Small detections are removed from the predictions and from the image."""
    scene = render_scene(1, resolution_wh=(480, 320), names=["dog", "red circle", "blue star", "bus"], style="plain")
    small, *large = scene.objects
    assert area(small) < 0.01 * 480 * 320 < min(map(area, large))
    image, names = as_bgr(scene.image), named(scene.objects)
    text = json.dumps(read("detect_filter_visualize"))
    assert text.count('"other": 0.001') == 1  # share of the image; too small for the tiny model
    definition = json.loads(text.replace('"other": 0.001', '"other": 0.01'))

    (found,) = run_engine(compile_workflow(definition), image, model="tiny", class_names=names)
    assert set(objects_of(found["predictions"], scene.objects)) == set(large)
    assert named(objects_of(found["predictions"], scene.objects)) == found["predictions"]["class_name"].tolist()
    check_drawn(found["image"], image, boxes_of(large))

    confidences = found["predictions"].confidence
    threshold = float(np.median(confidences))
    (sure,) = run_engine(compile_workflow(definition), image, model="tiny", class_names=names, confidence=threshold)
    assert 0 < (confidences >= threshold).sum() < len(large)
    assert sure["predictions"].confidence.tolist() == confidences[confidences >= threshold].tolist()


def test_track_count_line() -> None:
    """Objects keep their track IDs, and each object that crosses the line is counted in its direction."""
    clip = render_clip(0, num_frames=80, names=["dog", "bus", "dog", "cat", "red circle"], resolution_wh=(320, 240))
    line_y = 120
    engine, crossings = compile_workflow(read("track_count_line")), Crossings(line_y)
    owners: dict[int, set[int]] = {}
    for number, (image, objects) in enumerate(clip):
        (result,) = run_engine(
            engine,
            frame(image, number),
            model="tiny",
            class_names=list(clip.class_names),
            line=[[0, line_y], [320, line_y]],
            every=2,
        )
        assert result["error_status"] is False
        crossings.add(objects)
        for tracker_id, track_id in matched_ids(result["predictions"], objects):
            owners.setdefault(tracker_id, set()).add(track_id)
    assert (crossings.up, crossings.down) == (1, 2)
    assert (result["count_in"], result["count_out"]) == (crossings.up, crossings.down)
    assert sorted(map(sorted, owners.values())) == [[number] for number in range(1, 6)]
    check_drawn(result["image"], as_bgr(image), [*boxes_of(objects), (0, line_y, 320, line_y)])


def test_crop_and_ask() -> None:
    """Each crop is queried for the color of its object."""
    names = ["red circle", "blue star", "yellow heart", "dog"]
    scene = render_scene(5, resolution_wh=(320, 240), names=names, style="plain")
    shapes = scene.objects[:3]
    image = as_bgr(scene.image)
    result = run_sample("crop_and_ask", image, class_names=[item.shape for item in shapes])
    assert objects_of(result["predictions"], scene.objects) == list(shapes)
    assert result["predictions"]["class_name"].tolist() == ["circle", "star", "heart"]
    assert result["answers"] == ["red", "blue", "yellow"]
    assert result["renamed_predictions"]["class_name"].tolist() == ["red", "blue", "yellow"]
    assert np.array_equal(result["renamed_predictions"].xyxy, result["predictions"].xyxy)
    assert result["ask_error_status"] == [False] * 3
    check_drawn(result["image"], image, boxes_of(shapes))


def test_crop_and_ask_inserts_the_class_of_each_crop(tiny: LocalModel, scene: Scene, bgr: np.ndarray) -> None:
    """The answers match those of direct queries with the class of each crop."""
    result = run_sample("crop_and_ask", bgr, class_names=["dog", "bus"], question="Is there a {object} in the image?")
    found = result["predictions"]
    assert found["class_name"].tolist() == ["dog", "bus"]
    corners = found.xyxy.round().astype(int).tolist()
    crops = [Image.fromarray(scene.image[top:bottom, left:right]) for left, top, right, bottom in corners]
    direct = [
        tiny.query(crop, f"Is there a {name} in the image?")["answer"]
        for crop, name in zip(crops, ["dog", "bus"], strict=True)
    ]
    assert result["answers"] == direct


def test_point_and_count() -> None:
    """Each object has one point, and the counts are correct in total and per class."""
    names = ["dog", "dog", "red circle", "dog", "cat"]
    scene = render_scene(5, resolution_wh=(640, 480), names=names, style="plain")
    image = as_bgr(scene.image)
    result = run_sample("point_and_count", image, class_names=["dog", "cat"])
    assert result["count"] == 4
    assert result["count_by_class"] == {"dog": 3, "cat": 1}
    pointed = [item for item in scene.objects if item.name != "red circle"]
    hits = [[inside(point, item.xyxy) for item in pointed] for point in result["points"]]
    assert np.array_equal(np.sum(hits, axis=0), np.ones(4)), hits
    assert np.array_equal(np.sum(hits, axis=1), np.ones(4)), hits
    check_drawn(result["image"], image, boxes_of(pointed))


def test_blur_faces(scene: Scene, bgr: np.ndarray) -> None:
    """Pixels of the detected objects are blurred, and no others change."""
    dog = scene.named("dog")[0]
    result = run_sample("blur_faces", bgr, class_names=["dog"])
    assert objects_of(result["predictions"], scene.objects) == [dog]
    check_drawn(result["image"], bgr, [dog.xyxy], margin=10)
    region = around(dog.xyxy, -5, bgr.shape)
    assert changed(result["image"], bgr)[region].mean() > 0.95
    assert mean_gradient(result["image"].numpy_image, region) < 0.2 * mean_gradient(bgr, region)


def test_blur_faces_blurs_all_classes(scene: Scene, bgr: np.ndarray) -> None:
    dog, bus = (scene.named(name)[0] for name in ("dog", "bus"))
    result = run_sample("blur_faces", bgr, class_names="dog, bus")
    check_drawn(result["image"], bgr, boxes_of([dog, bus]), margin=10)
