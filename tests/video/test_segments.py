"""Tracks end at scene cuts and at changes of the frame size. Run with `pytest tests/video/test_segments.py`."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest

from moondream_cv.video import Tracking, track_streams
from moondream_cv.video.sources.frame import Frame
from tests.helpers.clips import MovingObject, ScriptedDetector, frame_number, numbered_image, write_clip
from tests.helpers.streams import CLASSES, SIZE, WALKERS, Camera, check_contract, check_frames, track_ids_of


def corner(image: np.ndarray) -> int:
    """Return the number that `two_scenes` draws into a corner."""
    return frame_number(image[:24, :128])


def two_scenes() -> list[np.ndarray]:
    """Return 23 frames of one scene and 25 of another one."""
    frames = []
    for number in range(48):
        coarse = np.random.default_rng(number >= 23).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        frames.append(cv2.resize(coarse, SIZE, interpolation=cv2.INTER_CUBIC))
        frames[-1][:24, :128] = numbered_image(number, (128, 48))[:24]
    return frames


@pytest.mark.parametrize("scene_change", [True, False])
def test_scene_cut_ends_tracks_if_enabled(scene_change: bool, tmp_path: Path) -> None:
    item = MovingObject("dog", (160, 100))
    path = write_clip(tmp_path / "cut.mp4", two_scenes())
    detector = ScriptedDetector(item, read_number=corner)
    found = list(track_streams([path], CLASSES, model=detector, every=10, tracking=Tracking(scene_change=scene_change)))
    check_frames(found, range(48), corner)
    ids = track_ids_of(item, found, read_number=corner)
    if scene_change:
        assert ids == [1] * 23 + [2] * 25
        assert detector.keyframes == [0, 10, 20, 22, 23, 33, 43, 47]
    else:
        assert ids == [1] * 48
        assert detector.keyframes == [0, 10, 20, 30, 40, 47]


def test_tracks_are_not_interpolated_across_a_scene_cut() -> None:
    before, after = (
        MovingObject("dog", (100, 100), frames=range(23)),
        MovingObject("dog", (110, 100), frames=range(23, 48)),
    )
    detector = ScriptedDetector(before, after, read_number=corner)
    found = list(track_streams([two_scenes()], CLASSES, model=detector, every=15, tracking=Tracking(scene_change=True)))
    assert track_ids_of(before, found, read_number=corner) == [1] * 23 + [None] * 25
    assert track_ids_of(after, found, read_number=corner) == [None] * 23 + [2] * 25


def test_change_of_frame_size_ends_tracks(images: list[np.ndarray]) -> None:
    item = MovingObject("dog", (100, 60))
    mixed = [*images[:12], *(numbered_image(n, (256, 128)) for n in range(12, 20)), *images[20:33]]
    detector = ScriptedDetector(item)
    found = list(track_streams([mixed], CLASSES, model=detector, every=5))
    assert [frame_number(t.frame.image) for t in found] == list(range(33))
    assert [t.frame.image.shape[1] for t in found] == [320] * 12 + [256] * 8 + [320] * 13
    for tracked in found:
        check_contract(tracked.detections, (tracked.frame.image.shape[1], tracked.frame.image.shape[0]))
    assert track_ids_of(item, found) == [1] * 12 + [2] * 8 + [3] * 13
    assert detector.keyframes == [0, 5, 10, 11, 12, 17, 19, 20, 25, 30, 32]


def test_frames_with_equal_times_are_all_yielded(images: list[np.ndarray]) -> None:
    frames = [Frame(image, 0, float(i // 10)) for i, image in enumerate(images[:40])]
    found = list(track_streams([frames], CLASSES, model=ScriptedDetector(*WALKERS), every=3))
    assert [frame_number(t.frame.image) for t in found] == list(range(40))
    for tracked in found:
        check_contract(tracked.detections)


def test_live_source_may_change_its_frame_size(images: list[np.ndarray]) -> None:
    small = [numbered_image(n, (256, 128)) for n in range(10, 20)]
    camera = Camera([*images[:10], *small], rate=60)
    with track_streams(
        [camera.open()], CLASSES, model=ScriptedDetector(MovingObject("dog", (100, 60))), every=1
    ) as stream:
        found = list(islice(stream, 30))
    for tracked in found:
        height, width = tracked.frame.image.shape[:2]
        check_contract(tracked.detections, (width, height))
        assert len(tracked.detections) == 1


def test_scene_cuts_of_a_live_source_do_not_grow_the_backlog() -> None:
    scenes = two_scenes()
    camera, detector = Camera([scenes[10], scenes[40]]), ScriptedDetector(seconds=0.6, read_number=corner)
    with track_streams([camera.open()], CLASSES, model=detector, tracking=Tracking(scene_change=True)) as stream:
        for _ in islice(stream, 20):
            pass
        assert stream.keyframe_detector.backlog <= 2
