"""Test `moondream_cv/track@v1` on crops: a crop at a fixed position of the frame is a separate video source."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import supervision as sv

from moondream_cv.engine.local_model import LocalModel
from moondream_cv.scenes import render_clip
from moondream_cv.scenes.clips import Clip
from tests.helpers.roboflow_app import skip_without_server
from tests.helpers.workflows import (
    CountingModel,
    bgr_frames,
    make_engine,
    run_engine,
    step,
    video_frame,
    workflow,
)

skip_without_server()
pytestmark = pytest.mark.roboflow

NAMES = ["dog", "red circle"]
EVERY = 5
CROP = {"type": "roboflow_core/absolute_static_crop@v1", "name": "crop", "images": "$inputs.image"}
STATIC = {**CROP, "x_center": 140, "y_center": 100, "width": 200, "height": 160}
SLICES = {  # left and right half
    "type": "roboflow_core/image_slicer@v2",
    "name": "crop",
    "image": "$inputs.image",
    "slice_width": 160,
    "slice_height": 240,
    "overlap_ratio_width": 0.0,
    "overlap_ratio_height": 0.0,
}
CROPS = {"static crop": (STATIC, "crops", 1), "slices": (SLICES, "slices", 2)}
SEEDS = {"static crop": (2, 3), "slices": (6, 6)}  # clips in which each object stays within one crop
FORMS: dict[str, Callable[[np.ndarray, int], Any]] = {"video": video_frame, "arrays": lambda bgr, number: bgr}
TRACKED = ("tracked_detections", "new_instances", "already_seen_instances")

Box = dict[str, Any]
Frame = list[dict[str, list[Box]]]  # for each crop, the detections of each output


def track_crops(crop: str, model: CountingModel) -> Any:
    """Compile a workflow that tracks in each crop of a frame."""
    cut, output, _ = CROPS[crop]
    tracking = step("track", images=f"$steps.crop.{output}", class_names=NAMES, every=EVERY)
    wanted = [f"step.{name}" for name in (*TRACKED, "error_message")]
    return make_engine(workflow(cut, tracking, outputs=wanted), model)


def tracked(engine: Any, *images: Any) -> list[Frame]:
    """Return the serialized tracks of each image, in coordinates of the whole image."""
    found = []
    for result in run_engine(engine, list(images), serialize=True):
        values = {name: result[f"step.{name}"] for name in (*TRACKED, "error_message")}
        if isinstance(values["error_message"], str):  # a single crop is not in a list
            values = {name: [value] for name, value in values.items()}
        assert set(values["error_message"]) == {""}
        crops = range(len(values["error_message"]))
        found.append([{name: values[name][at]["predictions"] for name in TRACKED} for at in crops])
    return found


def track_ids(boxes: list[Box]) -> list[int]:
    return [box["tracker_id"] for box in boxes]


def corners(box: Box) -> np.ndarray:
    x, y, width, height = (box[key] for key in ("x", "y", "width", "height"))
    return np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2])


def clips_of(crop: str) -> list[Clip]:
    return [render_clip(seed, num_frames=18, names=NAMES, resolution_wh=(320, 240)) for seed in SEEDS[crop]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("crop", CROPS)
def test_model_runs_on_keyframes_of_crops(crop: str, form: str, counting_model: CountingModel) -> None:
    engine, keyframes = track_crops(crop, counting_model), []
    for number, bgr in enumerate(bgr_frames(clips_of(crop)[0]), 1):
        before = len(counting_model.call_sizes)
        tracked(engine, FORMS[form](bgr, number))
        keyframes.append(len(counting_model.call_sizes) - before)
    assert keyframes == [index % EVERY == 0 for index in range(len(keyframes))]
    assert set(counting_model.call_sizes) == {CROPS[crop][2] * len(NAMES)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("crop", CROPS)
def test_track_ids_stay_with_objects_in_crops(crop: str, form: str, counting_model: CountingModel) -> None:
    """The boxes have the position of the objects in the whole frame."""
    engine, clip = track_crops(crop, counting_model), clips_of(crop)[0]
    owners: set[tuple[int, int, str]] = set()
    new: list[tuple[int, int]] = []
    for number, (bgr, (_, truth)) in enumerate(zip(bgr_frames(clip), clip, strict=True), 1):
        (frame,) = tracked(engine, FORMS[form](bgr, number))
        true_boxes = {item.name: np.array([item.xyxy]) for item in truth}
        assert len(frame) == CROPS[crop][2]
        for at, outputs in enumerate(frame):
            assert sorted(track_ids(outputs["tracked_detections"])) == sorted(
                track_ids(outputs["new_instances"]) + track_ids(outputs["already_seen_instances"])
            )
            new += [(at, one) for one in track_ids(outputs["new_instances"])]
            for box in outputs["tracked_detections"]:
                overlap = sv.box_iou_batch(corners(box)[None], true_boxes[box["class"]])[0, 0]
                assert overlap > 0.5, (number, box, true_boxes)
                owners.add((at, box["tracker_id"], box["class"]))
    assert len(owners) == len(new) == len(set(new)) == len(NAMES)
    assert {name for _, _, name in owners} == set(NAMES)


@pytest.mark.parametrize("together", [True, False], ids=["in one batch", "in turn"])
def test_crops_of_two_cameras_are_separate_sources(
    together: bool, counting_model: CountingModel, tiny: LocalModel
) -> None:
    clips = dict(zip(("left", "right"), clips_of("static crop"), strict=True))
    alone = {}
    for name, clip in clips.items():
        engine = track_crops("static crop", CountingModel(tiny))
        alone[name] = [tracked(engine, video_frame(bgr, n, name))[0] for n, bgr in enumerate(bgr_frames(clip), 1)]
    engine = track_crops("static crop", counting_model)
    for index, pair in enumerate(zip(*map(bgr_frames, clips.values()), strict=True)):
        frames = [video_frame(bgr, index + 1, name) for bgr, name in zip(pair, clips, strict=True)]
        found = tracked(engine, *frames) if together else [tracked(engine, frame)[0] for frame in frames]
        for name, frame in zip(clips, found, strict=True):
            assert_same_tracks(frame, alone[name][index])
    due = len(range(0, len(clips["left"]), EVERY))
    assert sum(counting_model.call_sizes) == due * len(clips) * len(NAMES)


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("form", FORMS)
def test_crops_of_the_images_of_a_batch_are_separate_sources(
    crop: str, form: str, counting_model: CountingModel, tiny: LocalModel
) -> None:
    """This includes images without metadata. The second source is the first one backwards."""
    frames = bgr_frames(clips_of(crop)[0])
    sources = [frames, frames[::-1]]
    alone = [track_crops(crop, CountingModel(tiny)) for _ in sources]
    engine = track_crops(crop, counting_model)
    for number, pair in enumerate(zip(*sources, strict=True), 1):
        images = [video_frame(bgr, number, f"camera {at}") if form == "video" else bgr for at, bgr in enumerate(pair)]
        expected = [tracked(one, image)[0] for one, image in zip(alone, images, strict=True)]
        for here, there in zip(tracked(engine, *images), expected, strict=True):
            assert_same_tracks(here, there)
    assert len(counting_model.call_sizes) == len(range(0, len(frames), EVERY))


def assert_same_tracks(here: Frame, there: Frame) -> None:
    """Assert equal track IDs, and boxes that differ by the rounding of another batch size only."""
    for one, other in zip(here, there, strict=True):
        for name in TRACKED:
            assert track_ids(one[name]) == track_ids(other[name])
            for box, expected in zip(one[name], other[name], strict=True):
                np.testing.assert_allclose(corners(box), corners(expected), atol=1)
