"""Sample the content of a scene: its size, and the number, names and sizes of its objects.

The distributions favor informative scenes: several objects of a class (for counting), near misses such as a red square
next to a red circle (for empty results), and small objects among many. `moondream_cv.scenes.render` draws and places
the objects.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, TypeVar

import numpy as np

from .world import COLORED_SHAPES, COLORS, ICONS, SHAPES, split_name

MIN_SIDE: Final = 14
"""Minimum longer side of an object in pixels."""

_T = TypeVar("_T")
_COLOR_NAMES: Final = tuple(COLORS)
_COMMON_FRAMES: Final = (
    ((640, 480), 0.3),
    ((480, 640), 0.15),
    ((480, 480), 0.15),
    ((640, 360), 0.2),
    ((800, 600), 0.12),
    ((1280, 720), 0.05),
    ((720, 1280), 0.03),
)


def pick(rng: np.random.Generator, options: Sequence[_T]) -> _T:
    """Draw one of several options; much faster than `Generator.choice`."""
    return options[int(rng.random() * len(options))]


def sample_resolution(rng: np.random.Generator) -> tuple[int, int]:
    """Draw a width and height in pixels: 60 % small with any aspect ratio, the others common video sizes."""
    if rng.random() < 0.6:
        width, height = (int(side) for side in rng.integers(160, 331, 2))
        return width, height
    draw = float(rng.random())
    for frame, share in _COMMON_FRAMES:
        draw -= share
        if draw < 0:
            return frame
    return _COMMON_FRAMES[0][0]


def sample_count(rng: np.random.Generator, num_objects: int | tuple[int, int] | None) -> int:
    """Draw the number of objects.

    Args:
        rng: Source of randomness.
        num_objects: Fixed number, or an inclusive range; None: 1 to 8.
    """
    if isinstance(num_objects, int):
        return num_objects
    if num_objects is not None:
        return int(rng.integers(num_objects[0], num_objects[1] + 1))
    return 1 + min(int(rng.random() ** 1.25 * 8), 7)


def sample_name(rng: np.random.Generator) -> str:
    """Draw a name: a colored shape or an icon with equal probability."""
    return pick(rng, COLORED_SHAPES) if rng.random() < 0.5 else pick(rng, ICONS)


def near_miss(rng: np.random.Generator, name: str) -> str:
    """Draw a name with the same shape in another color, or another shape in the same color; for icons, another icon."""
    color, shape = split_name(name)
    while True:
        if color is None:
            other = pick(rng, ICONS)
        elif rng.random() < 0.5:
            other = f"{pick(rng, _COLOR_NAMES)} {shape}"
        else:
            other = f"{color} {pick(rng, SHAPES)}"
        if other != name:
            return other


def sample_names(rng: np.random.Generator, count: int) -> list[str]:
    """Draw the names of `count` objects: a repeated class, near misses of a class, or an arbitrary mixture."""
    if count == 0:
        return []
    base = sample_name(rng)
    names = [base]
    draw = rng.random()
    if draw < 0.3 and count > 1:
        names *= int(rng.integers(2, min(6, count) + 1))
    near = 0.0 if draw > 0.75 else 0.6
    while len(names) < count:
        names.append(near_miss(rng, base) if rng.random() < near else sample_name(rng))
    rng.shuffle(names)
    return names


def sample_sizes(rng: np.random.Generator, count: int, short_side: int) -> list[float]:
    """Draw the longer side of each object in pixels: 9 to 40 % of the frame's short side, less for many objects."""
    low = math.log(0.09)
    high = math.log(0.4 if count <= 3 else 0.4 * (3 / count) ** 0.45)
    return [max(MIN_SIDE + 1.0, math.exp(draw) * short_side) for draw in rng.uniform(low, high, count)]


def with_colors(rng: np.random.Generator, names: Sequence[str]) -> list[str]:
    """Add a random color to each shape without one: ``"circle"`` becomes, for example, ``"red circle"``."""
    return [name if split_name(name)[0] or name in ICONS else f"{pick(rng, _COLOR_NAMES)} {name}" for name in names]
