"""Re-association of lost tracks: an object that reappears keeps its track ID.

An object that was occluded is expected on its extrapolated path. An object that left the frame is expected at the edge
where it left. Appearance is not compared: box sizes are unreliable at the edge of the frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from moondream_cv.video.tracking.tracks import Box, Track, box_center

MAX_OCCLUSION = 3.0  # seconds for which an object inside the frame can be occluded
DRIFT = 0.08  # frame diagonals per second by which an object may deviate from its path, in addition to its own speed
MAX_EXTRAPOLATION = 1.0  # seconds for which a lost track is extrapolated
MAX_EDGE_SHIFT = 0.5  # maximum distance between leaving and returning, as a share of the edge
EDGE_MARGIN = 0.011  # frame diagonals: a box this close to an edge touches it
ENTRY_SPEED = 0.12  # frame diagonals per second that an object may have moved inwards since the previous keyframe

_NO_MATCH = 1e3


def match_lost_tracks(
    lost: Sequence[Track], boxes: Sequence[Box], time: float, interval: float, resolution_wh: tuple[int, int]
) -> dict[int, Track]:
    """Match lost tracks to new detections of the same class.

    Args:
        lost: Tracks of one class without a detection on this keyframe.
        boxes: [4] boxes of that class that continue no track.
        time: Time of the keyframe in seconds.
        interval: Seconds since the previous keyframe.
        resolution_wh: Width and height of the frame.

    Returns:
        The matched track for each index of a box. Each track is matched at most once.
    """
    if not lost or not boxes:
        return {}
    costs = np.array([[_cost(track, box, time, interval, resolution_wh) for track in lost] for box in boxes])
    pairs = zip(*linear_sum_assignment(np.minimum(costs, _NO_MATCH)), strict=True)
    return {int(box): lost[track] for box, track in pairs if costs[box, track] < 1.0}


def _cost(track: Track, box: Box, time: float, interval: float, resolution_wh: tuple[int, int]) -> float:
    """Return the distance between a box and the expected place of a track, as a share of the maximum distance."""
    diagonal = float(np.hypot(*resolution_wh))
    gap = time - track.last.time
    velocity = track.velocity()
    cost = np.inf

    # Occluded inside the frame
    if gap <= MAX_OCCLUSION:
        width, height = track.last.box[2:] - track.last.box[:2]
        expected = box_center(track.last.box) + velocity * min(gap, MAX_EXTRAPOLATION)
        allowed = np.sqrt(max(width * height, 1.0)) + 0.7 * gap * (np.hypot(*velocity) + DRIFT * diagonal)
        cost = float(np.hypot(*(box_center(box) - expected)) / allowed)

    # Left the frame and returned at the same edge
    margin = diagonal * (EDGE_MARGIN + ENTRY_SPEED * interval)
    left_by = _touched_edges(track.extrapolate(track.last.time + 1.5 * interval), margin, resolution_wh)
    for edge in np.flatnonzero(left_by & _touched_edges(box, margin, resolution_wh)):
        axis = 1 - edge % 2  # the axis parallel to this edge
        distance = abs(box_center(box)[axis] - box_center(track.last.box)[axis])
        cost = min(cost, float(distance / (MAX_EDGE_SHIFT * resolution_wh[axis])))
    return cost


def _touched_edges(box: Box, margin: float, resolution_wh: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Return whether a box is within a margin of the left, top, right and bottom edge of the frame, [4]."""
    width, height = resolution_wh
    return np.array([box[0] < margin, box[1] < margin, box[2] > width - margin, box[3] > height - margin])
