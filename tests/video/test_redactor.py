"""`Redactor`: the boxes that cover single tracks. Run with `pytest tests/video/test_redactor.py`."""

from __future__ import annotations

import numpy as np
import pytest

from moondream_cv.video.tracking.redaction import MARGIN, Redactor
from tests.helpers.redaction import CLASSES, FPS, SIZE, box_at, contains, detections, with_margin


def test_single_detection_is_covered_before_and_after_with_a_growing_box() -> None:
    redactor = Redactor(0.7)
    redactor.add(detections(box_at(160), ids=[4]), 2.0, SIZE)
    sizes = {}
    for time in (1.29, 1.31, 1.7, 1.99, 2.0, 2.01, 2.3, 2.69, 2.71):
        found = redactor.cover(time, CLASSES, SIZE)
        assert all(contains(box, box_at(160)) for box in found.xyxy)
        sizes[time] = float(found.area.sum())
        assert found.tracker_id.tolist() == [4] * len(found)  # type: ignore[union-attr]
    assert sizes[1.29] == sizes[2.71] == 0
    one = 400 * (1 + 2 * MARGIN) ** 2
    assert sizes[2.0] == sizes[1.99] == sizes[2.01] == pytest.approx(one, abs=0.1)
    assert sizes[1.31] == pytest.approx(sizes[2.69])
    assert one + 1 < sizes[2.3] < sizes[2.69]


def test_gap_confirmed_by_motion_is_interpolated() -> None:
    redactor = Redactor(0.7)
    for time in (0.0, 0.2, 0.4, 1.6, 1.8):
        redactor.add(detections(box_at(20 + 100 * time), ids=[1]), time, SIZE)
    for time in np.arange(0.4, 1.6, 0.1):
        expected = [with_margin(box_at(20 + 100 * time))]
        np.testing.assert_allclose(redactor.cover(time, CLASSES, SIZE).xyxy, expected, atol=1e-3)


def test_object_that_turns_within_a_gap_is_covered() -> None:
    redactor = Redactor(0.7)
    path = [(0.1 * i, 100 + min(8 * i, 160 - 8 * i)) for i in range(21)]  # turns back after 1 s
    for time, x in path:
        if not 0.5 < time < 1.5:
            redactor.add(detections(box_at(x), ids=[1]), time, SIZE)
    for time, x in path:
        (box,) = redactor.cover(time, CLASSES, SIZE).xyxy
        assert contains(box, box_at(x)), time


def test_track_that_jumps_covers_both_objects() -> None:
    redactor = Redactor(0.7)
    for i in range(10):
        redactor.add(detections(box_at(50 if i < 5 else 250), ids=[1]), 0.1 * i, SIZE)
    for i in range(10):
        (box,) = redactor.cover(0.1 * i, CLASSES, SIZE).xyxy
        assert contains(box, box_at(50)), i
        assert contains(box, box_at(250)), i


def test_tracks_and_untracked_detections_are_covered_together() -> None:
    redactor = Redactor(0.7)
    boxes = [box_at(50), box_at(150), box_at(220), box_at(280)]
    redactor.add(detections(*boxes, ids=[3, -1, 7, -1]), 0.0, SIZE)
    found = redactor.cover(0.0, CLASSES, SIZE)
    np.testing.assert_allclose(found.xyxy, [with_margin(box) for box in boxes], atol=1e-3)
    assert found.tracker_id is not None
    assert found.tracker_id.tolist() == [3, -1, 7, -1]
    assert found.data["class_name"].tolist() == ["a"] * 4
    assert len(redactor.cover(0.6, CLASSES, SIZE)) == 4


def test_duplicates_extend_the_box_of_their_object() -> None:
    redactor = Redactor(0.7)
    found = detections(box_at(60), box_at(160), box_at(165), ids=[1, 2, -1])
    found.data["duplicate"] = np.array([False, False, True])
    redactor.add(found, 0.0, SIZE)
    covered = redactor.cover(0.0, CLASSES, SIZE)
    assert covered.tracker_id is not None
    assert covered.tracker_id.tolist() == [1, 2]
    assert contains(covered.xyxy[1], (150, 80, 175, 100))
    assert not contains(covered.xyxy[0], (150, 80, 175, 100))


def test_boxes_are_clipped_at_the_edge_of_the_frame() -> None:
    redactor = Redactor(0.7)
    for i in range(4):
        redactor.add(detections((290.0 + 8 * i, 80, 320, 100), ids=[1]), 0.1 * i, SIZE)
    for i in range(4, 10):
        (box,) = redactor.cover(0.1 * i, CLASSES, SIZE).xyxy
        assert contains(box, (314, 80, 320, 100))
        assert box[2] == 320


def test_boxes_are_rescaled_when_the_frame_size_changes() -> None:
    redactor = Redactor(0.7)
    redactor.add(detections((100, 50, 140, 90), ids=[1]), 0.0, SIZE)
    np.testing.assert_allclose(redactor.cover(0.01, CLASSES, (640, 360)).xyxy, [with_margin((200, 100, 280, 180))])
    redactor.add(detections((200, 100, 280, 180), ids=[2]), 0.02, (640, 360))
    assert len(redactor.cover(0.7, CLASSES, (640, 360))) == 2


def test_late_detections_cover_longer() -> None:
    redactor = Redactor(0.7)
    redactor.add(detections(box_at(160), ids=[1]), 0.0, SIZE)
    assert len(redactor.cover(0.9, CLASSES, SIZE)) == 0
    assert len(redactor.cover(0.9, CLASSES, SIZE, delay=0.3)) == 1
    assert len(redactor.cover(1.5, CLASSES, SIZE, interval=2.0)) == 1


@pytest.mark.slow
def test_old_detections_are_dropped() -> None:
    redactor = Redactor(0.7)
    for i in range(600):
        redactor.add(detections(box_at(160), box_at(60), ids=[1 + i // 100, -1]), i / FPS, SIZE)
        redactor.cover(i / FPS, CLASSES, SIZE)
    assert sum(len(track.times) for track in redactor._tracks.values()) < 300
