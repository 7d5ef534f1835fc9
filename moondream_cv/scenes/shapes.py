"""Random outlines of the shapes.

A shape is a list of closed contours in unit coordinates (x to the right, y down), filled by the even-odd rule. The
variation never changes the class: a square is not rotated so far that it resembles a diamond, and an ellipse stays
close to a circle. `moondream_cv.scenes.objects` fills, colors and places the shapes.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

Contours = list[npt.NDArray[np.float32]]  # each [N, 2], x and y

_ANGLES = np.linspace(0, 2 * math.pi, 64, endpoint=False)
_CIRCLE: Final = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], 1).astype(np.float32)
_HEART: Final = np.stack(
    [
        16 * np.sin(_ANGLES) ** 3,
        -(13 * np.cos(_ANGLES) - 5 * np.cos(2 * _ANGLES) - 2 * np.cos(3 * _ANGLES) - np.cos(4 * _ANGLES)),
    ],
    1,
).astype(np.float32) / np.float32(16)


def _polygon(*points: tuple[float, float]) -> Contours:
    return [np.array(points, np.float32)]


def _star(rng: np.random.Generator, varied: bool) -> Contours:
    inner = rng.uniform(0.36, 0.54) if varied else 0.42
    angles = np.arange(10) * (math.pi / 5) - math.pi / 2
    radii = np.where(np.arange(10) % 2, inner, 1.0)
    return [np.stack([np.cos(angles) * radii, np.sin(angles) * radii], 1).astype(np.float32)]


def _cross(rng: np.random.Generator, varied: bool) -> Contours:
    arm = rng.uniform(0.2, 0.42) if varied else 0.32
    return _polygon(
        (-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm),
        (arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm),
    )  # fmt: skip


def _heart(rng: np.random.Generator, varied: bool) -> Contours:
    if varied and rng.random() < 0.45:
        # Two semicircular lobes above a triangle, as on playing cards.
        half = rng.uniform(0.48, 0.56)
        lobe = np.linspace(math.pi * 0.92, math.pi * 2.0, 16)
        left = np.stack([-half + half * np.cos(lobe), -0.35 + half * np.sin(lobe)], 1)
        right = (left * (-1, 1))[::-1]
        tip = np.array([[0.0, rng.uniform(0.75, 0.95)]])
        return [np.concatenate([left, right, tip]).astype(np.float32)]
    return [_HEART]


def _square(rng: np.random.Generator, varied: bool) -> Contours:
    if varied and rng.random() < 0.2:
        # Slightly rounded corners: each corner becomes a short arc.
        radius = rng.uniform(0.05, 0.25)
        arc = _CIRCLE * radius
        offsets = np.repeat(np.array([(1, 1), (-1, 1), (-1, -1), (1, -1)], np.float32) * (1 - radius), 16, 0)
        return [(arc + offsets).astype(np.float32)]
    return _polygon((-1, -1), (1, -1), (1, 1), (-1, 1))


def _triangle(rng: np.random.Generator, varied: bool) -> Contours:
    apex = rng.normal(0, 0.08) if varied else 0.0
    return _polygon((apex, -0.9), (1, 0.83), (-1, 0.83))


def _diamond(rng: np.random.Generator, varied: bool) -> Contours:
    width = rng.uniform(0.62, 1.0) if varied else 0.8
    return _polygon((0, -1), (width, 0), (0, 1), (-width, 0))


def _ring(rng: np.random.Generator, varied: bool) -> Contours:
    inner = rng.uniform(0.48, 0.76) if varied else 0.6
    return [_CIRCLE, _CIRCLE * np.float32(inner)]


def _arrow(rng: np.random.Generator, varied: bool) -> Contours:
    shaft, neck = (rng.uniform(0.18, 0.32), rng.uniform(-0.1, 0.25)) if varied else (0.25, 0.1)
    return _polygon(
        (1, 0), (neck, 0.75), (neck, shaft), (-1, shaft), (-1, -shaft), (neck, -shaft), (neck, -0.75)
    )  # fmt: skip


def _rotation(shape: str, rng: np.random.Generator) -> float:
    """Draw a rotation in degrees that keeps the shape recognizable."""
    if shape in ("circle", "ring"):
        return float(rng.uniform(0, 180))
    if shape in ("square", "diamond"):
        limit = 12 if shape == "square" else 8
        return float(rng.uniform(-limit, limit)) if rng.random() < 0.6 else 0.0
    draw = rng.random()
    if draw < 0.35:
        return 0.0
    if draw < 0.88 or shape == "cross":
        return float(rng.uniform(-15, 15))
    return float(rng.uniform(-35, 35))


def _aspect(shape: str, rng: np.random.Generator) -> float:
    """Draw a ratio of width to height, relative to the standard outline."""
    if shape in ("triangle", "cross", "heart"):
        return float(rng.uniform(0.82, 1.22))
    return float(rng.uniform(0.87, 1.15)) if shape != "diamond" else float(rng.uniform(0.9, 1.08))


def contours(shape: str, rng: np.random.Generator, *, varied: bool = True) -> Contours:
    """Return the outline of a shape.

    Args:
        shape: One of `moondream_cv.scenes.world.SHAPES` or `UNSEEN_SHAPES`.
        rng: Source of randomness.
        varied: Randomize proportions, aspect ratio and rotation; otherwise return the upright standard outline.

    Returns:
        Closed contours, each [N, 2] float32. Their bounding box starts at (0, 0), and its longer side is 1.

    Raises:
        ValueError: The shape is unknown.
    """
    # Draw the standard outline
    parts: Contours
    if shape == "circle":
        parts = [_CIRCLE]
    elif shape == "square":
        parts = _square(rng, varied)
    elif shape == "triangle":
        parts = _triangle(rng, varied)
    elif shape == "star":
        parts = _star(rng, varied)
    elif shape == "ring":
        parts = _ring(rng, varied)
    elif shape == "cross":
        parts = _cross(rng, varied)
    elif shape == "heart":
        parts = _heart(rng, varied)
    elif shape == "diamond":
        parts = _diamond(rng, varied)
    elif shape == "arrow":
        parts = _arrow(rng, varied)
    else:
        raise ValueError(f"unknown shape {shape!r}")

    # Rotate and stretch it
    if varied:
        angle, aspect = math.radians(_rotation(shape, rng)), math.sqrt(_aspect(shape, rng))
        cos, sin = math.cos(angle), math.sin(angle)
        matrix = np.array([[cos * aspect, sin * aspect], [-sin / aspect, cos / aspect]], np.float32)
        parts = [part @ matrix for part in parts]
    low, high = parts[0].min(0), parts[0].max(0)  # the first contour is the outer one
    return [(part - low) / (high - low).max() for part in parts]
