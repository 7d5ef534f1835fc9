"""Every workflow in `blocks/workflows` compiles as it is, and gives with the tiny model what a scene or a clip shows.

Each file has a test of its name here, which compares what it gives with the ground truth.
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

from moondream_cv.engine.local import LocalModel
from moondream_cv.scenes import Scene, SceneObject, render_clip, render_scene
from moondream_cv.scenes.clips import TrackedObject
from moondream_cv_blocks import ModelPool
from tests.helpers.roboflow_app import skip_without_server
from tests.helpers.workflows import NAMESPACE, as_bgr, compiled, in_video, results

skip_without_server()
pytestmark = pytest.mark.roboflow

FOLDER = Path(__file__).parents[2] / "blocks" / "workflows"
NAMES = sorted(path.stem for path in FOLDER.iterdir())
SAME_OBJECT = 0.7  # intersection over union from which a box is that of an object
NO_SERVER = "http://127.0.0.1:1"
ANNOTATED = 40  # pixels around an object that its box and its labels may cover

every_sample = pytest.mark.parametrize("name", NAMES)


class UnopenedPool(ModelPool):
    """Fails whoever asks for a model."""

    def get(self, name: str) -> Any:
        raise AssertionError(f"{name} was opened")


def read(name: str) -> dict[str, Any]:
    definition: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return definition


def run_sample(name: str, image: Any, model: str = "tiny", **parameters: Any) -> dict[str, Any]:
    """What a sample gives for one image."""
    (result,) = results(compiled(read(name)), image, model=model, **parameters)
    return result


def objects_of(detections: sv.Detections, objects: Sequence[SceneObject]) -> list[SceneObject]:
    """The object that each box encloses.

    Raises:
        AssertionError: A box encloses none, or two enclose the same.
    """
    truth = np.array(boxes_of(objects))
    overlaps = sv.box_iou_batch(detections.xyxy, truth)
    assert (overlaps.max(axis=1) > SAME_OBJECT).all(), overlaps
    nearest = overlaps.argmax(axis=1).tolist()
    assert len(set(nearest)) == len(nearest), nearest
    return [objects[index] for index in nearest]


def frame(rgb: np.ndarray, number: int, fps: float = 10) -> dict[str, Any]:
    """A frame of a video, counted from 0, as the engine takes it."""
    return in_video(as_bgr(rgb), number + 1, "clip", fps)


def area(item: SceneObject) -> float:
    left, top, right, bottom = item.xyxy
    return (right - left) * (bottom - top)


def named(objects: Sequence[SceneObject]) -> list[str]:
    return [item.name for item in objects]


def boxes_of(objects: Sequence[SceneObject]) -> list[tuple[float, float, float, float]]:
    return [item.xyxy for item in objects]


def around(xyxy: Sequence[float], margin: int, shape: tuple[int, ...]) -> np.ndarray:
    """[H, W] mask of a box and so many pixels around it."""
    left, top, right, bottom = (round(value) for value in xyxy)
    mask = np.zeros(shape[:2], bool)
    mask[max(0, top - margin) : bottom + margin, max(0, left - margin) : right + margin] = True
    return mask


def changed(picture: Any, image: np.ndarray) -> np.ndarray:
    """[H, W] mask of the pixels that a workflow has drawn on."""
    drawn = picture.numpy_image
    assert drawn.shape == image.shape
    mask: np.ndarray = (drawn != image).any(axis=2)
    return mask


def inside(point: dict[str, Any], xyxy: Sequence[float]) -> bool:
    left, top, right, bottom = xyxy
    return left <= point["x"] <= right and top <= point["y"] <= bottom


def steepness(image: np.ndarray, region: np.ndarray) -> float:
    """How much pixels differ from their neighbours on the left, on average within a region."""
    steps = np.abs(np.diff(image.astype(int), axis=1, prepend=image[:, :1].astype(int))).sum(axis=2)
    return float(steps[region].mean())


def followed(tracked: sv.Detections, objects: Sequence[TrackedObject]) -> list[tuple[int, int]]:
    """The number of each tracked box, and that of the object of its class which it overlaps most."""
    pairs = []
    for box, name, number in zip(tracked.xyxy, tracked["class_name"], tracked.tracker_id, strict=True):
        same_class = [item for item in objects if item.name == name]
        overlaps = sv.box_iou_batch(box[None], np.array(boxes_of(same_class)))[0]
        pairs.append((int(number), same_class[int(overlaps.argmax())].track_id))
    return pairs


class Crossings:
    """Counts objects that have got from one side of a horizontal line to the other with all of their box."""

    def __init__(self, line_y: float) -> None:
        self.up = self.down = 0
        self._line_y = line_y
        self._above: dict[int, bool] = {}  # by track id

    def add(self, objects: Sequence[TrackedObject]) -> None:
        """The objects of the next frame."""
        for item in objects:
            _, top, _, bottom = item.xyxy
            if top < self._line_y < bottom:
                continue
            above = bottom <= self._line_y
            before = self._above.get(item.track_id, above)
            self.up += above and not before
            self.down += before and not above
            self._above[item.track_id] = above


def check_drawn(picture: Any, image: np.ndarray, boxes: Sequence[Sequence[float]], margin: int = ANNOTATED) -> None:
    """Something is drawn on or around each of these boxes, and nothing elsewhere."""
    drawn = changed(picture, image)
    regions = [around(xyxy, margin, image.shape) for xyxy in boxes]
    assert all((drawn & region).any() for region in regions)
    assert not (drawn & ~np.any(regions, axis=0)).any()


def test_every_sample_is_tested() -> None:
    assert NAMES == ["blur_faces", "crop_and_ask", "detect_filter_visualize", "point_and_count", "track_count_line"]
    assert {path.suffix for path in FOLDER.iterdir()} == {".json"}
    assert {f"test_{name}" for name in NAMES} <= set(globals())


@every_sample
def test_compiles_without_a_model(name: str) -> None:
    compiled(read(name), **{f"{NAMESPACE}_blocks.models": UnopenedPool()})


@every_sample
def test_runs_with_nothing_but_an_image(name: str) -> None:
    """Parameters have values of their own, and the model is the real one."""
    image, *parameters = read(name)["inputs"]
    assert image == {"type": "WorkflowImage", "name": "image"}
    defaults = {item["name"]: item["default_value"] for item in parameters}
    assert defaults["model"] == "moondream2"
    assert defaults["class_names"]


@every_sample
def test_what_is_declared_is_used(name: str) -> None:
    definition = read(name)
    wiring = json.dumps([definition["steps"], definition["outputs"]])
    assert all(f'"$inputs.{item["name"]}"' in wiring for item in definition["inputs"])
    flow_control = [item for item in definition["steps"] if "next_steps" in item]
    assert all(f'"$steps.{item["name"]}.' in wiring for item in definition["steps"] if item not in flow_control)


@every_sample
def test_errors_of_our_steps_are_outputs(name: str) -> None:
    definition = read(name)
    selectors = {output["selector"] for output in definition["outputs"]}
    ours = [step["name"] for step in definition["steps"] if step["type"].startswith(f"{NAMESPACE}/")]
    assert {f"$steps.{step}.{error}" for step in ours for error in ("error_status", "error_message")} <= selectors


@every_sample
def test_outputs_serialize(name: str, bgr: np.ndarray) -> None:
    definition = read(name)
    (result,) = results(compiled(definition), bgr, serialize=True, model="tiny", class_names=["dog"])
    text = json.dumps(result, allow_nan=False, default=datetime.isoformat)  # the time that an image was taken at
    sent = json.loads(text)
    assert set(sent) == {output["name"] for output in definition["outputs"]}
    (found,) = sent["predictions"]["predictions"]
    assert found["class"] == "dog"
    picture = cv2.imdecode(np.frombuffer(base64.b64decode(sent["image"]["value"]), np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape == bgr.shape
    assert np.abs(picture.astype(int) - bgr).max() > 50  # what a file's compression does not do


@every_sample
@pytest.mark.parametrize(
    ("parameters", "failed"),
    [({"class_names": ["umbrella"]}, False), ({"class_names": ["dog"], "model": NO_SERVER}, True)],
    ids=["nothing found", "no server"],
)
def test_goes_on_with_nothing(name: str, bgr: np.ndarray, parameters: dict[str, Any], failed: bool) -> None:
    """The picture shows no detections, and the errors say why where there is a reason."""
    result = run_sample(name, bgr, **parameters)
    assert len(result["predictions"]) == 0
    assert result["error_status"] is failed
    assert (NO_SERVER in result["error_message"]) is failed
    if name == "blur_faces" and failed:  # a picture in which nobody has looked for faces is not given out
        assert result["image"] is None
    elif name != "track_count_line":  # it draws its line
        assert not changed(result["image"], bgr).any()


def test_detect_filter_visualize() -> None:
    """Of what is found, large things stay, and small ones are neither in the predictions nor in the picture."""
    scene = render_scene(1, resolution_wh=(480, 320), names=["dog", "red circle", "blue star", "bus"], style="plain")
    small, *large = scene.objects
    assert area(small) < 0.01 * 480 * 320 < min(map(area, large))
    image, names = as_bgr(scene.image), named(scene.objects)
    text = json.dumps(read("detect_filter_visualize"))
    assert text.count('"other": 0.001') == 1  # of the picture; smaller than what the tiny model can see in this one
    definition = json.loads(text.replace('"other": 0.001', '"other": 0.01'))

    (found,) = results(compiled(definition), image, model="tiny", class_names=names)
    assert set(objects_of(found["predictions"], scene.objects)) == set(large)
    assert named(objects_of(found["predictions"], scene.objects)) == found["predictions"]["class_name"].tolist()
    check_drawn(found["image"], image, boxes_of(large))

    confidences = found["predictions"].confidence
    threshold = float(np.median(confidences))
    (sure,) = results(compiled(definition), image, model="tiny", class_names=names, confidence=threshold)
    assert 0 < (confidences >= threshold).sum() < len(large)
    assert sure["predictions"].confidence.tolist() == confidences[confidences >= threshold].tolist()


def test_track_count_line() -> None:
    """Numbers stay with objects, and every object that crosses the line is counted in its direction."""
    clip = render_clip(0, num_frames=80, names=["dog", "bus", "dog", "cat", "red circle"], resolution_wh=(320, 240))
    line_y = 120
    engine, crossings = compiled(read("track_count_line")), Crossings(line_y)
    owners: dict[int, set[int]] = {}
    for number, (image, objects) in enumerate(clip):
        (result,) = results(
            engine,
            frame(image, number),
            model="tiny",
            class_names=list(clip.class_names),
            line=[[0, line_y], [320, line_y]],
            every=2,
        )
        assert result["error_status"] is False
        crossings.add(objects)
        for tracker_id, track_id in followed(result["predictions"], objects):
            owners.setdefault(tracker_id, set()).add(track_id)
    assert (crossings.up, crossings.down) == (1, 2)
    assert (result["count_in"], result["count_out"]) == (crossings.up, crossings.down)
    assert sorted(map(sorted, owners.values())) == [[number] for number in range(1, 6)]
    check_drawn(result["image"], as_bgr(image), [*boxes_of(objects), (0, line_y, 320, line_y)])


def test_crop_and_ask() -> None:
    """Each crop is asked for the colour of what was detected there."""
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


def test_crop_and_ask_fills_in_the_class(tiny: LocalModel, scene: Scene, bgr: np.ndarray) -> None:
    """Each crop gets the question with its own class in it: the model answers the same when asked directly."""
    result = run_sample("crop_and_ask", bgr, class_names=["dog", "bus"], question="Is there a {thing} in the picture?")
    found = result["predictions"]
    assert found["class_name"].tolist() == ["dog", "bus"]
    corners = found.xyxy.round().astype(int).tolist()
    crops = [Image.fromarray(scene.image[top:bottom, left:right]) for left, top, right, bottom in corners]
    direct = [
        tiny.query(crop, f"Is there a {name} in the picture?")["answer"]
        for crop, name in zip(crops, ["dog", "bus"], strict=True)
    ]
    assert result["answers"] == direct


def test_point_and_count() -> None:
    """A point on each object, and how many there are, together and of each class."""
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
    """The pixels of what is looked for become smooth, and no others change."""
    dog = scene.named("dog")[0]
    result = run_sample("blur_faces", bgr, class_names=["dog"])
    assert objects_of(result["predictions"], scene.objects) == [dog]
    check_drawn(result["image"], bgr, [dog.xyxy], margin=10)
    region = around(dog.xyxy, -5, bgr.shape)
    assert changed(result["image"], bgr)[region].mean() > 0.95
    assert steepness(result["image"].numpy_image, region) < 0.2 * steepness(bgr, region)


def test_blur_faces_blurs_all_that_are_named(scene: Scene, bgr: np.ndarray) -> None:
    dog, bus = (scene.named(name)[0] for name in ("dog", "bus"))
    result = run_sample("blur_faces", bgr, class_names="dog, bus")
    check_drawn(result["image"], bgr, boxes_of([dog, bus]), margin=10)
