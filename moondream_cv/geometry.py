"""Coordinate conventions and conversions: boxes and points in pixels, or as fractions of the frame.

Pixel coordinates are continuous: x increases to the right from 0 to width, y increases downward from 0 to height, and
the pixel in column i covers [i, i + 1]. `xyxy` is left, top, right, bottom; `xcycwh` is center x, center y, width,
height; `xy` is a point. `resolution_wh` is (width, height) in pixels, as in supervision.

Every function accepts arrays of any leading shape, including empty ones, and returns a new array of the same shape.
float64 stays float64; other types become float32. NaN and infinity raise. Corners are never swapped, so the conversions
are inverses up to rounding; only `clip_xyxy` loses information.
"""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.floating[Any]]


def xyxy_to_xcycwh(xyxy: npt.ArrayLike) -> FloatArray:
    """Convert corners to center and size.

    Args:
        xyxy: Boxes [..., 4] as left, top, right, bottom, in any unit.

    Returns:
        Boxes [..., 4] as center x, center y, width, height, in the same unit.

    Raises:
        ValueError: The last dimension is not 4, or a value is not finite.
    """
    boxes = _coordinates(xyxy, 4, "xyxy")
    top_left, bottom_right = boxes[..., :2], boxes[..., 2:]
    return np.concatenate([(top_left + bottom_right) / 2, bottom_right - top_left], axis=-1)


def xcycwh_to_xyxy(xcycwh: npt.ArrayLike) -> FloatArray:
    """Convert center and size to corners.

    Args:
        xcycwh: Boxes [..., 4] as center x, center y, width, height, in any unit.

    Returns:
        Boxes [..., 4] as left, top, right, bottom, in the same unit.

    Raises:
        ValueError: The last dimension is not 4, or a value is not finite.
    """
    boxes = _coordinates(xcycwh, 4, "xcycwh")
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    return np.concatenate([center - half, center + half], axis=-1)


def denormalize_xyxy(xyxy: npt.ArrayLike, resolution_wh: tuple[int, int]) -> FloatArray:
    """Convert boxes from fractions of the frame to pixels.

    Args:
        xyxy: Boxes [..., 4] as left, top, right, bottom, as fractions (1.0 is the right or the bottom edge).
        resolution_wh: Width and height of the frame in pixels.

    Returns:
        Boxes [..., 4] as left, top, right, bottom, in pixels, not clipped.

    Raises:
        ValueError: The last dimension is not 4, a value is not finite, or the resolution is not positive.
    """
    boxes = _coordinates(xyxy, 4, "xyxy")
    return boxes * np.tile(_scale(resolution_wh, boxes), 2)


def normalize_xyxy(xyxy: npt.ArrayLike, resolution_wh: tuple[int, int]) -> FloatArray:
    """Convert boxes from pixels to fractions of the frame.

    Args:
        xyxy: Boxes [..., 4] as left, top, right, bottom, in pixels.
        resolution_wh: Width and height of the frame in pixels.

    Returns:
        Boxes [..., 4] as left, top, right, bottom, as fractions (1.0 is the right or the bottom edge), not clipped.

    Raises:
        ValueError: The last dimension is not 4, a value is not finite, or the resolution is not positive.
    """
    boxes = _coordinates(xyxy, 4, "xyxy")
    return boxes / np.tile(_scale(resolution_wh, boxes), 2)


def denormalize_xy(xy: npt.ArrayLike, resolution_wh: tuple[int, int]) -> FloatArray:
    """Convert points from fractions of the frame to pixels.

    Args:
        xy: Points [..., 2] as x, y, as fractions (1.0 is the right or the bottom edge).
        resolution_wh: Width and height of the frame in pixels.

    Returns:
        Points [..., 2] as x, y, in pixels, not clipped.

    Raises:
        ValueError: The last dimension is not 2, a value is not finite, or the resolution is not positive.
    """
    points = _coordinates(xy, 2, "xy")
    return points * _scale(resolution_wh, points)


def normalize_xy(xy: npt.ArrayLike, resolution_wh: tuple[int, int]) -> FloatArray:
    """Convert points from pixels to fractions of the frame.

    Args:
        xy: Points [..., 2] as x, y, in pixels.
        resolution_wh: Width and height of the frame in pixels.

    Returns:
        Points [..., 2] as x, y, as fractions (1.0 is the right or the bottom edge), not clipped.

    Raises:
        ValueError: The last dimension is not 2, a value is not finite, or the resolution is not positive.
    """
    points = _coordinates(xy, 2, "xy")
    return points / _scale(resolution_wh, points)


def clip_xyxy(xyxy: npt.ArrayLike, resolution_wh: tuple[int, int]) -> FloatArray:
    """Clip boxes to the frame.

    Args:
        xyxy: Boxes [..., 4] as left, top, right, bottom, in pixels.
        resolution_wh: Width and height of the frame in pixels; (1, 1) clips fractions of the frame.

    Returns:
        Boxes [..., 4] in pixels, with x in [0, width] and y in [0, height]; a box outside the frame has no area.

    Raises:
        ValueError: The last dimension is not 4, a value is not finite, or the resolution is not positive.
    """
    boxes = _coordinates(xyxy, 4, "xyxy")
    return np.clip(boxes, 0, np.tile(_scale(resolution_wh, boxes), 2))


def _coordinates(values: npt.ArrayLike, size: int, name: str) -> FloatArray:
    array = np.asarray(values)
    if array.ndim == 0 or array.shape[-1] != size:
        raise ValueError(f"{name} must have the shape [..., {size}], got {array.shape}")
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} must be numeric, got dtype {array.dtype}")
    # float16 cannot represent every pixel coordinate above 2048
    floats: FloatArray = array.astype(np.float64 if array.dtype == np.float64 else np.float32)
    if not np.isfinite(floats).all():
        raise ValueError(f"{name} must be finite, got {floats[~np.isfinite(floats).all(axis=-1)][0]}")
    return floats


def _scale(resolution_wh: tuple[int, int], like: FloatArray) -> FloatArray:
    scale = np.asarray(resolution_wh)
    if scale.shape != (2,) or scale.dtype.kind not in "fiu" or not (np.isfinite(scale) & (scale > 0)).all():
        raise ValueError(f"resolution_wh must be a positive (width, height), got {resolution_wh!r:.100}")
    return scale.astype(like.dtype)
