"""Segmentation for the server: which boxes to segment, and outlines of their masks."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np

from moondream_cv.errors import MoondreamError
from moondream_cv.images import to_rgb
from moondream_cv.masks import MaskFunction, MaskRunner, svg_path
from moondream_cv.requests import DetectedObject

logger = logging.getLogger(__name__)

_MAX_MASK_PIXELS = 2**29  # in the masks of one call of the function

T = TypeVar("T")
Box = tuple[float, float, float, float]
Ref = tuple[float, ...]


@dataclass(frozen=True)
class Segment:
    """The outline of an object.

    Attributes:
        subpaths: Closed subpaths of an SVG path, in fractions of the width and the height of the box.
        box: Bounding box of the mask as fractions of the image: left, top, right, bottom.
    """

    subpaths: list[str]
    box: Box


class Segmenter:
    """Segments objects with a mask function.

    One daemon thread loads and runs the function, so the process can exit while the function is still working.
    """

    def __init__(self) -> None:
        """Start the thread; `load` creates a segmenter that can be used."""
        self._runner: MaskRunner | None = None
        self._jobs: SimpleQueue[tuple[Future[Any], list[Callable[[], Any]]] | None] = SimpleQueue()
        threading.Thread(target=self._run_jobs, name="moondream-cv masks", daemon=True).start()

    @classmethod
    async def load(cls, load_masks: Callable[[], MaskFunction]) -> Segmenter:
        """Return a segmenter with a loaded mask function.

        Args:
            load_masks: Function that loads the mask function, which is called as by `Detector`. Boxes without area are
                points on the object.

        Raises:
            ValueError: The loaded object is not a function.
            Exception: An error of `load_masks`.
        """
        segmenter = cls()
        try:
            segmenter._runner = await segmenter._submit(lambda: MaskRunner(load_masks()))
        except BaseException:
            segmenter.close()
            raise
        return segmenter

    def submit(self, image: Any, boxes: Sequence[Box]) -> asyncio.Future[Segment | None]:
        """Segment the objects in boxes, as one mask.

        Args:
            image: Image as `Engine.preprocess` returns it.
            boxes: At least one box, as fractions of the image.

        Returns:
            Future of the outline; None if the mask has no pixels. Cancelling it removes waiting work.
        """
        return self._submit(lambda: self._segment(image, boxes))

    def close(self) -> None:
        """Stop the thread after its work."""
        self._jobs.put(None)

    def _submit(self, work: Callable[[], T]) -> asyncio.Future[T]:
        future: Future[T] = Future()
        pending = [work]
        future.add_done_callback(lambda _: pending.clear())  # a canceled job stays in the queue, but without its image
        self._jobs.put((future, pending))
        return asyncio.wrap_future(future)

    def _run_jobs(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, pending = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = pending[0]()
            except BaseException as error:  # the thread must continue after each error
                future.set_exception(error)
            else:
                future.set_result(result)
            del job, future  # the future refers to an error, and so to the image

    def _segment(self, image: Any, boxes: Sequence[Box]) -> Segment | None:
        """Return the outline of the objects in boxes.

        Raises:
            MoondreamError: The mask function failed.
        """
        assert self._runner is not None
        rgb = image.rgb if hasattr(image, "rgb") else to_rgb(image)
        height, width = rgb.shape[:2]
        xyxy = np.clip(np.array(boxes), 0, 1) * (width, height, width, height)
        step = max(1, _MAX_MASK_PIXELS // (width * height))
        mask = np.zeros((height, width), dtype=np.bool_)
        try:
            for first in range(0, len(xyxy), step):  # several calls for large images, to limit the memory of masks
                # The function may change its image, and other requests use the original
                mask |= self._runner(rgb.copy(), xyxy[first : first + step]).any(axis=0)
        except Exception as error:  # a mask function can raise any error
            logger.exception("the segmentation model failed")
            raise MoondreamError("the segmentation model failed; see the server log") from error
        subpaths, (left, top, right, bottom) = svg_path(mask)
        return Segment(subpaths, (left / width, top / height, right / width, bottom / height)) if subpaths else None


def select_boxes(objects: Sequence[DetectedObject], refs: Sequence[Ref]) -> list[Box]:
    """Return the boxes to segment.

    Args:
        objects: Detected objects, as fractions of the image.
        refs: Points (x, y) and boxes (x_min, y_min, x_max, y_max) that the request gives, as fractions of the image.

    Returns:
        Without references, the box of the most confident object, if there is one. Otherwise the object of each
        reference, without repetitions: the smallest object around a point, or the object with the highest IoU of
        those with their center in a box. If there is none, the reference itself; a point is a box without area.
    """
    boxes = [(found.x_min, found.y_min, found.x_max, found.y_max) for found in objects]
    if not refs:
        best = max(range(len(objects)), key=lambda index: objects[index].confidence, default=None)
        return [] if best is None else [boxes[best]]
    chosen: list[Box] = []
    for ref in refs:
        if len(ref) == 2:
            x, y = ref
            around = [box for box in boxes if box[0] <= x <= box[2] and box[1] <= y <= box[3]]
            chosen.append(min(around, key=_area, default=(x, y, x, y)))
        else:
            region: Box = (ref[0], ref[1], ref[2], ref[3])
            inside = [box for box in boxes if _has_center(region, box)]
            chosen.append(max(inside, key=lambda box: _iou(box, region), default=region))
    return list(dict.fromkeys(chosen))


def _area(box: Box) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


def _has_center(region: Box, box: Box) -> bool:
    """Return whether the center of a box is in a region."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return region[0] <= x <= region[2] and region[1] <= y <= region[3]


def _iou(first: Box, second: Box) -> float:
    """Return the intersection over union of two boxes, 0 if both have no area."""
    lower, upper = np.maximum(first[:2], second[:2]), np.minimum(first[2:], second[2:])
    shared = _area((lower[0], lower[1], upper[0], upper[1]))
    union = _area(first) + _area(second) - shared
    return shared / union if union > 0 else 0.0
