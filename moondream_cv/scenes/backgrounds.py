"""Backgrounds of training scenes: plain, gradients, blobs, stripes, patches, clutter and grain, from light to dark.

Each background uses a few muted or pale tones around one base color, so that no part of it resembles an object. For
speed, most are drawn small and enlarged. The base color is chosen to contrast with the objects of the scene;
`moondream_cv.scenes.render` checks the contrast at the position of each object.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import cv2
import numpy as np
import numpy.typing as npt

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]


def color_distance(first: npt.ArrayLike, second: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return the perceptual distance of RGB colors: 0 for equal colors, about 765 for black and white.

    The metric is a weighted Euclidean distance ("redmean", https://www.compuphase.com/cmetric.htm) with constant
    weights.

    Args:
        first: [..., 3] RGB, 0..255.
        second: [..., 3] RGB, 0..255, broadcast against `first`.
    """
    delta = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    return np.asarray(np.sqrt((delta * delta) @ (2.5, 4.0, 2.5)))


def base_color(rng: np.random.Generator, avoid: Sequence[tuple[float, float, float]]) -> npt.NDArray[np.float64]:
    """Draw a base color that differs from the colors of the objects.

    Args:
        rng: Source of randomness.
        avoid: RGB of each object, 0..255.

    Returns:
        [3] RGB, 0..255.
    """
    count = 12
    # Brightness is uniform; chroma is mostly small, because saturated colors belong to objects.
    brightness = rng.uniform(12, 250, (count, 1))
    chroma = np.minimum(np.abs(rng.normal(0, 26, (count, 1))), 70)
    tint = rng.normal(0, 1, (count, 3))
    tint -= tint.mean(1, keepdims=True)
    tint /= np.abs(tint).max(1, keepdims=True) + 1e-6
    candidates = np.clip(brightness + tint * chroma, 4, 252)
    if not avoid:
        return np.asarray(candidates[0])
    nearest = color_distance(candidates[:, None], np.asarray(avoid, np.float64)[None]).min(1)
    far = np.flatnonzero(nearest > 170)
    return np.asarray(candidates[far[0] if far.size else int(nearest.argmax())])


@cache
def _grain(mono: bool) -> UInt8:
    """Return a fixed sheet of noise, [900, 1500, 3] uint8, with mean 128 and standard deviation 40."""
    rng = np.random.default_rng(20)
    noise = rng.normal(128, 40, (900, 1500, 1 if mono else 3)).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(np.repeat(noise, 3, 2)) if mono else noise


def add_grain(image: UInt8, rng: np.random.Generator, deviation: float, *, mono: bool = False) -> UInt8:
    """Add Gaussian noise to an image.

    Args:
        image: [H, W, 3] uint8, RGB.
        rng: Source of randomness.
        deviation: Standard deviation in levels.
        mono: Add the same noise to all channels.
    """
    height, width = image.shape[:2]
    sheet = _grain(mono)
    if height > sheet.shape[0] or width > sheet.shape[1]:
        sheet = np.tile(sheet, (-(-height // sheet.shape[0]), -(-width // sheet.shape[1]), 1))
    y = int(rng.integers(0, sheet.shape[0] - height + 1))
    x = int(rng.integers(0, sheet.shape[1] - width + 1))
    strength = deviation / 40
    noise = sheet[y : y + height, x : x + width]
    return np.asarray(cv2.addWeighted(image, 1.0, noise, strength, -128 * strength), np.uint8)


def _enlarged(small: npt.NDArray[np.float64] | Float32, size: tuple[int, int], smooth: bool = True) -> UInt8:
    """Enlarge a small color field, [h, w, 3], 0..255, to `size`, width and height in pixels."""
    field = np.asarray(np.clip(small, 0, 255), np.uint8)
    method = cv2.INTER_LINEAR if smooth else cv2.INTER_NEAREST
    return np.asarray(cv2.resize(field, size, interpolation=method), np.uint8)


def _tones(rng: np.random.Generator, base: npt.NDArray[np.float64], spread: float, count: int) -> Float32:
    """Draw `count` tones around the base color, [count, 3], that differ mostly in brightness and slightly in hue."""
    light = rng.normal(0, spread, (count, 1))
    return (base + light + rng.normal(0, spread * 0.35, (count, 3))).astype(np.float32)


def _plain(rng: np.random.Generator, base: npt.NDArray[np.float64], size: tuple[int, int], spread: float) -> UInt8:
    """Draw one flat color."""
    image = np.empty((size[1], size[0], 3), np.uint8)
    cv2.rectangle(image, (0, 0), size, base.tolist(), -1)
    return image


def _linear(rng: np.random.Generator, base: npt.NDArray[np.float64], size: tuple[int, int], spread: float) -> UInt8:
    """Draw a linear gradient."""
    start, end = _tones(rng, base, spread * 1.2, 2)
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[-1:1:24j, -1:1:24j]
    along = (np.clip((x * math.cos(angle) + y * math.sin(angle)) * 0.7, -1, 1) + 1)[..., None] / 2
    return _enlarged(start + (end - start) * along, size)


def _radial(rng: np.random.Generator, base: npt.NDArray[np.float64], size: tuple[int, int], spread: float) -> UInt8:
    """Draw a radial gradient."""
    inner, outer = _tones(rng, base, spread * 1.2, 2)
    cx, cy = rng.uniform(-0.8, 0.8, 2)
    y, x = np.mgrid[-1:1:24j, -1:1:24j]
    along = np.clip(np.hypot(x - cx, y - cy) / rng.uniform(0.9, 1.8), 0, 1)[..., None]
    return _enlarged(inner + (outer - inner) * along, size)


def _blobs(rng: np.random.Generator, base: npt.NDArray[np.float64], size: tuple[int, int], spread: float) -> UInt8:
    """Draw noise at three scales, like clouds, foliage or an out-of-focus photograph."""
    field = np.zeros((48, 64, 3), np.float32) + base.astype(np.float32)
    for cells in (2, int(rng.integers(3, 7)), int(rng.integers(7, 20))):
        grid = _tones(rng, np.zeros(3), spread * rng.uniform(0.2, 0.9), cells * (cells + 1))
        cloud = cv2.resize(grid.reshape(cells, cells + 1, 3), (64, 48), interpolation=cv2.INTER_CUBIC)
        field += np.asarray(cloud, np.float32)
    return _enlarged(field, size)


def _stripes(rng: np.random.Generator, base: npt.NDArray[np.float64], size: tuple[int, int], spread: float) -> UInt8:
    """Draw parallel bars, axis-aligned or at an angle, with hard or soft edges."""
    width, height = size
    tones = _tones(rng, base, spread * 0.9, int(rng.integers(2, 4)))
    angle = (0.0, math.pi / 2, float(rng.uniform(0, math.pi)))[int(rng.integers(3))]
    pitch = float(rng.uniform(0.03, 0.25)) * min(size)
    shrink = 2 if angle not in (0.0, math.pi / 2) or height * width > 90_000 else 1
    x = np.arange(-(-width // shrink), dtype=np.float32) * (math.cos(angle) * shrink / pitch)
    y = np.arange(-(-height // shrink), dtype=np.float32) * (math.sin(angle) * shrink / pitch)
    index = (x[None] + y[:, None] + 1000).astype(np.int32) % len(tones)
    table = np.zeros((256, 1, 3), np.uint8)
    table[: len(tones), 0] = tones.clip(0, 255)
    small = cv2.applyColorMap(index.astype(np.uint8), table)
    large = cv2.resize(small, size, interpolation=cv2.INTER_LINEAR) if shrink > 1 else small
    return np.asarray(large, np.uint8)


def _checker(rng: np.random.Generator, base: npt.NDArray[np.float64], size: tuple[int, int], spread: float) -> UInt8:
    """Draw a checkerboard or mosaic of low contrast; tiles of high contrast would look like squares."""
    tile = float(rng.uniform(0.06, 0.3)) * min(size)
    columns, rows = math.ceil(size[0] / tile), math.ceil(size[1] / tile)
    if rng.random() < 0.5:
        dark, light = _tones(rng, base, min(spread, 12), 2)
        board = np.where((np.indices((rows, columns)).sum(0) % 2)[..., None], dark, light)
    else:
        board = _tones(rng, base, min(spread, 10), rows * columns).reshape(rows, columns, 3)
    large = _enlarged(board, (math.ceil(columns * tile), math.ceil(rows * tile)), smooth=False)
    return np.ascontiguousarray(large[: size[1], : size[0]])


def _lines(rng: np.random.Generator, base: npt.NDArray[np.float64], size: tuple[int, int], spread: float) -> UInt8:
    """Draw a grid of thin lines, like graph paper or tiles."""
    image = _plain(rng, base, size, spread)
    tone = _tones(rng, base, spread, 1)[0].clip(0, 255).tolist()
    step_x, step_y = (rng.uniform(0.05, 0.3, 2) * min(size)).tolist()
    thickness = int(rng.integers(1, 3))
    for x in np.arange(rng.uniform(0, step_x), size[0], step_x):
        cv2.line(image, (int(x), 0), (int(x), size[1]), tone, thickness)
    if rng.random() < 0.7:
        for y in np.arange(rng.uniform(0, step_y), size[1], step_y):
            cv2.line(image, (0, int(y)), (size[0], int(y)), tone, thickness)
    return image


def _patches(rng: np.random.Generator, base: npt.NDArray[np.float64], size: tuple[int, int], spread: float) -> UInt8:
    """Draw large, elongated rectangles of muted tones, like walls and furniture."""
    image = _plain(rng, base, size, spread)
    for tone in _tones(rng, base, spread * 0.8, int(rng.integers(2, 9))).clip(0, 255).tolist():
        x, y = (int(v) for v in rng.uniform(-0.2, 0.9, 2) * size)
        if rng.random() < 0.5:
            extent = rng.uniform((0.5, 0.04), (1.2, 0.2)) * size
        else:
            extent = rng.uniform((0.04, 0.5), (0.2, 1.2)) * size
        cv2.rectangle(image, (x, y), (x + int(extent[0]), y + int(extent[1])), tone, -1)
    return image


def _scribbles(rng: np.random.Generator, base: npt.NDArray[np.float64], size: tuple[int, int], spread: float) -> UInt8:
    """Draw loose strokes across the frame as clutter."""
    image = _linear(rng, base, size, spread * 0.5)
    thin = max(1, min(size) // 120)
    for tone in _tones(rng, base, spread, int(rng.integers(3, 14))).clip(0, 255).tolist():
        points = np.cumsum(rng.normal(0, 0.16, (int(rng.integers(2, 6)), 2)), 0) + rng.uniform(0, 1, 2)
        line = np.rint(points * size).astype(np.int32)
        cv2.polylines(image, [line], False, tone, int(rng.integers(1, thin + 3)), cv2.LINE_AA)
    return image


def _streaks(rng: np.random.Generator, base: npt.NDArray[np.float64], size: tuple[int, int], spread: float) -> UInt8:
    """Draw grain stretched in one direction, like wood, brushed metal or paper."""
    along = (int(rng.integers(2, 6)), int(rng.integers(40, 160)))
    cells = along if rng.random() < 0.5 else along[::-1]
    light = rng.normal(0, spread * 0.5, (cells[1], cells[0], 1))
    return _enlarged(base + light + rng.normal(0, 2, (cells[1], cells[0], 3)), size)


def _horizon(rng: np.random.Generator, base: npt.NDArray[np.float64], size: tuple[int, int], spread: float) -> UInt8:
    """Draw two vertical gradients that meet at a horizontal line, like ground and sky."""
    tones = _tones(rng, base, spread, 4)
    split = int(rng.uniform(0.25, 0.8) * size[1])
    top = _enlarged(tones[:2, None], (size[0], max(1, split)))
    return np.concatenate([top, _enlarged(tones[2:, None], (size[0], max(1, size[1] - split)))])[: size[1]]


_KINDS = (
    (_plain, 0.12),
    (_linear, 0.1),
    (_radial, 0.07),
    (_blobs, 0.24),
    (_stripes, 0.07),
    (_checker, 0.06),
    (_lines, 0.05),
    (_patches, 0.09),
    (_scribbles, 0.08),
    (_streaks, 0.06),
    (_horizon, 0.06),
)
_CUMULATIVE = np.cumsum([share for _, share in _KINDS])


def make_background(
    rng: np.random.Generator,
    resolution_wh: tuple[int, int],
    avoid: Sequence[tuple[float, float, float]] = (),
    *,
    plain: bool = False,
) -> UInt8:
    """Draw a random background.

    Args:
        rng: Source of randomness.
        resolution_wh: Width and height in pixels.
        avoid: RGB of each object that must stand out, 0..255.
        plain: Draw one flat color.

    Returns:
        [H, W, 3] uint8, RGB.
    """
    base = base_color(rng, avoid)
    if plain:
        return _plain(rng, base, resolution_wh, 0)
    kind = min(int(np.searchsorted(_CUMULATIVE, rng.random() * _CUMULATIVE[-1], "right")), len(_KINDS) - 1)
    image = _KINDS[kind][0](rng, base, resolution_wh, float(rng.uniform(6, 38)))
    if rng.random() < 0.3:
        image = add_grain(image, rng, float(rng.uniform(2, 14)), mono=rng.random() < 0.5)
    return image
