"""`moondream_cv/track@v1` behind blocks that cut frames: a part at a fixed place of a frame is a source of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import supervision as sv

from moondream_cv.engine.local import LocalModel
from moondream_cv.scenes import render_clip
from moondream_cv.scenes.clips import Clip
from tests.helpers.roboflow_app import skip_without_server
from tests.helpers.workflows import (
    Looks,
    bgr_frames,
    engine_of,
    in_video,
    results,
    step,
    workflow,
)

skip_without_server()
pytestmark = pytest.mark.roboflow

NAMES = ["dog", "red circle"]
EVERY = 5
CROP = {"type": "roboflow_core/absolute_static_crop@v1", "name": "part", "images": "$inputs.image"}
STATIC = {**CROP, "x_center": 140, "y_center": 100, "width": 200, "height": 160}
SLICES = {  # left and right half
    "type": "roboflow_core/image_slicer@v2",
    "name": "part",
    "image": "$inputs.image",
    "slice_width": 160,
    "slice_height": 240,
    "overlap_ratio_width": 0.0,
    "overlap_ratio_height": 0.0,
}
PARTS = {"static crop": (STATIC, "crops", 1), "slices": (SLICES, "slices", 2)}
SEEDS = {"static crop": (2, 3), "slices": (6, 6)}  # clips in which each object stays within one of those parts
FORMS: dict[str, Callable[[np.ndarray, int], Any]] = {"video": in_video, "arrays": lambda bgr, number: bgr}
TRACKED = ("tracked_detections", "new_instances", "already_seen_instances")

Row = dict[str, Any]
Frame = list[dict[str, list[Row]]]  # of each part, what is in each output


def track_parts(part: str, model: Looks) -> Any:
    """An engine that tracks in each part of a frame."""
    cut, output, _ = PARTS[part]
    tracking = step("track", images=f"$steps.part.{output}", class_names=NAMES, every=EVERY)
    wanted = [f"step.{name}" for name in (*TRACKED, "error_message")]
    return engine_of(workflow(cut, tracking, outputs=wanted), model)


def tracked(engine: Any, *images: Any) -> list[Frame]:
    """What is serialised of each image: boxes in coordinates of the whole."""
    found = []
    for result in results(engine, list(images), serialize=True):
        values = {name: result[f"step.{name}"] for name in (*TRACKED, "error_message")}
        if isinstance(values["error_message"], str):  # there is one part, and no list of them
            values = {name: [value] for name, value in values.items()}
        assert set(values["error_message"]) == {""}
        rows = [
            {name: values[name][at]["predictions"] for name in TRACKED} for at in range(len(values["error_message"]))
        ]
        found.append(rows)
    return found


def numbers(rows: list[Row]) -> list[int]:
    return [row["tracker_id"] for row in rows]


def corners(row: Row) -> np.ndarray:
    x, y, width, height = (row[key] for key in ("x", "y", "width", "height"))
    return np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2])


def clips_of(part: str) -> list[Clip]:
    return [render_clip(seed, num_frames=18, names=NAMES, resolution_wh=(320, 240)) for seed in SEEDS[part]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", PARTS)
def test_parts_of_frames_are_looked_at_when_they_are_due(part: str, form: str, looks: Looks) -> None:
    engine, looked = track_parts(part, looks), []
    for number, bgr in enumerate(bgr_frames(clips_of(part)[0]), 1):
        before = len(looks.asked)
        tracked(engine, FORMS[form](bgr, number))
        looked.append(len(looks.asked) - before)
    assert looked == [index % EVERY == 0 for index in range(len(looked))]
    assert set(looks.asked) == {PARTS[part][2] * len(NAMES)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", PARTS)
def test_things_in_parts_of_frames_keep_their_numbers(part: str, form: str, looks: Looks) -> None:
    """And lie where they are in the whole frame."""
    engine, clip = track_parts(part, looks), clips_of(part)[0]
    owners: set[tuple[int, int, str]] = set()
    new: list[tuple[int, int]] = []
    for number, (bgr, (_, truth)) in enumerate(zip(bgr_frames(clip), clip, strict=True), 1):
        (frame,) = tracked(engine, FORMS[form](bgr, number))
        there = {item.name: np.array([item.xyxy]) for item in truth}
        assert len(frame) == PARTS[part][2]
        for at, outputs in enumerate(frame):
            assert sorted(numbers(outputs["tracked_detections"])) == sorted(
                numbers(outputs["new_instances"]) + numbers(outputs["already_seen_instances"])
            )
            new += [(at, one) for one in numbers(outputs["new_instances"])]
            for row in outputs["tracked_detections"]:
                overlap = sv.box_iou_batch(corners(row)[None], there[row["class"]])[0, 0]
                assert overlap > 0.5, (number, row, there)
                owners.add((at, row["tracker_id"], row["class"]))
    assert len(owners) == len(new) == len(set(new)) == len(NAMES)
    assert {name for _, _, name in owners} == set(NAMES)


@pytest.mark.parametrize("together", [True, False], ids=["in one batch", "in turn"])
def test_the_same_crop_of_two_cameras(together: bool, looks: Looks, tiny: LocalModel) -> None:
    clips = dict(zip(("left", "right"), clips_of("static crop"), strict=True))
    alone = {}
    for name, clip in clips.items():
        engine = track_parts("static crop", Looks(tiny))
        alone[name] = [tracked(engine, in_video(bgr, n, name))[0] for n, bgr in enumerate(bgr_frames(clip), 1)]
    engine = track_parts("static crop", looks)
    for index, pair in enumerate(zip(*map(bgr_frames, clips.values()), strict=True)):
        frames = [in_video(bgr, index + 1, name) for bgr, name in zip(pair, clips, strict=True)]
        found = tracked(engine, *frames) if together else [tracked(engine, frame)[0] for frame in frames]
        for name, frame in zip(clips, found, strict=True):
            check_same(frame, alone[name][index])
    due = len(range(0, len(clips["left"]), EVERY))
    assert sum(looks.asked) == due * len(clips) * len(NAMES)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("form", FORMS)
def test_parts_of_images_of_one_batch_are_apart(part: str, form: str, looks: Looks, tiny: LocalModel) -> None:
    """Also where nothing says that they are of different sources; the second image is the first from behind."""
    frames = bgr_frames(clips_of(part)[0])
    sources = [frames, frames[::-1]]
    alone = [track_parts(part, Looks(tiny)) for _ in sources]
    engine = track_parts(part, looks)
    for number, pair in enumerate(zip(*sources, strict=True), 1):
        images = [in_video(bgr, number, f"camera {at}") if form == "video" else bgr for at, bgr in enumerate(pair)]
        expected = [tracked(one, image)[0] for one, image in zip(alone, images, strict=True)]
        for here, there in zip(tracked(engine, *images), expected, strict=True):
            check_same(here, there)
    assert len(looks.asked) == len(range(0, len(frames), EVERY))


def check_same(here: Frame, there: Frame) -> None:
    """Numbers agree, and boxes but for what computing images together with others makes of them."""
    for one, other in zip(here, there, strict=True):
        for name in TRACKED:
            assert numbers(one[name]) == numbers(other[name])
            for row, expected in zip(one[name], other[name], strict=True):
                np.testing.assert_allclose(corners(row), corners(expected), atol=1)
