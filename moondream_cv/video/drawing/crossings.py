"""Line crossings of tracked boxes, counted once even if the boxes jitter.

`sv.LineZone` compares the sign of the distance to the line. It counts a box that jitters on the line repeatedly, unless
a crossing must last for more frames than the jitter. It misses a track that is lost for two frames on the line, and
counts a track that walks around the end of the line. `LineCrossings` requires a distance instead. A track gets a side
when it is clear of the line, and crosses when it is clear on the other side, if its path intersects the line. The
distance doubles with every crossing of the same track, so that larger jitter does not keep counting.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import supervision as sv

MAX_TRACKS = 10_000  # beyond that, the tracks that were updated least recently are forgotten
_MAX_DOUBLINGS = 10
_COORDINATE_STEPS = 512  # double steps of the model's coordinates; smaller movements are rounding errors


@dataclass
class _Track:
    """State of one track at one line.

    Attributes:
        along: Position along the line at the last observation, in pixels from its start.
        across: Distance from the line at the last observation, in pixels; positive on the left.
        side: 1 on the left, -1 on the right, 0 before the track was clear of the line.
        run: Number of consecutive observations clear of the line on the other side.
        crossings: Number of crossings.
        changes: Number of sign changes of `across`.
        through: Whether the path intersected the line between its ends at the last sign change.
    """

    along: float
    across: float
    side: int = 0
    run: int = 0
    crossings: int = 0
    changes: int = 0
    through: bool = False

    def move(self, along: float, across: float, length: float) -> None:
        """Set the next position, and update the intersection of the path with the line.

        Args:
            along: Position along the line in pixels.
            across: Distance from the line in pixels.
            length: Length of the line in pixels.
        """
        if (across > 0) != (self.across > 0):
            share = self.across / (self.across - across)
            self.changes += 1
            self.through = 0 <= self.along + share * (along - self.along) <= length
        self.along, self.across = along, across

    def cross(self, clear: int, threshold: int) -> int:
        """Return 1 for a crossing to the left, -1 for a crossing to the right, and 0 for none.

        Args:
            clear: Side on which the box is clear of the line, 1 or -1; 0 if it touches the line.
            threshold: Number of consecutive observations on the new side for a crossing.
        """
        if not clear:
            return 0
        if not self.side:
            # A track that starts on the line has crossed if it moved straight to the other side.
            self.side = -clear if self.changes == 1 else clear
        if clear == self.side:
            self.run = 0
            return 0
        self.run += 1
        if self.run < threshold:
            return 0
        self.side, self.run = clear, 0
        if not self.through:
            return 0
        self.crossings += 1
        return clear


class LineCrossings:
    """Detects the boxes that cross a line in a stream of frames of one size."""

    def __init__(
        self,
        points: npt.NDArray[np.float64],
        resolution_wh: tuple[int, int],
        *,
        anchors: Sequence[sv.Position],
        threshold: int,
        distance: float,
    ) -> None:
        """Prepare a line.

        Args:
            points: [2, 2] start and end in pixels, which differ.
            resolution_wh: Width and height of the frames.
            anchors: Points of a box that must all be on one side for the box to be on that side.
            threshold: Number of consecutive observations on the new side for a crossing.
            distance: Distance that a box must have from the line, as a fraction of its size across the line. It is at
                least two steps of the model's coordinates and at most half the distance to the edge of the frame. It
                doubles with every crossing of a track, up to the size of the box. 0 for no distance.
        """
        self._start, (dx, dy) = points[0], points[1] - points[0]
        self._length = float(np.hypot(dx, dy))
        self._direction = np.array([dx, dy]) / self._length
        self._normal = np.array([dy, -dx]) / self._length  # to the left of the direction: y points down
        self._anchors, self._threshold, self._distance = tuple(anchors), threshold, distance
        width, height = resolution_wh
        corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float64)
        reach = (corners - self._start) @ self._normal
        self._limits = max(0.0, float(reach.max())) / 2, max(0.0, -float(reach.min())) / 2  # left and right
        self._min_margin = max(resolution_wh) / _COORDINATE_STEPS if distance else 0.0
        self._tracks: OrderedDict[int, _Track] = OrderedDict()

    def update(
        self, xyxy: npt.NDArray[np.float64], ids: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Return which boxes have just crossed the line to the left, and which to the right.

        Args:
            xyxy: [N, 4] boxes in pixels.
            ids: [N] track IDs; boxes with a negative ID are ignored.

        Returns:
            Two masks, [N] each. A crossing is reported once, on the frame that completes it.
        """
        crossed = np.zeros(len(xyxy), np.int64)
        rows = np.flatnonzero(ids >= 0)
        if not len(rows):
            return crossed > 0, crossed < 0
        boxes = sv.Detections(xyxy[rows])
        offsets = (
            np.stack([boxes.get_anchors_coordinates(anchor) for anchor in self._anchors]) - self._start
        )  # [A, N, 2]
        along, across = (offsets @ self._direction).mean(0), offsets @ self._normal  # [N], [A, N]
        sizes = (boxes.xyxy[:, 2:] - boxes.xyxy[:, :2]) @ np.abs(self._normal)
        for index, at, away, size in zip(rows, along, across.T, sizes, strict=True):
            track = self._track(int(ids[index]), float(at), float(away.mean()))
            margin = self._margin(float(size), track.crossings)
            left, right = away.min() > min(margin, self._limits[0]), away.max() <= -min(margin, self._limits[1])
            crossed[index] = track.cross(int(left) - int(right), self._threshold)
        while len(self._tracks) > MAX_TRACKS + len(rows):
            self._tracks.popitem(last=False)
        return crossed > 0, crossed < 0

    def _margin(self, size: float, crossings: int) -> float:
        """Return the distance in pixels that a box must have from the line, for its size across the line."""
        margin = max(self._distance * size, self._min_margin)
        return min(margin * 2 ** min(crossings, _MAX_DOUBLINGS), max(margin, size))

    def _track(self, number: int, along: float, across: float) -> _Track:
        track = self._tracks.get(number)
        if track is None:
            self._tracks[number] = track = _Track(along, across)
        else:
            self._tracks.move_to_end(number)
            track.move(along, across, self._length)
        return track
