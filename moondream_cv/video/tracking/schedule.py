"""When to look: every so many frames, or as often as a model can while the picture keeps up."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

Every = int | Literal["auto"]

SHARE = 0.9  # of the time between keyframes that looking may take: the rest is for decoding and drawing
LEAST_SHARE = 0.05  # of the source's time that looking takes at the least
SLOWEST = 300  # frames from one keyframe to the next at the most
EASING = 0.9  # how fast a schedule that was too cautious comes back
CUT = 0.35  # mean difference of two small grey pictures, after their brightness, beyond which it is another scene


def check_every(every: object) -> Every:
    """Every how many frames, or "auto".

    Raises:
        ValueError: It is neither.
    """
    if every == "auto":
        return "auto"
    if isinstance(every, bool) or not isinstance(every, Integral) or every < 1:
        raise ValueError(f"every must be 'auto' or a number of frames from 1 on, not {every!r}")
    return int(every)


class Schedule:
    """Says which frames of a source are keyframes.

    With "auto" it is as many as the model manages while the output is as fast as the source: from what a call takes,
    and from how much slower than the source the output was lately.

    Attributes:
        interval: Frames from the last keyframe to the next.
    """

    def __init__(self, every: Every, fps: float, max_interval: int = SLOWEST) -> None:
        """Start before the first frame.

        Args:
            every: Frames between keyframes, or "auto".
            fps: Frames per second of the source.
            max_interval: Maximum number of frames between keyframes with "auto".
        """
        self._fixed = every if every != "auto" else None
        self._fps, self._max_interval = fps, max_interval
        self._last: int | None = None
        self.interval = 1 if self._fixed is None else self._fixed

    def wants(self, index: int) -> bool:
        """Whether this frame is a keyframe; if so, the next one counts from it."""
        wanted = self._last is None or index - self._last >= self.interval
        if wanted:
            self._last = index
        return wanted

    def restart(self) -> None:
        """Look at the next frame, whatever its number."""
        self._last = None

    def learn(self, seconds: float, lag: float, interval: int | None = None) -> None:
        """Take in how it went since the keyframe before.

        Args:
            seconds: What a call of the model has taken lately.
            lag: Seconds that passed, for each second of the source.
            interval: Frames since the keyframe before, which may have been chosen before the last change; None: as many
                as now.
        """
        if self._fixed is not None:
            return
        least = math.ceil(seconds * self._fps / SHARE)
        most = math.ceil(seconds * self._fps / LEAST_SHARE)  # beyond that, it is not the model that takes the time
        if lag > 1.0:
            wanted = math.ceil((self.interval if interval is None else interval) * min(lag, 4.0))
        else:
            wanted = math.floor(self.interval * EASING)
        self.interval = max(1, min(self._max_interval, most, max(least, wanted)))


class SceneChange:
    """Tells where a video cuts to another scene."""

    def __init__(self) -> None:
        self._before: npt.NDArray[np.float32] | None = None

    def __call__(self, image: npt.NDArray[np.uint8]) -> bool:
        """Whether a [H, W, 3] BGR frame is of another scene than the one before it."""
        small = cv2.resize(image, (32, 18), interpolation=cv2.INTER_AREA)
        grey = cv2.cvtColor(small, cv2.COLOR_BGR2GRAY).astype(np.float32)
        grey -= grey.mean()
        before, self._before = self._before, grey
        if before is None:
            return False
        contrast = float(np.abs(grey).mean() + np.abs(before).mean())
        # 0 for the same picture; pictures that have nothing to do with each other give about 1.
        return contrast > 1.0 and float(np.abs(grey - before).mean()) / contrast > CUT
