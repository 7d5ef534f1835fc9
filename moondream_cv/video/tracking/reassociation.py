"""Which of the objects that were lost is the one that has just been found: it keeps its number.

An object that was hidden for a moment is where its way would have led it. One that left the frame mostly comes back at
the side where it left, and not far along it from there. Nothing else is looked at: neither size, of which little shows
at the edge of a frame, nor colour.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from moondream_cv.video.tracking.tracks import Box, Track, centre

HIDDEN = 3.0  # seconds for which an object within the frame is expected back
DRIFT = 0.08  # of the frame's diagonal in a second: how fast an object strays from its way, beside its own speed
WAY = 1.0  # seconds for which a lost object is taken to have gone straight on
ALONG = 0.5  # of a side's length: how far from where it left an object may come back
EDGE = 0.011  # of the diagonal: what lies so near an edge touches it, be it
ENTRY = 0.12  # of the diagonal in a second further away, as it may have come in since the keyframe before

_NEVER = 1e3


def match_returning(
    lost: Sequence[Track], found: Sequence[Box], time: float, interval: float, resolution_wh: tuple[int, int]
) -> dict[int, Track]:
    """Say which lost tracks go on as which new finds of their class.

    Args:
        lost: Tracks of one class that the tracker has given up, or that had no find on this keyframe.
        found: Boxes of that class that continue no track.
        time: Of this keyframe, in seconds.
        interval: Seconds since the keyframe before.
        resolution_wh: Of the frame.

    Returns:
        The number of a find → its track; no track twice.
    """
    if not lost or not found:
        return {}
    costs = np.array([[_cost(track, box, time, interval, resolution_wh) for track in lost] for box in found])
    rows, columns = linear_sum_assignment(np.minimum(costs, _NEVER))
    return {int(row): lost[column] for row, column in zip(rows, columns, strict=True) if costs[row, column] < 1.0}


def _cost(track: Track, box: Box, time: float, interval: float, resolution_wh: tuple[int, int]) -> float:
    """How far a find is from where it is expected, as a share of what is allowed."""
    diagonal = float(np.hypot(*resolution_wh))
    gap = time - track.last.time
    velocity = track.velocity()
    cost = np.inf
    if gap <= HIDDEN:
        width, height = track.last.box[2:] - track.last.box[:2]
        expected = centre(track.last.box) + velocity * min(gap, WAY)
        allowed = np.sqrt(max(width * height, 1.0)) + 0.7 * gap * (np.hypot(*velocity) + DRIFT * diagonal)
        cost = float(np.hypot(*(centre(box) - expected)) / allowed)
    margin = diagonal * (EDGE + ENTRY * interval)
    left_by = _edges(track.moved(track.last.time + 1.5 * interval), margin, resolution_wh)
    for side in np.flatnonzero(left_by & _edges(box, margin, resolution_wh)):
        along = 1 - side % 2  # the coordinate that runs along this side
        away = abs(centre(box)[along] - centre(track.last.box)[along])
        cost = min(cost, float(away / (ALONG * resolution_wh[along])))
    return cost


def _edges(box: Box, margin: float, resolution_wh: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """[4] whether a box comes near the left, upper, right and lower edge of the frame."""
    width, height = resolution_wh
    return np.array([box[0] < margin, box[1] < margin, box[2] > width - margin, box[3] > height - margin])
