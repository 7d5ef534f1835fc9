"""Where an object was seen, and where it is in between.

A track is what has been seen of one object on keyframes: frames on which a detector looked. Between two of them its box
moves in a straight line; after the last one it goes on as it went. How detections come to be one track is left to
`tracking.py`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Box = npt.NDArray[np.float64]  # [4] x_min, y_min, x_max, y_max in pixels

KEPT = 8  # last sightings of a track that are remembered, however old they are
SPEED_SPAN = 0.35  # seconds back from a sighting over which its speed is taken, or to the one before


class Sighting(NamedTuple):
    """An object on a keyframe.

    Attributes:
        time: In seconds.
        box: Where it was.
        confidence: Of the detection.
    """

    time: float
    box: Box
    confidence: float


@dataclass(eq=False)
class Track:
    """An object that has been seen once or more.

    Attributes:
        tracker_id: Its number, from 1, which no other object has.
        class_id: What it is.
        sightings: The last of them, in the order of time.
    """

    tracker_id: int
    class_id: int
    sightings: deque[Sighting] = field(default_factory=deque)

    def add(self, sighting: Sighting, history: float = 0.0) -> None:
        """Append a sighting, and drop those that are neither among the last `KEPT` nor within `history` seconds."""
        self.sightings.append(sighting)
        while len(self.sightings) > KEPT and sighting.time - self.sightings[0].time > history:
            self.sightings.popleft()

    @property
    def last(self) -> Sighting:
        return self.sightings[-1]

    def velocity(self, at: int = -1) -> npt.NDArray[np.float64]:
        """[2] pixels a second of its centre at a sighting; 0 where it has been seen just once.

        At the first sighting it is taken from what follows, at others from what was before.
        """
        seen = list(self.sightings)
        at = at % len(seen)
        if len(seen) == 1:
            return np.zeros(2)
        other = 1 if at == 0 else at - 1
        while 0 < other < at and seen[at].time - seen[other - 1].time <= SPEED_SPAN:
            other -= 1
        elapsed = seen[at].time - seen[other].time
        if elapsed == 0:
            return np.zeros(2)
        velocity: npt.NDArray[np.float64] = (centre(seen[at].box) - centre(seen[other].box)) / elapsed
        return velocity

    def around(self, time: float) -> tuple[int | None, int | None]:
        """Numbers of the last sighting up to a time and of the first one from it on; None where there is none."""
        before = bisect_right(self.sightings, time, key=lambda s: s.time) - 1
        after = bisect_left(self.sightings, time, key=lambda s: s.time)
        return (before if before >= 0 else None), (after if after < len(self.sightings) else None)

    def moved(self, time: float, at: int = -1) -> Box:
        """Its box at another time, had it gone on from a sighting, or come to it, in a straight line."""
        sighting = self.sightings[at]
        shift = self.velocity(at) * (time - sighting.time)
        box: Box = sighting.box + np.concatenate((shift, shift))
        return box


def centre(box: Box) -> npt.NDArray[np.float64]:
    """[2] x and y."""
    middle: npt.NDArray[np.float64] = (box[:2] + box[2:]) / 2
    return middle


def within(box: Box, resolution_wh: tuple[int, int]) -> bool:
    """Whether a box's centre lies in the frame."""
    x, y = centre(box)
    return bool(0 <= x < resolution_wh[0] and 0 <= y < resolution_wh[1])
