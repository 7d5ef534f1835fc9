"""Checks, cameras and detectors for tests of `track` and `track_streams`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import supervision as sv

from moondream_cv import Detector
from moondream_cv.video import TrackedFrame
from moondream_cv.video.sources import live
from moondream_cv.video.sources.live import LiveReader
from tests.helpers.clips import MovingObject, frame_number

SIZE = (320, 192)
CLASSES = ["dog", "cat"]
FPS = 25
TIMEOUTS = {"open_timeout": 120.0, "read_timeout": 120.0, "reconnect_for": 0.0}

WALKERS = (
    MovingObject("dog", (40, 40), (2.5, 0.5)),
    MovingObject("cat", (280, 100), (-3, 0)),
    MovingObject("dog", (60, 150), (1, -0.5)),
)


def check_contract(detections: sv.Detections, resolution_wh: tuple[int, int] = SIZE) -> None:
    """Assert the format of tracked detections: types, value ranges, class names and unique track IDs."""
    count = len(detections)
    assert detections.xyxy.dtype == np.float32
    assert detections.xyxy.shape == (count, 4)
    assert (detections.xyxy >= 0).all()
    assert (detections.xyxy <= np.array(resolution_wh * 2)).all()
    assert (detections.xyxy[:, 2:] > detections.xyxy[:, :2]).all()
    assert detections.confidence is not None
    assert detections.class_id is not None
    assert detections.tracker_id is not None
    assert detections.confidence.dtype == np.float32
    assert ((detections.confidence >= 0) & (detections.confidence <= 1)).all()
    assert detections.class_id.dtype == detections.tracker_id.dtype == int
    assert list(detections.data) == ["class_name"]
    names = detections.data["class_name"]
    assert isinstance(names, np.ndarray)
    assert names.dtype.kind == "U"
    assert names.tolist() == [CLASSES[i] for i in detections.class_id]
    assert detections.metadata == {}
    assert detections.mask is None
    assert len(set(detections.tracker_id.tolist())) == count
    assert (detections.tracker_id >= 1).all()


def check_frames(
    found: Sequence[TrackedFrame],
    numbers: Sequence[int],
    read_number: Callable[[np.ndarray], int] = frame_number,
) -> None:
    """Assert that the frames have these numbers, consecutive indices, the times of `FPS`, and valid detections."""
    assert [read_number(tracked.frame.image) for tracked in found] == list(numbers)
    assert [tracked.frame.index for tracked in found] == list(range(len(numbers)))
    times = [tracked.frame.time for tracked in found]
    np.testing.assert_allclose(np.diff(times), 1 / FPS, atol=2e-3)
    assert times[0] == 0
    for tracked in found:
        check_contract(tracked.detections, (tracked.frame.image.shape[1], tracked.frame.image.shape[0]))


def track_ids_of(
    item: MovingObject,
    found: Sequence[TrackedFrame],
    pixels: float = 2.0,
    read_number: Callable[[np.ndarray], int] = frame_number,
) -> list[int | None]:
    """Return the track ID of an object on each frame; None if no box of its class is at its place.

    Args:
        item: The object.
        found: Frames to search.
        pixels: Maximum distance between a box and the true box.
        read_number: Function that reads the frame number from an image.
    """
    ids: list[int | None] = []
    for tracked in found:
        detections = tracked.detections
        assert detections.tracker_id is not None
        near = np.abs(detections.xyxy - item.box(read_number(tracked.frame.image))).max(1) <= pixels
        rows = np.flatnonzero(near & (np.asarray(detections.data["class_name"]) == item.name))
        assert len(rows) <= 1
        ids.append(int(detections.tracker_id[rows[0]]) if len(rows) else None)
    return ids


def by_source(found: Sequence[TrackedFrame], count: int) -> list[list[TrackedFrame]]:
    """Return the frames of each source."""
    return [[tracked for tracked in found if tracked.source == number] for number in range(count)]


def stream_threads() -> set[threading.Thread]:
    """Return the running threads of streams and live sources."""
    return {t for t in threading.enumerate() if t.name.startswith(("moondream_cv", "frames of"))}


def broken(images: Sequence[np.ndarray], error: BaseException) -> Iterator[np.ndarray]:
    """Yield images, then raise an error."""
    yield from images
    raise error


class Camera:
    """Live source that produces frames at a constant rate.

    Attributes:
        shown: Number of the newest frame.
    """

    def __init__(self, images: Sequence[np.ndarray], rate: float = 40.0, count: int = 10_000) -> None:
        """Create a camera.

        Args:
            images: Frames, repeated.
            rate: Frames per second.
            count: Number of frames after which the camera fails.
        """
        self.images, self.rate, self.count = images, rate, count
        self.shown = -1

    def __call__(self, reader: LiveReader) -> Iterator[np.ndarray]:
        reader.fps = self.rate
        start = time.monotonic()
        for number in range(self.count):
            time.sleep(max(0.0, start + number / self.rate - time.monotonic()))
            self.shown = number
            yield self.images[number % len(self.images)]

    def open(self) -> LiveReader:
        """Return a reader of the camera."""
        return LiveReader(self, name="the camera at the door", **TIMEOUTS)


class SteppedCamera(Camera):
    """Camera that produces a frame on each call of `step`, with the times of a constant rate."""

    def __init__(self, images: Sequence[np.ndarray], monkeypatch: pytest.MonkeyPatch, rate: float = 40.0) -> None:
        """Create a camera whose first frame is available at once."""
        super().__init__(images, rate)
        self._steps = threading.Semaphore(1)
        monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: max(0, self.shown) / rate))

    def __call__(self, reader: LiveReader) -> Iterator[np.ndarray]:
        reader.fps = self.rate
        while not reader._closing.is_set():
            if self._steps.acquire(timeout=0.01):
                self.shown += 1
                yield self.images[self.shown % len(self.images)]

    def step(self) -> None:
        """Produce the next frame."""
        self._steps.release()


class CountingDetector(Detector):
    """`Detector` that records the number of frames in each call.

    Attributes:
        sizes: Number of frames in each call.
        busy: Whether a call is running.
    """

    def __init__(
        self, *args: Any, seconds: float = 0.0, sleep: Callable[[float], None] = time.sleep, **options: Any
    ) -> None:
        """Create a detector that calls `sleep(seconds)` in each call."""
        super().__init__(*args, **options)
        self.sizes: list[int] = []
        self.busy = False
        self._seconds, self._sleep = seconds, sleep

    def __call__(self, frame: Any, classes: Any) -> Any:
        self.sizes.append(len(frame) if isinstance(frame, list) else 1)
        self.busy = True
        self._sleep(self._seconds)
        self.busy = False
        return super().__call__(frame, classes)
