"""Segment boundaries: the frames at which tracks end, because of a scene cut or another frame size."""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

Boundary = Literal["cut", "size"]

CUT_THRESHOLD = 0.35  # normalized difference between consecutive frames above which a cut is detected


class SceneCutDetector:
    """Detects scene cuts by the difference between consecutive frames, scaled to 32x18 pixels."""

    def __init__(self) -> None:
        """Start before the first frame."""
        self._previous: npt.NDArray[np.float32] | None = None

    def __call__(self, image: npt.NDArray[np.uint8]) -> bool:
        """Return whether a scene cut precedes a frame.

        Args:
            image: [H, W, 3] uint8 BGR.
        """
        small = cv2.resize(image, (32, 18), interpolation=cv2.INTER_AREA)
        gray = cv2.cvtColor(small, cv2.COLOR_BGR2GRAY).astype(np.float32)
        gray -= gray.mean()
        previous, self._previous = self._previous, gray
        if previous is None:
            return False
        contrast = float(np.abs(gray).mean() + np.abs(previous).mean())
        # The normalized difference is 0 for identical frames and about 1 for unrelated ones.
        return contrast > 1.0 and float(np.abs(gray - previous).mean()) / contrast > CUT_THRESHOLD


class SegmentBoundaries:
    """Detects the first frames of segments: after scene cuts, if enabled, and after changes of the frame size."""

    def __init__(self, scene_change: bool) -> None:
        """Start before the first frame.

        Args:
            scene_change: Detect scene cuts.
        """
        self._is_cut = SceneCutDetector() if scene_change else None
        self._shape: tuple[int, ...] | None = None

    def check(self, image: npt.NDArray[np.uint8]) -> Boundary | None:
        """Return the reason for which a frame starts a segment; None if it continues the segment.

        Args:
            image: [H, W, 3] uint8 BGR.
        """
        previous, self._shape = self._shape, image.shape
        if self._is_cut is not None and self._is_cut(image):
            return "cut"
        return "size" if previous is not None and image.shape != previous else None
