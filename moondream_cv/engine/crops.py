"""From an RGB array to the crops that the vision encoder reads.

The whole image is one global crop; an image larger than the usable window of a crop is also cut into overlapping local
crops. Resizing is Pillow's Lanczos, so that crops are equal to the byte to those of the published implementation
without libvips.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from moondream_cv.model.config import VisionConfig


@dataclass(frozen=True)
class Crops:
    """The crops of one image.

    Attributes:
        pixels: [1 + rows · columns, crop_size, crop_size, 3] uint8 RGB: the global crop, then local ones row by row.
        tiling: (rows, columns) of local crops.
    """

    pixels: np.ndarray
    tiling: tuple[int, int]


def cut_crops(rgb: np.ndarray, config: VisionConfig, max_crops: int | None = None) -> Crops:
    """Resize an image to a whole number of overlapping windows and cut it.

    Args:
        rgb: [H, W, 3] uint8 RGB.
        config: Sizes of a crop, of its patches and of the overlap.
        max_crops: Local crops at the most; None: as many as the model was trained with.

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
    resized = _resize(image, columns * window + margin, rows * window + margin)
    pixels = np.empty((1 + rows * columns, size, size, 3), np.uint8)
    pixels[0] = _resize(image, size, size)
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
