"""Tracks: the observations of one object on keyframes, and its motion.

Between two observations, a box moves in a straight line. After the last one, it continues at constant velocity.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Box = npt.NDArray[np.float64]  # [4] x_min, y_min, x_max, y_max in pixels

MIN_OBSERVATIONS = 8  # latest observations of a track that are kept, whatever their age
VELOCITY_SECONDS = 0.35  # period before an observation over which its velocity is averaged


class Observation(NamedTuple):
    """One detection of an object on a keyframe.

    Attributes:
        time: Time of the keyframe in seconds.
        box: [4] detected box in pixels.
        confidence: Confidence of the detection.
    """

    time: float
    box: Box
    confidence: float


@dataclass(eq=False)
class Track:
    """One object with its latest observations.

    Attributes:
        tracker_id: Track ID from 1, unique within the stream.
        class_id: Class ID of the object.
        observations: Latest observations, in order of time.
    """

    tracker_id: int
    class_id: int
    observations: deque[Observation] = field(default_factory=deque)

    def add(self, observation: Observation, history: float = 0.0) -> None:
        """Append an observation, and drop those older than `history` seconds except the last `MIN_OBSERVATIONS`."""
        self.observations.append(observation)
        while len(self.observations) > MIN_OBSERVATIONS and observation.time - self.observations[0].time > history:
            self.observations.popleft()

    @property
    def last(self) -> Observation:
        """Latest observation."""
        return self.observations[-1]

    def velocity(self, at: int = -1) -> npt.NDArray[np.float64]:
        """Return the velocity of the center at an observation.

        The first observation has the velocity towards the next one; the others have the velocity from the observations
        before them.

        Args:
            at: Index of the observation.

        Returns:
            [2] pixels per second; zeros if the track has one observation.
        """
        observations = list(self.observations)
        at = at % len(observations)
        if len(observations) == 1:
            return np.zeros(2)
        other = 1 if at == 0 else at - 1
        while 0 < other < at and observations[at].time - observations[other - 1].time <= VELOCITY_SECONDS:
            other -= 1
        elapsed = observations[at].time - observations[other].time
        if elapsed == 0:
            return np.zeros(2)
        shift = box_center(observations[at].box) - box_center(observations[other].box)
        velocity: npt.NDArray[np.float64] = shift / elapsed
        return velocity

    def around(self, time: float) -> tuple[int | None, int | None]:
        """Return the indices of the last observation up to a time and of the first one from that time on.

        An index is None if there is no such observation.
        """
        before = bisect_right(self.observations, time, key=lambda o: o.time) - 1
        after = bisect_left(self.observations, time, key=lambda o: o.time)
        return (before if before >= 0 else None), (after if after < len(self.observations) else None)

    def extrapolate(self, time: float, at: int = -1) -> Box:
        """Return the box at a time before or after an observation, assuming constant velocity.

        Args:
            time: Time in seconds.
            at: Index of the observation to start from.
        """
        observation = self.observations[at]
        shift = self.velocity(at) * (time - observation.time)
        box: Box = observation.box + np.concatenate((shift, shift))
        return box


def box_center(box: Box) -> npt.NDArray[np.float64]:
    """Return the center of a box, [2] x and y."""
    center: npt.NDArray[np.float64] = (box[:2] + box[2:]) / 2
    return center


def is_center_inside(box: Box, resolution_wh: tuple[int, int]) -> bool:
    """Return whether the center of a box is inside the frame."""
    x, y = box_center(box)
    return bool(0 <= x < resolution_wh[0] and 0 <= y < resolution_wh[1])
