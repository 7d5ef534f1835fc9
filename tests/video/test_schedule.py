"""Keyframe schedules and scene cuts. Run with `pytest tests/video/test_schedule.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pytest

from moondream_cv.video.tracking.scene_cuts import SceneCutDetector
from moondream_cv.video.tracking.schedule import MAX_INTERVAL, Every, Schedule, check_every
from tests.helpers.clips import numbered_image


def keyframes(schedule: Schedule, count: int, first: int = 0) -> list[int]:
    return [index for index in range(first, first + count) if schedule.is_due(index)]


@pytest.mark.parametrize("every", [1, 5, 300, 10_000, "auto"])
def test_every_accepts_positive_integers_and_auto(every: Every) -> None:
    assert check_every(every) == every


@pytest.mark.parametrize("every", [0, -3, 2.0, float("nan"), True, None, "5", "Auto", "", [5], (1,)])
def test_every_rejects_other_values(every: object) -> None:
    with pytest.raises(ValueError, match=r"every must be 'auto' or an integer of at least 1, got ") as raised:
        check_every(every)
    assert repr(every) in str(raised.value)


def test_fixed_schedule_makes_every_nth_frame_a_keyframe() -> None:
    assert keyframes(Schedule(1, 30.0), 5) == [0, 1, 2, 3, 4]
    assert keyframes(Schedule(5, 30.0), 16) == [0, 5, 10, 15]
    assert keyframes(Schedule(100, 30.0), 50) == [0]
    assert keyframes(Schedule(4, 30.0), 10, first=7) == [7, 11, 15]  # the first frame, whatever its index


def test_fixed_schedule_does_not_adapt() -> None:
    schedule = Schedule(5, 30.0)
    schedule.adapt(100.0, 100.0)
    assert schedule.interval == 5
    schedule.adapt(0.0, 0.0)
    assert schedule.interval == 5


def test_restart_makes_the_next_frame_a_keyframe() -> None:
    schedule = Schedule(5, 30.0)
    assert keyframes(schedule, 8) == [0, 5]
    schedule.restart()
    assert keyframes(schedule, 12, first=8) == [8, 13, 18]


def test_auto_interval_follows_the_duration_of_detector_calls() -> None:
    schedule = Schedule("auto", 30.0)
    assert schedule.interval == 1
    schedule.adapt(1.0, 0.5)
    assert 30 <= schedule.interval <= 36  # one call per second, with some headroom
    assert keyframes(schedule, 100)[:2] == [0, schedule.interval]
    schedule.adapt(0.1, 0.5)
    assert 3 <= schedule.interval < 36


def test_auto_interval_grows_while_the_output_is_slower_than_the_source() -> None:
    schedule = Schedule("auto", 30.0)
    schedule.adapt(0.1, 0.5)
    before = schedule.interval
    schedule.adapt(0.1, 2.0)
    assert schedule.interval == 2 * before
    schedule.adapt(0.1, 1000.0)
    assert schedule.interval <= 8 * before  # a single pause does not stop detection


def test_slowdown_is_applied_to_the_interval_in_use_when_it_was_measured() -> None:
    schedule = Schedule("auto", 30.0)
    for _ in range(4):
        schedule.adapt(0.1, 3.0, 2)  # submitted when the interval was 2
    assert schedule.interval == 6


def test_auto_interval_shrinks_step_by_step() -> None:
    schedule = Schedule("auto", 30.0)
    schedule.adapt(1.0, 0.5)
    intervals = [schedule.interval]
    for _ in range(50):
        schedule.adapt(0.1, 0.2)
        intervals.append(schedule.interval)
    assert intervals == sorted(intervals, reverse=True)
    assert intervals[1] > intervals[0] / 2
    assert intervals[-1] == 4  # 0.1 s are 3 frames, plus headroom


def test_auto_interval_stays_short_if_detection_is_not_the_bottleneck() -> None:
    schedule = Schedule("auto", 30.0)
    for _ in range(20):
        schedule.adapt(0.01, 4.0)
    assert schedule.interval <= 10


def test_auto_interval_converges() -> None:
    schedule = Schedule("auto", 25.0)
    intervals = []
    for _ in range(200):
        detection_seconds = 0.2
        slowdown = max(0.3, detection_seconds / (schedule.interval / 25.0))
        schedule.adapt(detection_seconds, slowdown)
        intervals.append(schedule.interval)
    assert set(intervals[20:]) == {6}  # 0.2 s are 5 frames, plus headroom


def test_auto_interval_has_a_maximum() -> None:
    schedule = Schedule("auto", 60.0)
    for _ in range(20):
        schedule.adapt(100.0, 100.0)
    assert schedule.interval == MAX_INTERVAL


def scene(seed: int, size: tuple[int, int] = (320, 180)) -> np.ndarray:
    """Return a scene of large areas, [H, W, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC)


def test_scene_cuts_are_detected() -> None:
    is_cut = SceneCutDetector()
    assert [is_cut(scene(seed)) for seed in (1, 1, 1, 2, 2, 3, 1, 1)] == [
        *(False, False, False, True, False, True, True, False),
    ]


def test_pans_fades_noise_and_size_changes_are_not_scene_cuts() -> None:
    wide = scene(1, (400, 180))
    rng = np.random.default_rng(0)
    cases: tuple[Sequence[Any], ...] = (
        [wide[:, x : x + 320] for x in range(0, 80, 4)],  # a pan
        [(wide * share).astype(np.uint8) for share in np.linspace(1, 0.1, 12)],  # a fade
        [np.clip(wide.astype(int) + rng.normal(0, 20, wide.shape), 0, 255).astype(np.uint8) for _ in range(5)],
        [np.full((180, 320, 3), value, np.uint8) for value in (0, 255, 0, 128)],  # uniform frames
        [cv2.addWeighted(wide, 1 - share, scene(2, (400, 180)), share, 0) for share in np.linspace(0, 1, 25)],
        [
            numbered_image(7),
            numbered_image(7, (256, 128)),
            numbered_image(7, (64, 32)),
        ],  # the same image in other sizes
    )
    for frames in cases:
        is_cut = SceneCutDetector()
        assert not any(is_cut(frame) for frame in frames)
