"""Duplicates and contradictions among detections. Run with `pytest tests/video/test_class_conflicts.py`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import supervision as sv

from moondream_cv.video import Tracking, track_streams
from moondream_cv.video.sources.frame import Frame
from moondream_cv.video.tracking.tracker import Tracker
from tests.helpers.clips import MovingObject, ScriptedDetector, numbered_image

SIZE = (320, 192)
IMAGE = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
DOG, CAT = 0, 1


def detections(*rows: tuple[int, float, float]) -> sv.Detections:
    """Return boxes of 40 pixels from class, left edge and confidence."""
    return sv.Detections(
        xyxy=np.array([(x, 50, x + 40, 90) for _, x, _ in rows], np.float32).reshape(-1, 4),
        confidence=np.array([score for *_, score in rows], np.float32),
        class_id=np.array([class_id for class_id, *_ in rows], int),
    )


class Stream:
    """Tracker that is called with one keyframe after another."""

    def __init__(self, every: int = 5) -> None:
        self.tracker, self.every, self.index = Tracker(), every, 0

    def __call__(self, *rows: tuple[int, float, float]) -> list[int]:
        found = self.tracker.update(detections(*rows), Frame(IMAGE, self.index, self.index / 30))
        self.index += self.every
        assert found.tracker_id is not None
        return found.tracker_id.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("rows", [((DOG, 100, 0.9), (DOG, 104, 0.4)), ((DOG, 104, 0.4), (DOG, 100, 0.9))])
def test_duplicate_with_lower_confidence_is_not_tracked(rows: Sequence[tuple[int, float, float]]) -> None:
    stream = Stream()
    for _ in range(4):
        assert dict(zip([score for *_, score in rows], stream(*rows), strict=True)) == {0.9: 1, 0.4: -1}
    assert len(stream.tracker.tracks) == 1


def test_detections_with_equal_confidences_are_all_tracked() -> None:
    stream = Stream()
    for _ in range(4):
        assert stream((DOG, 100, 1.0), (DOG, 104, 1.0), (CAT, 100, 1.0)) == [1, 2, 3]
    assert stream((DOG, 100, 1.0), (CAT, 100, 1.0), (CAT, 220, 1.0))[1] == 3


def test_two_objects_that_meet_keep_their_tracks() -> None:
    stream = Stream()
    for step in range(13):  # they meet after six steps
        assert stream((DOG, 70 + 8 * step, 0.9), (DOG, 170 - 8 * step, 0.4)) == [1, 2], step


def test_contradicting_class_with_lower_confidence_is_not_tracked() -> None:
    stream = Stream()
    assert stream((DOG, 40, 0.9), (CAT, 200, 0.9)) == [1, 2]
    for _ in range(4):
        assert stream((DOG, 40, 0.9), (CAT, 200, 0.8)) == [1, 2]
    assert stream((DOG, 40, 0.9), (CAT, 200, 0.8), (CAT, 42, 0.5)) == [1, 2, -1]


def test_coinciding_classes_are_both_tracked() -> None:
    stream = Stream()
    for step in range(10):
        assert stream((DOG, 40 + step, 0.9), (CAT, 42 + step, 0.5), (DOG, 200, 0.8), (CAT, 200, 0.7)) == [1, 3, 2, 4]


def test_track_continues_through_one_detection_of_another_class() -> None:
    stream = Stream()
    for step in range(4):
        assert stream((DOG, 40 + 4 * step, 0.9), (CAT, 200, 0.8)) == [1, 2]
    assert stream((CAT, 56, 0.6), (CAT, 200, 0.8)) == [1, 2]
    assert stream((DOG, 60, 0.9), (CAT, 200, 0.8)) == [1, 2]
    assert [track.class_id for track in stream.tracker.tracks.values()] == [DOG, CAT]


def test_detection_prefers_a_track_of_its_class() -> None:
    stream = Stream()
    for _ in range(4):
        assert stream((DOG, 40, 0.9), (CAT, 60, 0.8)) == [1, 2]
    assert stream((CAT, 50, 0.6)) == [2]


def test_other_class_does_not_continue_a_track_with_a_better_detection() -> None:
    """An object that appears from behind another one gets its own track."""
    stream = Stream()
    for score in (0.9, 0.8, 0.9, 0.8):
        assert stream((DOG, 100, score)) == [1]
    assert stream((CAT, 108, 0.5), (DOG, 128, 0.8)) == [2, 1]
    assert [track.class_id for track in stream.tracker.tracks.values()] == [DOG, CAT]


def test_distant_detection_of_another_class_starts_a_track() -> None:
    stream = Stream()
    for _ in range(4):
        assert stream((DOG, 40, 0.9), (CAT, 240, 0.8)) == [1, 2]
    assert stream((CAT, 100, 0.6), (CAT, 240, 0.8)) == [3, 2]


def test_coincidence_counts_survive_a_scene_cut() -> None:
    stream = Stream()
    for _ in range(6):
        stream((DOG, 40, 0.9), (CAT, 200, 0.8))
    stream.tracker = stream.tracker.successor()
    assert stream((DOG, 40, 0.9), (CAT, 42, 0.5)) == [3, -1]


# In `track_streams` -------------------------------------------------------------------------------------------------


class Blinking(ScriptedDetector):
    """Detector that misses all objects on some frames."""

    def __init__(self, *objects: MovingObject, missed: range) -> None:
        super().__init__(*objects)
        self.missed = missed

    def __call__(self, image: np.ndarray, classes: Sequence[str]) -> sv.Detections:
        found = super().__call__(image, classes)
        return found[[]] if self.keyframes[-1] in self.missed else found  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("every", "gap", "bridge", "bridged"),
    [
        (1, 20, 0.7, True),
        (1, 22, 0.7, False),
        (5, 16, 0.7, True),
        (5, 26, 0.7, False),
        (5, 16, 0.0, False),
        (5, 26, 1.0, True),
    ],
)
def test_gaps_up_to_bridge_seconds_are_interpolated(every: int, gap: int, bridge: float, bridged: bool) -> None:
    item = MovingObject("dog", (60, 100), (1.5, 0))
    missed = range(31, 31 + gap - 1)
    images = [numbered_image(n, SIZE) for n in range(100)]
    detector = Blinking(item, missed=missed)
    found = list(
        track_streams([images], ["dog"], model=detector, every=every, tracking=Tracking(bridge_seconds=bridge))
    )
    middle = 30 + gap // 2
    assert all(len(found[n].detections) == 1 for n in range(100) if n <= 30 or n >= 60)
    assert len(found[middle].detections) == bridged
    if bridged:
        np.testing.assert_allclose(found[middle].detections.xyxy[0], item.box(middle), atol=0.6)


def test_waiting_frames_keep_tracks_that_the_tracker_has_dropped() -> None:
    images = [numbered_image(n, SIZE) for n in range(90)]
    model = ScriptedDetector(MovingObject("dog", (60, 100), frames=range(20, 41)))
    found = list(track_streams([images], ["dog"], model=model, every=1, tracking=Tracking(lost_track_seconds=0.0)))
    assert [n for n, tracked in enumerate(found) if len(tracked.detections)] == list(range(20, 41))


def test_redaction_covers_untracked_duplicates() -> None:
    images = [numbered_image(n, SIZE) for n in range(30)]
    objects = (MovingObject("dog", (100, 100), confidence=0.9), MovingObject("dog", (104, 100), confidence=0.5))
    for tracked in track_streams(
        [images], ["dog"], model=ScriptedDetector(*objects), every=5, tracking=Tracking(redact=True)
    ):
        assert tracked.redaction is not None
        assert tracked.redaction.xyxy[:, 2].max() >= 119  # the right edge of the second box
        assert len(tracked.detections) == 1
