"""Masks of detected objects: calls of a mask function, checks of its result, and outlines of masks.

A mask function segments the objects in boxes of an image, see `MaskFunction`. `moondream_cv.sam.SamMasks` is one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt

from moondream_cv.images import ImageInput, to_rgb

if TYPE_CHECKING:
    import supervision as sv

MaskFunction = Callable[[npt.NDArray[np.uint8], npt.NDArray[np.float32]], Any]
"""Function `(image, xyxy) -> masks` that segments the objects in boxes.

`image` is upright RGB [H, W, 3], uint8. `xyxy` are boxes [n, 4] in pixels, float32, with n > 0. `masks` [n, H, W] are
bool, or numbers that are 0 or 1, as a NumPy array or a PyTorch tensor.
"""

_TOLERANCE = 0.75  # pixels between an outline and its simplification
_DECIMALS = 4  # in the coordinates in a path


class MaskRunner:
    """Runs a mask function for one thread at a time, because models of other libraries may not be thread-safe.

    It can be pickled if its function can.
    """

    def __init__(self, function: MaskFunction) -> None:
        """Use a mask function.

        Raises:
            ValueError: The function is not callable.
        """
        if not callable(function):
            raise ValueError(
                f"masks must be a function (image, xyxy) -> masks, got {type(function).__name__}: {function!r:.100}; "
                "for SAM 2, use moondream_cv.sam.SamMasks"
            )
        self.function = function
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.function,)

    def __call__(self, image: npt.NDArray[np.uint8], xyxy: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Return a mask for each box.

        Args:
            image: Upright RGB pixels [H, W, 3]. The function may change them.
            xyxy: Boxes [n, 4] in pixels, with n > 0. The function gets a copy.

        Returns:
            Masks [n, H, W], in newly allocated memory.

        Raises:
            ValueError: The function returns something other than n masks of the size of the image.
            Exception: An error of the function.
        """
        with self._lock:  # includes the copy, because the function may use the same memory again
            masks = self.function(image, np.array(xyxy, dtype=np.float32, order="C"))
            return _copy_masks(masks, (len(xyxy), *image.shape[:2]))

    def add_masks(self, detections: sv.Detections, image: ImageInput, resolution_wh: tuple[int, int]) -> None:
        """Set the masks of the objects in an image. The function is not called if there are no objects.

        Args:
            detections: Objects in the image; `mask` [N, H, W] is set.
            image: The image.
            resolution_wh: Width and height of the image in pixels.

        Raises:
            ValueError: The function returns something other than n masks of the size of the image.
            Exception: An error of the function.
        """
        width, height = resolution_wh
        if len(detections):
            detections.mask = self(to_rgb(image), detections.xyxy)
        else:
            detections.mask = np.zeros((0, height, width), dtype=np.bool_)


def _copy_masks(masks: Any, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Return the result of a mask function as a new bool array.

    Raises:
        ValueError: The result has another shape, or values other than 0 and 1.
    """
    # Check the shape
    if isinstance(masks, (list, tuple)):
        masks = [_to_array(mask) for mask in masks]
        matches = len(masks) == shape[0] and all(mask.shape == shape[1:] for mask in masks)
        received = f"{len(masks)} masks with the shapes {sorted({mask.shape for mask in masks})!r:.100}"
    elif hasattr(masks, "shape"):
        matches, received = tuple(masks.shape) == shape, f"shape {tuple(masks.shape)}"
    else:
        matches, received = False, type(masks).__name__
    if not matches:
        raise ValueError(
            f"the mask function must return one mask of the image size per box, so an array of shape {shape}, got "
            f"{received}"
        )

    # Copy one mask at a time, to save memory
    copied = np.empty(shape, dtype=np.bool_)
    for target, mask in zip(copied, masks, strict=True):
        array = _to_array(mask)
        if array.dtype != np.bool_ and (array.dtype.kind not in "uif" or not ((array == 0) | (array == 1)).all()):
            raise ValueError(
                f"the mask function must return bool masks, or masks of 0 and 1, got {array.dtype} with other values; "
                "compare scores or logits with a threshold"
            )
        target[...] = array
    return copied


def _to_array(mask: Any) -> npt.NDArray[Any]:
    """Return an array or a PyTorch tensor as a NumPy array."""
    if hasattr(mask, "detach"):
        tensor = mask.detach().cpu()
        mask = (tensor.float() if tensor.is_floating_point() else tensor).numpy()  # NumPy has no bfloat16
    return np.asarray(mask)


def outlines(mask: npt.NDArray[np.bool_]) -> list[npt.NDArray[np.float64]]:
    """Return the simplified outlines of a mask, both of its parts and of their holes.

    A filled polygon of all outlines covers the mask, with an error of less than a pixel. Holes have the opposite
    orientation, so both SVG fill rules leave them out.

    Args:
        mask: Mask [H, W].

    Returns:
        Polygons [k, 2] of x and y in pixels, where a pixel covers the interval from its index to its index + 1.
    """
    # With four values per pixel, outlines run between the centers of pixels
    left, top, width, height = cv2.boundingRect(mask.view(np.uint8))
    crop = mask[top : top + height, left : left + width].view(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours = cv2.findContours(crop, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)[0] if crop.size else ()

    # Simplify, and convert to pixels of the image
    polygons = []
    for contour in contours:
        simple = cv2.approxPolyDP(contour, 2 * _TOLERANCE, closed=True)
        points = (simple if len(simple) > 2 else contour)[:, 0]
        polygons.append((points + 0.5) / 2 + (left, top))
    return polygons


def svg_path(mask: npt.NDArray[np.bool_]) -> tuple[list[str], tuple[int, int, int, int]]:
    """Return the outlines of a mask as an SVG path, relative to the bounding box of the mask.

    Coordinates in the path are fractions of the width and the height of the box, as in the engine of Moondream's own
    segmentation (`kestrel`, `bitmap_to_path`).

    Args:
        mask: Mask [H, W].

    Returns:
        The closed subpaths, such as "M 0 0.5 L 1 0 L 1 1 Z", which are joined by spaces, and the bounding box in
        pixels: left, top, right, bottom. For a mask without pixels, there are no subpaths, and the box has no area.
    """
    left, top, width, height = cv2.boundingRect(mask.view(np.uint8))
    subpaths = []
    for polygon in outlines(mask):
        relative = np.round((polygon - (left, top)) / (width, height), _DECIMALS)
        subpaths.append("M " + " L ".join(f"{x:g} {y:g}" for x, y in relative.tolist()) + " Z")
    return subpaths, (left, top, left + width, top + height)
