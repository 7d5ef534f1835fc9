"""Keyframe schedules: every Nth frame, or as often as possible while the output keeps up with the source."""

from __future__ import annotations

import math
from typing import Literal

from moondream_cv.arguments import check_integer

Every = int | Literal["auto"]
"""Number of frames from one keyframe to the next, or "auto"."""

MAX_LOAD = 0.9  # share of the time between keyframes that detection may take; decoding and drawing need the rest
MIN_LOAD = 0.05  # share of the source's time that detection takes at least
MAX_INTERVAL = 300  # frames between keyframes
RECOVERY = 0.9  # factor by which a long interval shrinks again at each keyframe
MAX_SLOWDOWN = 4.0  # factor by which the interval grows at most at each keyframe


def check_every(every: object) -> Every:
    """Return a keyframe interval.

    Raises:
        ValueError: It is neither "auto" nor a number of frames of at least 1.
    """
    if every == "auto":
        return "auto"
    try:
        return check_integer("every", every)
    except ValueError:
        raise ValueError(f"every must be 'auto' or an integer of at least 1, got {every!r:.100}") from None


class Schedule:
    """Chooses the keyframes of a source.

    With "auto", the interval adapts to the duration of detector calls and to the speed of the output.

    Attributes:
        interval: Frames from one keyframe to the next.
    """

    def __init__(self, every: Every, fps: float, max_interval: int = MAX_INTERVAL) -> None:
        """Start before the first frame.

        Args:
            every: Frames between keyframes, or "auto".
            fps: Frames per second of the source.
            max_interval: Maximum number of frames between keyframes with "auto".
        """
        self._is_fixed = every != "auto"
        self._fps, self._max_interval = fps, max_interval
        self._last: int | None = None
        self.interval = 1 if every == "auto" else every

    def is_due(self, index: int) -> bool:
        """Return whether a frame is a keyframe, and count the interval from it if so.

        Args:
            index: Frame number.
        """
        due = self._last is None or index - self._last >= self.interval
        if due:
            self._last = index
        return due

    def restart(self) -> None:
        """Make the next frame a keyframe."""
        self._last = None

    def adapt(self, detection_seconds: float, slowdown: float, interval: int | None = None) -> None:
        """Adapt the interval of an "auto" schedule after a keyframe; a fixed interval stays the same.

        Args:
            detection_seconds: Recent duration of a detector call.
            slowdown: Seconds that passed since the previous keyframe, per second of the source.
            interval: Frames since the previous keyframe; default: the current interval.
        """
        if self._is_fixed:
            return
        shortest = math.ceil(detection_seconds * self._fps / MAX_LOAD)
        longest = math.ceil(detection_seconds * self._fps / MIN_LOAD)  # beyond that, detection is not the bottleneck
        if slowdown > 1.0:
            wanted = math.ceil((self.interval if interval is None else interval) * min(slowdown, MAX_SLOWDOWN))
        else:
            wanted = math.floor(self.interval * RECOVERY)
        self.interval = max(1, min(self._max_interval, longest, max(shortest, wanted)))
