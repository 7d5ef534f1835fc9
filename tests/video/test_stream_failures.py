"""Detectors and sources that fail. Run with `pytest tests/video/test_stream_failures.py`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import supervision as sv

from moondream_cv.errors import VideoError
from moondream_cv.video import TrackedFrame, track_streams
from tests.helpers.clips import ScriptedDetector, frame_number
from tests.helpers.streams import (
    CLASSES,
    WALKERS,
    Camera,
    broken,
    by_source,
    check_frames,
    stream_threads,
    track_ids_of,
)
from tests.helpers.waiting import until


def test_detector_errors_are_logged_and_tracking_continues(clip: Path, caplog: pytest.LogCaptureFixture) -> None:
    detector = ScriptedDetector(*WALKERS, fails=lambda number: number in (0, 15, 20))
    stream = track_streams([clip], CLASSES, model=detector, every=5)
    found = list(stream)
    check_frames(found, range(48))
    assert (stream.keyframe_detector.detections_run, stream.keyframe_detector.failed) == (8, 3)
    warnings = [r.getMessage() for r in caplog.records if "the detector failed" in r.getMessage()]
    assert warnings == [
        f"{stream.sources[0].name}: the detector failed on frame {n}: frame {n} is too much" for n in (0, 15, 20)
    ]
    assert "street.mp4" in warnings[0]
    assert [t.frame.index for t in found if t.is_keyframe] == [5, 10, 25, 30, 35, 40, 45, 47]
    for walker in WALKERS:
        assert track_ids_of(walker, found)[:5] == [None] * 5
        assert len(set(track_ids_of(walker, found)[5:])) == 1


def test_detector_that_always_raises_yields_empty_detections(clip: Path, caplog: pytest.LogCaptureFixture) -> None:
    stream = track_streams([clip], CLASSES, model=ScriptedDetector(fails=lambda number: True), every=5)
    found = list(stream)
    check_frames(found, range(48))
    assert not any(t.is_keyframe or len(t.detections) for t in found)
    assert (stream.keyframe_detector.detections_run, stream.keyframe_detector.failed) == (0, 11)


def test_failed_last_frame_is_not_detected_twice(images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moondream_cv.video.stream.MAX_HELD_BYTES", 1)  # so that each detection is awaited
    detector = ScriptedDetector(fails=lambda number: True)
    stream = track_streams([images[:6]], CLASSES, model=detector, every=5)
    assert len(list(stream)) == 6
    assert detector.keyframes == [0, 5]
    assert stream.keyframe_detector.failed == 2


@pytest.mark.parametrize("nonsense", [lambda image, classes: None, lambda image, classes: 1 / 0, lambda: 3])
def test_invalid_detector_results_are_counted_as_failed(
    clip: Path, nonsense: Any, caplog: pytest.LogCaptureFixture
) -> None:
    stream = track_streams([clip], CLASSES, model=nonsense, every=15)
    found = list(stream)
    check_frames(found, range(48))
    assert stream.keyframe_detector.failed == 5
    assert "street.mp4" in caplog.text


@pytest.mark.parametrize(
    ("class_ids", "box"),
    [
        ([0, 5], [1, 2, 30, 40]),
        ([0, -1], [1, 2, 30, 40]),
        ([0, 1], [np.nan, 2, 30, 40]),
        ([0, 1], [400, 2, 430, 40]),
        ([0, 1], [90, 90, 50, 50]),
    ],
    ids=["class too high", "class below 0", "NaN", "outside", "inverted"],
)
def test_invalid_boxes_and_class_ids_are_dropped(clip: Path, class_ids: list[int], box: list[float]) -> None:
    def detector(image: np.ndarray, classes: Sequence[str]) -> sv.Detections:
        return sv.Detections(np.array([[50, 50, 90, 90], box], np.float32), class_id=np.array(class_ids))

    found = list(track_streams([clip], CLASSES, model=detector, every=5))
    check_frames(found, range(48))
    names = {name for t in found for name in np.asarray(t.detections.data["class_name"]).tolist()}
    assert names <= {"dog"}  # valid boxes may be kept


def test_detections_without_confidence_and_with_extra_data_are_tracked(clip: Path) -> None:
    def detector(image: np.ndarray, classes: Sequence[str]) -> sv.Detections:
        return sv.Detections(
            xyxy=np.array([[50, 50, 90, 90]], float),
            class_id=np.array([1]),
            mask=np.zeros((1, *image.shape[:2]), bool),
            data={"class_name": np.array(["another name"]), "extra": np.array([3])},
            metadata={"more": 1},
        )

    found = list(track_streams([clip], CLASSES, model=detector, every=5))
    check_frames(found, range(48))
    assert all(t.detections.confidence is not None and t.detections.confidence.tolist() == [1.0] for t in found)
    sv.Detections.merge([t.detections for t in found])


@pytest.mark.parametrize(
    "every",
    [
        5,
        1000,
    ],
)
def test_frames_before_a_source_failure_are_yielded_first(every: int, images: list[np.ndarray]) -> None:
    found: list[TrackedFrame] = []
    stream = track_streams(
        [broken(images[:23], OSError("no more"))], CLASSES, model=ScriptedDetector(*WALKERS), every=every
    )
    with pytest.raises(OSError, match="no more"):
        found.extend(stream)
    assert [frame_number(t.frame.image) for t in found] == list(range(23))


def test_source_failure_raises_and_ends_the_stream(images: list[np.ndarray]) -> None:
    before = stream_threads()
    stream = track_streams(
        [broken(images[:23], OSError("no more"))], CLASSES, model=ScriptedDetector(*WALKERS), every=5
    )
    with pytest.raises(OSError, match="no more"):
        list(stream)
    assert list(stream) == []
    until(lambda: stream_threads() <= before)


def test_lost_live_source_raises_after_its_last_frame(images: list[np.ndarray]) -> None:
    before = stream_threads()
    found: list[TrackedFrame] = []
    stream = track_streams([Camera(images, count=15).open()], CLASSES, model=ScriptedDetector(*WALKERS))
    with pytest.raises(VideoError, match="the camera at the door is lost"):
        found.extend(stream)
    assert frame_number(found[-1].frame.image) == 14
    assert list(stream) == []
    until(lambda: stream_threads() <= before)


def test_live_source_continues_when_the_detector_raises(
    images: list[np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    every: Any
    for every in (1, "auto"):
        caplog.clear()
        detector = ScriptedDetector(fails=lambda number: True)
        with track_streams([Camera(images).open()], CLASSES, model=detector, every=every) as stream:
            found = list(islice(stream, 10))
        assert not any(t.is_keyframe or len(t.detections) for t in found)
        assert "the camera at the door: the detector failed on frame 0" in caplog.text


def test_failing_source_does_not_stop_the_others(
    images: list[np.ndarray], clip: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sources = [clip, broken(images[:20], VideoError("the second source failed")), images[:60]]
    found: list[TrackedFrame] = []
    stream = track_streams(sources, CLASSES, model=ScriptedDetector(*WALKERS), every=5)
    with pytest.raises(VideoError, match="the second source failed"):
        found.extend(stream)
    assert [len(each) for each in by_source(found, 3)][::2] == [48, 60]
    assert "the second source failed" in caplog.text
    assert list(stream) == []


def test_failing_detector_does_not_stop_several_sources(clip: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = list(track_streams([clip, clip], CLASSES, model=ScriptedDetector(fails=lambda number: True), every=5))
    assert [len(each) for each in by_source(found, 2)] == [48, 48]
