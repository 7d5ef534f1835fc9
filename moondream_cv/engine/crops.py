"""From an RGB array to the crops that the vision encoder reads.

The whole image is one global crop; an image larger than the usable window of a crop is also cut into overlapping local
crops. Resizing is Pillow's Lanczos, so that crops are equal to the byte to those of the published implementation
without libvips.
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

WINDOW = 8  # side in pixels of the squares that `largest_differences` averages over: about half a patch
STEP = 2  # pixels from one such square to the next
PIXELS_WORTH_A_THREAD = 500_000  # below that, which is about 5 ms of resizing, starting one may take as long


@dataclass(frozen=True)
class Crops:
    """The crops of one image.

    Attributes:
        pixels: [1 + rows · columns, crop_size, crop_size, 3] uint8 RGB: the global crop, then local ones row by row.
        tiling: (rows, columns) of local crops.
    """

    pixels: np.ndarray
    tiling: tuple[int, int]


def cut_all(
    frames: Sequence[np.ndarray], config: VisionConfig, max_crops: int | None = None, threads: int = 1
) -> list[Crops]:
    """Do `cut_crops` on several frames at once.

    Pillow resizes on one core and lets go of the interpreter's lock meanwhile; for small models that is most of the
    time that an image takes.

    Args:
        frames: Images of any sizes, each [H, W, 3] uint8 RGB.
        threads: How many may work at a time; a single frame uses two at the most.
    """
    if threads < 2 or sum(rgb.shape[0] * rgb.shape[1] for rgb in frames) < PIXELS_WORTH_A_THREAD:
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
        config: Sizes of a crop, of its patches and of the overlap.
        max_crops: Local crops at the most; None: as many as the model was trained with.
        pool: Makes the global crop while the calling thread makes the local ones.

    Raises:
        ValueError: `max_crops` is not positive.
    """
    limit = config.max_crops if max_crops is None else max_crops
    if limit < 1:
        raise ValueError(f"max_crops must be at least 1, not {max_crops}")
    size, margin = config.crop_size, 2 * config.overlap_margin * config.enc_patch_size
    window = size - margin
    height, width = rgb.shape[:2]
    rows, columns = select_tiling(height - margin, width - margin, window, limit)

    image = Image.fromarray(rgb)
    pixels = np.empty((1 + rows * columns, size, size, 3), np.uint8)
    if (rows, columns) == (1, 1):  # the only local crop is as large as the global one: the same resizing twice
        pixels[:] = _resize(image, size, size)
        return Crops(pixels, (1, 1))
    whole = None if pool is None else pool.submit(_resize, image, size, size)
    resized = _resize(image, columns * window + margin, rows * window + margin)
    pixels[0] = _resize(image, size, size) if whole is None else whole.result()
    for i in range(rows * columns):
        top, left = (i // columns) * window, (i % columns) * window
        pixels[1 + i] = resized[top : top + size, left : left + size]
    return Crops(pixels, (rows, columns))


def select_tiling(height: int, width: int, window: int, max_crops: int) -> tuple[int, int]:
    """Rows and columns of local crops for an area of `height` × `width` pixels beside the margins.

    One tile when either side fits into a window; otherwise up to `max_crops` tiles of about the image's aspect ratio.
    Only images some ten times as long as wide get more, in a single file: the published tiling does that, too.
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


def _resize(image: Image.Image, width: int, height: int) -> np.ndarray:
    """Lanczos along one axis and then along the other, in Pillow 13's order.

    Older Pillow always began with the rows, and rounding between the passes makes that visible in the last bit.
    """
    fewer_columns, fewer_rows = image.width - width, image.height - height
    columns_first = fewer_rows > 0 and fewer_rows > 2 * fewer_columns
    between = (image.width, height) if columns_first else (width, image.height)
    lanczos = Image.Resampling.LANCZOS
    return np.asarray(image.resize(between, lanczos).resize((width, height), lanczos))


def normalize(pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[N, S, S, 3] uint8 → [N, 3, S, S] in −1..1, computed in float32 and then cast."""
    scaled = pixels.permute(0, 3, 1, 2).float() / 255
    return ((scaled - 0.5) / 0.5).to(dtype).contiguous()


def largest_differences(pixels: np.ndarray, before: np.ndarray) -> np.ndarray:
    """How much crops differ from other crops of the same place, in a way that noise hardly raises.

    It is the largest difference that a square of `WINDOW` pixels' side shows in the mean of one channel. Independent
    noise cancels out within a square: between two exposures whose pixels have a standard deviation of σ, its mean has
    σ · √2 / 8, and the largest of a crop's ten thousands stays below σ. What moves does not cancel out: a thing that
    stands out by c grey levels on a pixels of the square gives c · a / 64 wherever in the crop it is, while the mean
    over a whole crop sees less of a small thing than of faint noise everywhere. The squares overlap, because a thing
    that moves within one square leaves its mean as it was.

    Args:
        pixels: [N, S, S, 3] uint8.
        before: [N, S, S, 3] uint8.

    Returns:
        [N] float64 grey levels, 0 to 255.
    """
    sums = pixels.astype(np.int16) - before  # a square's sum of 64 differences still fits into 16 bits
    for axis in (1, 2):
        sums = np.moveaxis(sums, axis, 0)
        even = sums[: len(sums) // STEP * STEP]
        steps = even[::STEP] + even[1::STEP]
        count = len(steps) - WINDOW // STEP + 1
        sums = sum((steps[i : i + count] for i in range(1, WINDOW // STEP)), start=steps[:count])
        sums = np.moveaxis(sums, 0, axis)
    largest: np.ndarray = np.abs(sums).max(axis=(1, 2, 3)) / WINDOW**2
    return largest
