"""When to look: fixed and automatic intervals, and cuts. Run with `pytest tests/video/test_schedule.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pytest

from moondream_cv.video.tracking.schedule import SLOWEST, Every, SceneChange, Schedule, check_every
from tests.helpers.clips import numbered


def keyframes(schedule: Schedule, count: int, first: int = 0) -> list[int]:
    return [index for index in range(first, first + count) if schedule.wants(index)]


@pytest.mark.parametrize("every", [1, 5, 300, 10_000, "auto"])
def test_what_every_may_be(every: Every) -> None:
    assert check_every(every) == every


@pytest.mark.parametrize("every", [0, -3, 2.0, float("nan"), True, None, "5", "Auto", "", [5], (1,)])
def test_what_every_may_not_be(every: object) -> None:
    with pytest.raises(ValueError, match=r"every must be 'auto' or a number of frames from 1 on, not ") as raised:
        check_every(every)
    assert repr(every) in str(raised.value)


def test_a_fixed_interval() -> None:
    assert keyframes(Schedule(1, 30.0), 5) == [0, 1, 2, 3, 4]
    assert keyframes(Schedule(5, 30.0), 16) == [0, 5, 10, 15]
    assert keyframes(Schedule(100, 30.0), 50) == [0]
    assert keyframes(Schedule(4, 30.0), 10, first=7) == [7, 11, 15]  # the first frame, whatever its number


def test_a_fixed_interval_learns_nothing() -> None:
    schedule = Schedule(5, 30.0)
    schedule.learn(100.0, 100.0)
    assert schedule.interval == 5
    schedule.learn(0.0, 0.0)
    assert schedule.interval == 5


def test_after_a_cut_the_count_starts_anew() -> None:
    schedule = Schedule(5, 30.0)
    assert keyframes(schedule, 8) == [0, 5]
    schedule.restart()
    assert keyframes(schedule, 12, first=8) == [8, 13, 18]


def test_auto_grows_with_what_a_call_takes() -> None:
    schedule = Schedule("auto", 30.0)
    assert schedule.interval == 1
    schedule.learn(1.0, 0.5)
    assert 30 <= schedule.interval <= 36  # a call a second, and a little room
    assert keyframes(schedule, 100)[:2] == [0, schedule.interval]
    schedule.learn(0.1, 0.5)
    assert 3 <= schedule.interval < 36


def test_auto_grows_while_the_output_lags_behind() -> None:
    schedule = Schedule("auto", 30.0)
    schedule.learn(0.1, 0.5)
    before = schedule.interval
    schedule.learn(0.1, 2.0)
    assert schedule.interval == 2 * before
    schedule.learn(0.1, 1000.0)
    assert schedule.interval <= 8 * before  # a single pause is no reason to stop looking


def test_a_lag_of_keyframes_chosen_earlier_does_not_count_twice() -> None:
    schedule = Schedule("auto", 30.0)
    for _ in range(4):
        schedule.learn(0.1, 3.0, 2)  # asked for when every second frame was
    assert schedule.interval == 6


def test_auto_comes_back_step_by_step() -> None:
    schedule = Schedule("auto", 30.0)
    schedule.learn(1.0, 0.5)
    intervals = [schedule.interval]
    for _ in range(50):
        schedule.learn(0.1, 0.2)
        intervals.append(schedule.interval)
    assert intervals == sorted(intervals, reverse=True)
    assert intervals[1] > intervals[0] / 2
    assert intervals[-1] == 4  # 0.1 s are 3 frames, and a little room


def test_auto_goes_on_looking_where_it_is_not_the_model_that_takes_the_time() -> None:
    schedule = Schedule("auto", 30.0)
    for _ in range(20):
        schedule.learn(0.01, 4.0)
    assert schedule.interval <= 10


def test_auto_settles() -> None:
    schedule = Schedule("auto", 25.0)
    found = []
    for _ in range(200):
        looking = 0.2  # seconds a call
        lag = max(0.3, looking / (schedule.interval / 25.0))
        schedule.learn(looking, lag)
        found.append(schedule.interval)
    assert set(found[20:]) == {6}  # 0.2 s are 5 frames, and a little room


def test_auto_never_stops_looking() -> None:
    schedule = Schedule("auto", 60.0)
    for _ in range(20):
        schedule.learn(100.0, 100.0)
    assert schedule.interval == SLOWEST


def drawn(seed: int, size: tuple[int, int] = (320, 180)) -> np.ndarray:
    """[H, W, 3] a scene of large areas."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC)


def test_a_cut() -> None:
    is_cut = SceneChange()
    found = [is_cut(drawn(seed)) for seed in (1, 1, 1, 2, 2, 3, 1, 1)]
    assert found == [False, False, False, True, False, True, True, False]


def test_what_is_no_cut() -> None:
    scene = drawn(1, (400, 180))
    rng = np.random.default_rng(0)
    cases: tuple[Sequence[Any], ...] = (
        [scene[:, x : x + 320] for x in range(0, 80, 4)],  # a pan
        [(scene * share).astype(np.uint8) for share in np.linspace(1, 0.1, 12)],  # a fade
        [np.clip(scene.astype(int) + rng.normal(0, 20, scene.shape), 0, 255).astype(np.uint8) for _ in range(5)],
        [np.full((180, 320, 3), value, np.uint8) for value in (0, 255, 0, 128)],  # nothing is on it
        [cv2.addWeighted(scene, 1 - share, drawn(2, (400, 180)), share, 0) for share in np.linspace(0, 1, 25)],
        [numbered(7), numbered(7, (256, 128)), numbered(7, (64, 32))],  # sizes change, the picture does not
    )
    for frames in cases:
        is_cut = SceneChange()
        assert not any(is_cut(frame) for frame in frames)
