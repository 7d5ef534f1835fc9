"""`OnlineTracker` in a user's own loop. Run with `pytest tests/video/test_online.py`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import supervision as sv

from moondream_cv.video import Frame, OnlineTracker, Tracking, track_streams
from moondream_cv.video.sources.base import Source
from tests.helpers.clips import MovingObject, ScriptedDetector, frame_number, numbered_image
from tests.helpers.streams import CLASSES, FPS, SIZE, WALKERS, check_contract

pytestmark = pytest.mark.compat


def run_loop(tracker: OnlineTracker, images: Sequence[np.ndarray], detector: ScriptedDetector) -> list[sv.Detections]:
    """Track through images as a user's loop does, with detection when the tracker asks for it."""
    results = []
    for number, image in enumerate(images):
        time = number / FPS
        detections = detector(image, CLASSES) if tracker.needs_detections(image, time) else None
        results.append(tracker.step(image, time, detections))
    return results


def ids(detections: sv.Detections) -> list[int]:
    assert detections.tracker_id is not None
    return detections.tracker_id.tolist()  # type: ignore[no-any-return]


def boxes(*lefts: float, class_ids: Sequence[int] | None = None, **fields: Any) -> sv.Detections:
    """Return boxes of 40 pixels at these left edges."""
    return sv.Detections(
        xyxy=np.array([(left, 50, left + 40, 90) for left in lefts], np.float32).reshape(-1, 4),
        class_id=np.array(class_ids or [0] * len(lefts), int),
        **fields,
    )


def test_opencv_loop_tracks_objects_with_detection_on_every_fifth_frame(clip: Path) -> None:
    tracker, detector, capture = OnlineTracker(every=5), ScriptedDetector(*WALKERS), cv2.VideoCapture(str(clip))
    results = []
    while True:
        is_read, image = capture.read()
        if not is_read:
            break
        time = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        found = detector(image, CLASSES) if tracker.needs_detections(image, time) else None
        results.append(tracker.step(image, time, found))
    assert detector.keyframes == list(range(0, 48, 5))
    assert len(results) == 48
    for number, detections in enumerate(results):
        check_contract(detections)
        assert sorted(ids(detections)) == [1, 2, 3]
        for walker, tracker_id in zip(WALKERS, (1, 3, 2), strict=True):
            box = detections.xyxy[ids(detections).index(tracker_id)]
            # The velocity is unknown before the second keyframe.
            np.testing.assert_allclose(box, walker.box(number), atol=13 if number < 5 else 0.5)
    assert tracker.interval == pytest.approx(5 / FPS)


def test_online_tracker_returns_the_detections_of_a_live_stream(images: list[np.ndarray]) -> None:
    class LiveFrames(Source):
        live = True

        def __init__(self) -> None:
            super().__init__("the camera")
            self._frames = iter([Frame(image, number, number / FPS) for number, image in enumerate(images[:30])])

        def __next__(self) -> Frame:
            return next(self._frames)

        def close(self) -> None:
            self._frames = iter(())

    expected = list(track_streams([LiveFrames()], CLASSES, model=ScriptedDetector(*WALKERS), every=1))
    results = run_loop(OnlineTracker(every=1), images[:30], ScriptedDetector(*WALKERS))
    assert results == [tracked.detections for tracked in expected]
    assert all(tracked.is_keyframe for tracked in expected)


def scene(number: int) -> np.ndarray:
    """Return a frame of one of two scenes, with its number in a corner; the second scene starts at frame 12."""
    coarse = np.random.default_rng(number >= 12).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    image = cv2.resize(coarse, SIZE, interpolation=cv2.INTER_CUBIC)
    image[:24, :128] = numbered_image(number, (128, 48))[:24]
    return image


@pytest.mark.parametrize("scene_change", [True, False])
def test_scene_cut_starts_new_tracks_with_a_keyframe(scene_change: bool) -> None:
    detector = ScriptedDetector(
        MovingObject("dog", (160, 100)), read_number=lambda image: frame_number(image[:24, :128])
    )
    tracker = OnlineTracker(Tracking(scene_change=scene_change), every=5)
    results = run_loop(tracker, [scene(number) for number in range(20)], detector)
    assert detector.keyframes == ([0, 5, 10, 12, 17] if scene_change else [0, 5, 10, 15])
    assert [ids(d) for d in results] == [[1]] * 12 + [[2] if scene_change else [1]] * 8


def test_change_of_frame_size_starts_new_tracks_with_a_keyframe() -> None:
    images = [numbered_image(n, SIZE if n < 7 else (256, 128)) for n in range(14)]
    detector = ScriptedDetector(MovingObject("dog", (100, 60)))
    results = run_loop(OnlineTracker(every=5), images, detector)
    assert detector.keyframes == [0, 5, 7, 12]
    assert [ids(d) for d in results] == [[1]] * 7 + [[2]] * 7


def test_boundaries_are_detected_without_needs_detections() -> None:
    tracker = OnlineTracker()
    large, small = np.zeros((192, 320, 3), np.uint8), np.zeros((128, 256, 3), np.uint8)
    assert ids(tracker.step(large, 0.0, boxes(100))) == [1]
    assert ids(tracker.step(small, 0.1)) == []
    assert ids(tracker.step(small, 0.2, boxes(100))) == [2]


def test_reset_ends_tracks_and_allows_times_to_restart(images: list[np.ndarray]) -> None:
    tracker, detector = OnlineTracker(every=5), ScriptedDetector(*WALKERS)
    first = run_loop(tracker, images[:8], detector)
    tracker.reset()
    second = run_loop(tracker, images[20:28], detector)
    assert detector.keyframes == [0, 5, 20, 25]
    assert {i for d in first for i in ids(d)} == {1, 2, 3}
    assert {i for d in second for i in ids(d)} == {4, 5, 6}


def test_needs_detections_may_be_called_repeatedly(images: list[np.ndarray]) -> None:
    tracker = OnlineTracker(Tracking(scene_change=True), every=2)
    needed = []
    for number, image in enumerate(images[:4]):
        answers = {tracker.needs_detections(image, number / FPS) for _ in range(3)}
        needed.append(answers)
        tracker.step(image, number / FPS)
    assert needed == [{True}, {False}, {True}, {False}]


def test_late_detections_are_predicted_to_the_current_frame(images: list[np.ndarray]) -> None:
    tracker, walker = OnlineTracker(classes=CLASSES), MovingObject("dog", (40, 60), (2.0, 0.0))
    frames = [Frame(image, n, n / FPS) for n, image in enumerate(images[:30])]
    detector = ScriptedDetector(walker)
    results = []
    for frame in frames:
        keyframe = frames[frame.index - 4] if frame.index % 5 == 4 else None  # four frames late
        found = None if keyframe is None else detector(keyframe.image, CLASSES)
        results.append(tracker.step_frame(frame, found, keyframe=keyframe))
    assert [len(d) for d in results] == [0] * 4 + [1] * 26
    for number, detections in enumerate(results[9:], 9):
        np.testing.assert_allclose(detections.xyxy, [walker.box(number)], atol=0.5)


def test_late_detections_of_an_earlier_segment_are_ignored(images: list[np.ndarray]) -> None:
    tracker = OnlineTracker()
    frames = [Frame(image, n, n / FPS) for n, image in enumerate(images[:4])]
    tracker.step_frame(frames[0])
    tracker.reset()
    assert len(tracker.step_frame(frames[1], boxes(100), keyframe=frames[0])) == 0
    assert ids(tracker.step_frame(frames[2], boxes(100))) == [1]


def test_predictions_end_after_two_missed_keyframes(images: list[np.ndarray]) -> None:
    detector = ScriptedDetector(MovingObject("dog", (160, 100), frames=range(11)))
    results = run_loop(OnlineTracker(every=5), images[:40], detector)
    assert [number for number, d in enumerate(results) if len(d)] == list(range(22))  # 2.2 intervals after frame 10


@pytest.mark.parametrize(
    ("classes", "fields", "expected"),
    [
        (None, {"data": {"class_name": np.array(["cat", "dog"])}}, ["cat", "dog"]),
        (["dog", "cat"], {"data": {"class_name": np.array(["x", "y"])}}, ["cat", "dog"]),
        (None, {}, ["class 1", "class 0"]),
    ],
)
def test_class_names_come_from_classes_or_detections(
    classes: list[str] | None, fields: dict[str, Any], expected: list[str], images: list[np.ndarray]
) -> None:
    tracker = OnlineTracker(classes=classes)
    for number, detections in enumerate((boxes(50, 200, class_ids=[1, 0], **fields), None)):
        tracked = tracker.step(images[number], number / FPS, detections)
        by_left = np.argsort(tracked.xyxy[:, 0])
        assert np.asarray(tracked.data["class_name"])[by_left].tolist() == expected


def test_detections_without_class_id_have_class_0(images: list[np.ndarray]) -> None:
    tracked = OnlineTracker().step(images[0], 0.0, sv.Detections(np.array([[50.0, 50, 90, 90]])))
    assert (ids(tracked), tracked.data["class_name"].tolist()) == ([1], ["object"])  # type: ignore[union-attr]


def test_redact_sets_the_covering_boxes(images: list[np.ndarray]) -> None:
    plain, redacting = OnlineTracker(), OnlineTracker(Tracking(redact=True, bridge_seconds=0.4))
    covered = []
    for number, image in enumerate(images[:20]):
        found = boxes(100) if number == 0 else None
        assert plain.step(image, number / FPS, found) == redacting.step(image, number / FPS, found)
        assert redacting.redaction is not None
        covered.append(redacting.redaction.area.sum() if len(redacting.redaction) else 0)
    assert plain.redaction is None
    assert covered[0] > 40 * 40
    assert covered[9] > covered[1]


def test_duplicates_are_not_returned(images: list[np.ndarray]) -> None:
    tracker = OnlineTracker()
    found = boxes(100, 104, 220, confidence=np.array([0.9, 0.4, 0.8], np.float32))
    assert ids(tracker.step(images[0], 0.0, found)) == [1, 2]


def test_untracked_detections_are_returned_on_keyframes_with_id_minus_1(images: list[np.ndarray]) -> None:
    import trackers

    class FirstBoxTracker(trackers.SORTTracker):
        tracker_id = None

        def update(self, detections: sv.Detections, *args: Any, **options: Any) -> sv.Detections:
            return super().update(detections[:1], *args, **options)  # type: ignore[arg-type]

    tracker = OnlineTracker(Tracking(lambda: FirstBoxTracker(minimum_consecutive_frames=1)))
    assert ids(tracker.step(images[0], 0.0, boxes(100, 220))) == [1, -1]
    assert ids(tracker.step(images[1], 0.1)) == [1]


def test_late_detections_cover_longer(images: list[np.ndarray]) -> None:
    covered = {}
    for delay in (0, 5):
        tracker = OnlineTracker(Tracking(redact=True, bridge_seconds=0.2))
        frames = [Frame(image, n, n / FPS) for n, image in enumerate(images[:20])]
        number = 0
        for frame in frames:
            found = boxes(100) if frame.index == delay else None
            tracker.step_frame(frame, found, keyframe=frames[0] if found else None, unknown_interval=0.01)
            assert tracker.redaction is not None
            number = frame.index if len(tracker.redaction) else number
        covered[delay] = number  # the last covered frame
    assert covered == {0: 5, 5: 10}


@pytest.mark.parametrize("every", [0, -1, 2.5, "auto", None])
def test_invalid_every_is_rejected(every: Any) -> None:
    with pytest.raises(ValueError, match="every must be an integer of at least 1, got "):
        OnlineTracker(every=every)


def test_unknown_tracker_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"tracker must be one of sort, .*, got 'deepsort'"):
        OnlineTracker(Tracking("deepsort"))


def test_list_of_detections_is_rejected(images: list[np.ndarray]) -> None:
    with pytest.raises(TypeError, match=r"detections must be sv\.Detections or None, got list"):
        OnlineTracker().step(images[0], 0.0, [boxes(100)])  # type: ignore[arg-type]


@pytest.mark.parametrize("time", [0.9, -1.0, math.nan])
def test_decreasing_time_is_rejected(time: float, images: list[np.ndarray]) -> None:
    tracker = OnlineTracker()
    tracker.step(images[0], 1.0)
    with pytest.raises(ValueError, match=r"time must not decrease, got .* after 1\.0; call reset\(\)"):
        tracker.step(images[1], time)


def test_steps_are_independent_of_the_caller(images: list[np.ndarray]) -> None:
    """Frames that share one buffer, as with `capture.read(buffer)`, are tracked like copies."""
    buffer = np.empty_like(images[0])

    def reused() -> Iterator[np.ndarray]:
        for image in images[:20]:
            buffer[:] = image
            yield buffer

    expected = run_loop(OnlineTracker(Tracking(scene_change=True)), images[:20], ScriptedDetector(*WALKERS))
    tracker, detector, results = OnlineTracker(Tracking(scene_change=True)), ScriptedDetector(*WALKERS), []
    for number, image in enumerate(reused()):
        found = detector(image, CLASSES) if tracker.needs_detections(image, number / FPS) else None
        results.append(tracker.step(image, number / FPS, found))
    assert results == expected


@pytest.mark.parametrize("image", [None, np.zeros((8, 8), np.uint8), np.zeros((0, 8, 3), np.uint8)])
def test_invalid_images_are_rejected(image: Any) -> None:
    tracker = OnlineTracker()
    with pytest.raises(ValueError, match="image must be a BGR array of shape"):
        tracker.step(image, 0.0)
    with pytest.raises(ValueError, match="image must be a BGR array of shape"):
        tracker.needs_detections(image, 0.0)


def test_invalid_arguments_are_rejected() -> None:
    with pytest.raises(TypeError, match="tracking must be a Tracking or None, got int: 5"):
        OnlineTracker(5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="time must be a number of seconds, got None"):
        OnlineTracker().step(np.zeros((8, 8, 3), np.uint8), None)  # type: ignore[arg-type]


def test_one_class_can_be_a_string() -> None:
    image = np.zeros((80, 80, 3), np.uint8)
    found = sv.Detections(np.array([[10, 10, 40, 40]], np.float32), class_id=np.array([0]), confidence=np.ones(1))
    detections = OnlineTracker(classes="bus").step(image, 0.0, found)
    assert detections.data["class_name"].tolist() == ["bus"]
