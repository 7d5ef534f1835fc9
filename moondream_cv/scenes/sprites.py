"""The icons as RGBA sprites at several sizes, from ``sprites.png``.

The icons are glyphs of Noto Color Emoji by Google, licensed under the SIL Open Font License 1.1
(https://openfontlicense.org), rasterized by ``scripts/make_sprites.py``. `moondream_cv.scenes.objects` rotates them and
adds shadows.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Final, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from .world import ICONS

CELL: Final = 112
"""Side of a cell of the sprite sheet in pixels."""

COLUMNS: Final = 8
"""Number of cells in a row of the sprite sheet."""

_LEVELS: Final = (112, 64, 36, 20)


class Sprite(NamedTuple):
    """One icon at one size, cropped to its visible pixels."""

    rgb: npt.NDArray[np.uint8]  # [h, w, 3] RGB; colors extend beyond the silhouette
    alpha: npt.NDArray[np.uint8]  # [h, w], 0..255


@cache
def _sheet() -> npt.NDArray[np.uint8]:
    data = resources.files(__package__).joinpath("sprites.png").read_bytes()
    bgra = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if bgra is None:
        raise RuntimeError("moondream_cv/scenes/sprites.png cannot be decoded; reinstall the package")
    return np.asarray(cv2.cvtColor(bgra, cv2.COLOR_BGRA2RGBA), np.uint8)


def _bleed(rgb: npt.NDArray[np.uint8], alpha: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Extend the colors of an icon into its transparent surroundings, so that resampling adds no dark fringe."""
    weight = alpha.astype(np.float32)[..., None] / 255
    total = cv2.GaussianBlur(np.dstack([rgb * weight, weight]), (0, 0), 3)
    mean = (rgb * weight).sum((0, 1)) / weight.sum()
    spread = (total[..., :3] + mean * 1e-3) / (total[..., 3:] + 1e-3)
    return np.asarray(np.where(weight > 0.5, rgb, spread).clip(0, 255), np.uint8)


@cache
def icon_levels(name: str) -> tuple[Sprite, ...]:
    """Return an icon at all sizes, largest first.

    Args:
        name: One of `ICONS`.
    """
    row, column = divmod(ICONS.index(name), COLUMNS)
    cell = _sheet()[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
    x, y, width, height = cv2.boundingRect((cell[..., 3] > 127).astype(np.uint8))
    cell = cell[y : y + height, x : x + width]
    rgb, alpha = _bleed(cell[..., :3], cell[..., 3]), np.ascontiguousarray(cell[..., 3])
    levels = []
    for side in _LEVELS:
        scale = side / max(width, height)
        size = (max(2, round(width * scale)), max(2, round(height * scale)))
        levels.append(
            Sprite(
                np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), np.uint8),
                np.asarray(cv2.resize(alpha, size, interpolation=cv2.INTER_AREA), np.uint8),
            )
        )
    return tuple(levels)


def icon_sprite(name: str, size: float) -> Sprite:
    """Return the smallest sprite of an icon that has enough detail for a longer side of `size` pixels."""
    levels = icon_levels(name)
    for level, side in zip(reversed(levels), reversed(_LEVELS), strict=True):
        if side >= size * 0.95:
            return level
    return levels[0]


@cache
def icon_color(name: str) -> tuple[float, float, float]:
    """Return the mean RGB of an icon's visible pixels, 0..255, for contrast checks."""
    sprite = icon_levels(name)[0]
    red, green, blue = sprite.rgb[sprite.alpha > 127].mean(0)
    return float(red), float(green), float(blue)
