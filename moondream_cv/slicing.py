"""Detection in overlapping slices of an image, for small objects in large images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import supervision as sv

from moondream_cv import postprocessing
from moondream_cv.detector import Detector
from moondream_cv.masks import MaskFunction, MaskRunner

_SLICER_IOU = 0.5  # supervision's default for boxes of neighboring slices
_SLICES_AT_ONCE = 8


def with_slices(
    detector: Detector, size: int, nms: float | None, max_area: float | None, masks: MaskFunction | None = None
) -> Callable[[Any, list[str]], sv.Detections]:
    """Return a function that detects in overlapping slices of an RGB image, with supervision's slicer.

    Args:
        detector: Detector to run on each slice.
        size: Width and height of a slice in pixels; slices overlap by a fifth of it.
        nms: Maximum overlap of boxes of a class, as a fraction of the smaller box; None for supervision's default, 0.5.
        max_area: Maximum fraction of the whole image that a box may cover.
        masks: Function that segments the objects in the boxes of the whole image, as for `Detector`.
    """
    runner = None if masks is None else MaskRunner(masks)

    def find(image: Any, names: list[str]) -> sv.Detections:
        slicer = sv.InferenceSlicer(
            partial(detector, classes=names),
            slice_wh=size,
            overlap_wh=size // 5,
            overlap_metric=sv.OverlapMetric.IOS,  # a slice may contain only a part of an object
            iou_threshold=_SLICER_IOU if nms is None else nms,
            batch_size=_SLICES_AT_ONCE,
        )
        found = slicer(np.ascontiguousarray(np.asarray(image)[..., ::-1]))
        if not len(found):  # the slicer drops the keys of `data`
            found.data = {"class_name": np.array([], dtype=np.str_), "truncated": np.array([], dtype=np.bool_)}
        if max_area is not None:
            found = postprocessing.filter_by_area(found, max_area, image.size)
        if runner is not None:
            runner.add_masks(found, image, image.size)
        return found

    return find
