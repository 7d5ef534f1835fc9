"""Filters for detections: minimum confidence, box size, box area and duplicates.

Each function returns the detections that pass, in their order and with all their data. Non-maximum suppression is
supervision's `with_nms`.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt
import supervision as sv


def scores(detections: sv.Detections) -> npt.NDArray[np.float32]:
    """Return the confidences as float32 [N]."""
    return np.asarray(detections.confidence, dtype=np.float32)


def filter_by_confidence(detections: sv.Detections, confidence: float) -> sv.Detections:
    """Return the detections with at least this confidence.

    Args:
        detections: Detections with confidences.
        confidence: Minimum confidence, between 0 and 1.
    """
    return _selected(detections, scores(detections) >= np.float32(confidence))


def filter_by_size(detections: sv.Detections, min_size: float) -> sv.Detections:
    """Return the boxes that have an area and whose shorter side has at least `min_size` pixels.

    Args:
        detections: Boxes in pixels.
        min_size: Minimum length of the shorter side in pixels.
    """
    sides = detections.xyxy[:, 2:] - detections.xyxy[:, :2]
    return _selected(detections, (sides > 0).all(axis=1) & (sides >= min_size).all(axis=1))


def filter_by_area(detections: sv.Detections, max_area: float, resolution_wh: tuple[int, int]) -> sv.Detections:
    """Return the boxes that cover at most a given fraction of the frame.

    Args:
        detections: Boxes in pixels, clipped to the frame.
        max_area: Maximum box area as a fraction of the frame area.
        resolution_wh: Width and height of the frame in pixels.
    """
    sides = (detections.xyxy[:, 2:] - detections.xyxy[:, :2]).astype(np.float64)
    return _selected(detections, (sides / resolution_wh).prod(axis=1) <= max_area)


def remove_duplicates(detections: sv.Detections) -> sv.Detections:
    """Keep the most confident one of detections with the same class and exactly the same box."""
    if len(detections) < 2:
        return detections
    best_first = np.argsort(-scores(detections), kind="stable")
    keys = np.column_stack([np.asarray(detections.class_id), detections.xyxy])[best_first]  # [N, 5]
    first = np.unique(keys, axis=0, return_index=True)[1]
    return cast(sv.Detections, detections[np.sort(best_first[first])])


def _selected(detections: sv.Detections, keep: npt.ArrayLike) -> sv.Detections:
    return cast(sv.Detections, detections[np.asarray(keep, dtype=np.bool_)])
