"""Line counting in `annotate_video` and `track_streams`. Run with `pytest tests/video/test_line_counting.py`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import supervision as sv

from moondream_cv.video import Zones, annotate_video, open_source, track_streams
from tests.helpers.clips import frame_number, numbered_image

SIZE = (320, 192)
FRAMES = 120
IMAGES = [numbered_image(number, SIZE) for number in range(FRAMES)]
LINE = {"lines": [{"name": "door", "start": [0, 120], "end": [320, 120]}]}  # in is upwards
HEIGHT = 40.0


class OnPath:
    """Return a detector of one object whose lower edge is at `path(frame number)`."""

    def __init__(self, path: Callable[[int], float]) -> None:
        self.path = path
        self.calls = threading.Semaphore(0)

    def __call__(self, image: np.ndarray, classes: Sequence[str]) -> sv.Detections:
        bottom = self.path(frame_number(image))
        self.calls.release()
        return sv.Detections(
            np.array([[150, bottom - HEIGHT, 170, bottom]], np.float32),
            confidence=np.array([0.9], np.float32),
            class_id=np.array([0]),
            data={"class_name": np.array([classes[0]])},
        )


def jitter(share: float) -> Callable[[int], float]:
    """Return a path on the line, with a vertical error of a share of the height."""
    signs = np.random.default_rng(3).choice([-1, 1], 256)
    return lambda number: 120 + share * HEIGHT * float(signs[number])


def walking(number: int) -> float:
    """Return a path from below to above the line, with jitter."""
    return 170 - number + jitter(0.05)(number) - 120


def waiting(number: int) -> float:
    """Return a path that waits on the line with jitter, and crosses it in the last frames."""
    if number < 30:
        return 165 - 1.5 * number
    return jitter(0.12)(number) if number < 100 else 120 - 2.0 * (number - 100)


PATHS = [(jitter(0.04), 0), (jitter(0.12), 0), (walking, 1), (waiting, 1)]


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize(("path", "expected"), PATHS)
def test_line_counts_each_object_of_a_file_once(path: Callable[[int], float], expected: int, every: int) -> None:
    summary = annotate_video(IMAGES, None, "dog", model=OnPath(path), every=every, zones=LINE)
    assert summary.zones is not None
    counts = summary.zones["lines"]["door"]
    assert (counts["in"], counts["out"]) == (expected, 0)


@pytest.mark.parametrize(
    ("path", "every", "expected"),
    [*((path, 1, expected) for path, expected in PATHS), (jitter(0.04), 5, 0), (walking, 5, 1), (waiting, 5, 1)],
)
def test_line_counts_each_object_of_a_live_source_once(path: Callable[[int], float], every: int, expected: int) -> None:
    assert live_counts(path, every) == (expected, 0)


def test_predictions_that_overshoot_the_line_count_at_most_once() -> None:
    assert sum(live_counts(jitter(0.12), 5)) <= 1  # predicted boxes have three times the error


def live_counts(path: Callable[[int], float], every: int) -> tuple[int, int]:
    detector, zones = OnPath(path), Zones.from_dict(LINE)

    def camera() -> Iterator[np.ndarray]:
        for number, image in enumerate(IMAGES):
            if every > 1 and number % every == 1:  # the detector has the previous keyframe
                assert detector.calls.acquire(timeout=120)
            yield image

    source: Any = open_source(camera())
    source.live = True  # boxes are predicted, and frames are not delayed
    with track_streams([source], "dog", model=detector, every=every) as stream:
        for tracked in stream:
            zones.update(tracked.detections, SIZE)
    counts = zones.counts()["lines"]["door"]
    return counts["in"], counts["out"]
