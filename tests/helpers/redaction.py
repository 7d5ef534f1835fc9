"""Frames, boxes and checks for tests of redaction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
import supervision as sv

from moondream_cv.video import TrackedFrame
from moondream_cv.video.tracking.redaction import MARGIN

SIZE = (320, 180)
FPS = 30.0
FRAMES = 180
CLASSES = ("a", "b")

Box = tuple[float, float, float, float]


def textured_frames(count: int = FRAMES) -> Iterator[np.ndarray]:
    """Yield checkerboards that contain their number in the first pixel. Blur turns them gray."""
    rows, columns = np.indices((SIZE[1], SIZE[0])) // 2
    board = np.repeat(np.where((rows + columns) % 2, 215, 40).astype(np.uint8)[..., None], 3, axis=2)
    for number in range(count):
        board[0, 0] = number
        yield board.copy()


def decoded(path: Path) -> Iterator[np.ndarray]:
    """Yield the frames of a video in gray, [H, W]."""
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="gray")


def detections(*boxes: Sequence[float], ids: Sequence[int]) -> sv.Detections:
    """Return detections of class 0 with track IDs."""
    return sv.Detections(
        xyxy=np.array(boxes, np.float32).reshape(-1, 4),
        confidence=np.full(len(boxes), 0.5, np.float32),
        class_id=np.zeros(len(boxes), int),
        tracker_id=np.array(ids, int),
    )


def box_at(x: float, y: float = 90.0, half: float = 10.0) -> Box:
    """Return a square box around a point."""
    return (x - half, y - half, x + half, y + half)


def with_margin(box: Sequence[float]) -> list[float]:
    """Return a box with the margin that `Redactor` adds."""
    left, top, right, bottom = box
    width, height = MARGIN * (right - left), MARGIN * (bottom - top)
    return [left - width, top - height, right + width, bottom + height]


def contains(outer: np.ndarray, inner: Sequence[float]) -> bool:
    """Return whether a box contains another one, within 0.01 pixels."""
    return bool((outer[:2] <= np.array(inner[:2]) + 0.01).all() and (outer[2:] >= np.array(inner[2:]) - 0.01).all())


def redactions(found: Sequence[TrackedFrame]) -> list[sv.Detections]:
    """Return the covering boxes of all frames, and assert that none is missing."""
    covered = [tracked.redaction for tracked in found]
    assert None not in covered
    return [boxes for boxes in covered if boxes is not None]
