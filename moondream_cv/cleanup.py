"""What `Detector` and `Pointer` leave out of a model's reply where asked to: each function returns fewer detections.

They keep the order, and everything that a detection carries. Which of them apply is the business of
`moondream_cv.detector`; suppression of overlapping boxes is supervision's `with_nms`.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt
import supervision as sv


def scores(detections: sv.Detections) -> npt.NDArray[np.float32]:
    """Confidences, float32 [N]."""
    return np.asarray(detections.confidence, dtype=np.float32)


def without_unsure(detections: sv.Detections, confidence: float) -> sv.Detections:
    """Leave out detections whose confidence is lower."""
    return _kept(detections, scores(detections) >= np.float32(confidence))


def without_thin(detections: sv.Detections, min_size: float) -> sv.Detections:
    """Leave out boxes of which a side is shorter than `min_size` pixels, and those without area."""
    sides = detections.xyxy[:, 2:] - detections.xyxy[:, :2]
    return _kept(detections, (sides > 0).all(axis=1) & (sides >= min_size).all(axis=1))


def without_frame_filling(detections: sv.Detections, max_area: float, resolution_wh: tuple[int, int]) -> sv.Detections:
    """Leave out boxes that cover more of the frame than a share.

    Args:
        detections: Boxes in pixels, within the frame.
        max_area: The share, 0..1.
        resolution_wh: Width and height of the frame in pixels.
    """
    sides = (detections.xyxy[:, 2:] - detections.xyxy[:, :2]).astype(np.float64)
    return _kept(detections, (sides / resolution_wh).prod(axis=1) <= max_area)


def without_duplicates(detections: sv.Detections) -> sv.Detections:
    """Of detections with the same class and exactly the same box, keep the most confident one."""
    if len(detections) < 2:
        return detections
    best_first = np.argsort(-scores(detections), kind="stable")
    rows = np.column_stack([np.asarray(detections.class_id), detections.xyxy])[best_first]
    first = np.unique(rows, axis=0, return_index=True)[1]
    return cast(sv.Detections, detections[np.sort(best_first[first])])


def _kept(detections: sv.Detections, keep: npt.ArrayLike) -> sv.Detections:
    return cast(sv.Detections, detections[np.asarray(keep, dtype=np.bool_)])
