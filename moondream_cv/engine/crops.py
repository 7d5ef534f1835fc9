"""Crops of an RGB image, the inputs of the vision encoder.

The global crop shows the whole image. An image larger than the usable window of a crop is also cut into overlapping
local crops. Resizing uses Pillow's Lanczos filter, so the crops equal those of the published implementation without
libvips byte for byte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from moondream_cv.model.config import VisionConfig

WINDOW = 8  # side in pixels of the squares that `largest_differences` averages: about half a patch
STEP = 2  # distance between these squares in pixels
MIN_PIXELS_FOR_THREADS = 500_000  # about 5 ms of resizing; for less, starting a thread may take as long


@dataclass(frozen=True)
class Crops:
    """The crops of one image.

    Attributes:
        pixels: [1 + rows · columns, crop_size, crop_size, 3] uint8 RGB: the global crop, then local crops row by row.
        tiling: (rows, columns) of local crops.
    """

    pixels: np.ndarray
    tiling: tuple[int, int]


def cut_all(
    frames: Sequence[np.ndarray], config: VisionConfig, max_crops: int | None = None, threads: int = 1
) -> list[Crops]:
    """Cut several frames into crops, in parallel.

    Pillow resizes on one core and releases the GIL. For small models, resizing takes most of the time per image.

    Args:
        frames: Images of any sizes, each [H, W, 3] uint8 RGB.
        config: Sizes of the crops.
        max_crops: Maximum number of local crops per frame; None: the number the model was trained with.
        threads: Maximum number of threads; a single frame uses up to two.
    """
    if threads < 2 or sum(rgb.shape[0] * rgb.shape[1] for rgb in frames) < MIN_PIXELS_FOR_THREADS:
        return [cut_crops(rgb, config, max_crops) for rgb in frames]
    with ThreadPoolExecutor(min(threads, len(frames))) as pool:
        if len(frames) == 1:
            return [cut_crops(frames[0], config, max_crops, pool)]
        return list(pool.map(lambda rgb: cut_crops(rgb, config, max_crops), frames))


def cut_crops(
    rgb: np.ndarray, config: VisionConfig, max_crops: int | None = None, pool: Executor | None = None
) -> Crops:
    """Resize an image to a whole number of overlapping windows and cut it.

    Args:
        rgb: [H, W, 3] uint8 RGB.
        config: Sizes of a crop, its patches and the overlap.
        max_crops: Maximum number of local crops; None: the number the model was trained with.
        pool: Resizes the global crop while the calling thread resizes the local ones.

    Raises:
        ValueError: `max_crops` is not positive.
    """
    rows, columns = tiling_of(rgb.shape[0], rgb.shape[1], config, max_crops)
    size, margin = config.crop_size, 2 * config.overlap_margin * config.enc_patch_size
    window = size - margin
    pixels = np.empty((1 + rows * columns, size, size, 3), np.uint8)
    if (rows, columns) == (1, 1):  # the only local crop equals the global one
        pixels[:] = resize_with_pillow(rgb, size, size)
        return Crops(pixels, (1, 1))
    whole = None if pool is None else pool.submit(resize_with_pillow, rgb, size, size)
    resized = resize_with_pillow(rgb, columns * window + margin, rows * window + margin)
    pixels[0] = resize_with_pillow(rgb, size, size) if whole is None else whole.result()
    for i in range(rows * columns):
        top, left = (i // columns) * window, (i % columns) * window
        pixels[1 + i] = resized[top : top + size, left : left + size]
    return Crops(pixels, (rows, columns))


def tiling_of(height: int, width: int, config: VisionConfig, max_crops: int | None = None) -> tuple[int, int]:
    """Return the (rows, columns) of local crops of an image.

    Args:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        config: Sizes of a crop, its patches and the overlap.
        max_crops: Maximum number of local crops; None: the number the model was trained with.

    Raises:
        ValueError: `max_crops` is not positive.
    """
    limit = config.max_crops if max_crops is None else max_crops
    if limit < 1:
        raise ValueError(f"max_crops must be at least 1, got {max_crops}")
    margin = 2 * config.overlap_margin * config.enc_patch_size
    return select_tiling(height - margin, width - margin, config.crop_size - margin, limit)


def select_tiling(height: int, width: int, window: int, max_crops: int) -> tuple[int, int]:
    """Choose the numbers of rows and columns of local crops.

    If either side fits into a window, there is one tile. Otherwise there are up to `max_crops` tiles in approximately
    the aspect ratio of the image. Only images with an aspect ratio above about 10 get more tiles, in a single row or
    column, as in the published tiling.

    Args:
        height: Height of the image without the margins, in pixels.
        width: Width of the image without the margins, in pixels.
        window: Side of a crop without the margins, in pixels.
        max_crops: Maximum number of local crops.

    Returns:
        (rows, columns).
    """
    if height <= window or width <= window:
        return 1, 1
    min_rows, min_columns = math.ceil(height / window), math.ceil(width / window)
    if min_rows * min_columns > max_crops:
        ratio = math.sqrt(max_crops / (min_rows * min_columns))
        return max(1, math.floor(min_rows * ratio)), max(1, math.floor(min_columns * ratio))
    rows = max(math.floor(math.sqrt(max_crops * height / width)), min_rows)
    columns = max(math.floor(math.sqrt(max_crops * width / height)), min_columns)
    if rows * columns > max_crops:
        if columns > rows:
            columns = max_crops // rows
        else:
            rows = max_crops // columns
    return max(1, rows), max(1, columns)


def resize_with_pillow(rgb: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize with a Lanczos filter along one axis and then the other, in the order of Pillow 13.

    Older versions of Pillow always resize the width first, and rounding between the passes changes the last bit.

    Args:
        rgb: [H, W, 3] uint8 RGB.
        width: New width in pixels.
        height: New height in pixels.

    Returns:
        [height, width, 3] uint8 RGB.
    """
    image = Image.fromarray(rgb)
    is_height_first = rows_first(image.width, image.height, width, height)
    between = (image.width, height) if is_height_first else (width, image.height)
    lanczos = Image.Resampling.LANCZOS
    return np.asarray(image.resize(between, lanczos).resize((width, height), lanczos))


def rows_first(width: int, height: int, new_width: int, new_height: int) -> bool:
    """Return whether the number of rows is changed before the number of columns when an image is resized."""
    fewer_columns, fewer_rows = width - new_width, height - new_height
    return fewer_rows > 0 and fewer_rows > 2 * fewer_columns


def normalize(pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scale pixels to −1..1: [N, S, S, 3] uint8 → [N, 3, S, S], computed in float32 and then cast."""
    scaled = pixels.permute(0, 3, 1, 2).float() / 255
    return ((scaled - 0.5) / 0.5).to(dtype).contiguous()


def largest_differences(pixels: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Measure how much crops differ from earlier crops of the same region, robustly against noise.

    The measure is the largest difference between the means of a square with a side of `WINDOW` pixels, over all squares
    and channels. Independent noise averages out: if pixels have a standard deviation of σ, the difference between the
    means of two exposures has a standard deviation of σ · √2 / 8, and the maximum over the ten thousand squares of a
    crop stays below σ. Motion does not average out: an object with a contrast of c gray levels that covers a pixels of
    a square contributes c · a / 64, anywhere in the crop. The mean over a whole crop would react more to faint noise
    than to a small object. The squares overlap because motion within one square does not change its mean.

    Args:
        pixels: [N, S, S, 3] uint8 crops.
        before: [N, S, S, 3] uint8 earlier crops.

    Returns:
        [N] float64 gray levels, 0 to 255.
    """
    sums = pixels.astype(np.int16) - before  # the sum of 64 differences fits into 16 bits
    for axis in (1, 2):
        sums = np.moveaxis(sums, axis, 0)
        even = sums[: len(sums) // STEP * STEP]
        steps = even[::STEP] + even[1::STEP]
        count = len(steps) - WINDOW // STEP + 1
        sums = sum((steps[i : i + count] for i in range(1, WINDOW // STEP)), start=steps[:count])
        sums = np.moveaxis(sums, 0, axis)
    largest: np.ndarray = np.abs(sums).max(axis=(1, 2, 3)) / WINDOW**2
    return largest
