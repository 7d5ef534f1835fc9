"""Draw single objects: a colored shape or an icon becomes a small image with an alpha channel.

`moondream_cv.scenes.render` and `moondream_cv.scenes.clips` place the objects and check their contrast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from .shapes import contours
from .sprites import icon_color, icon_sprite
from .world import COLORS, ICONS, split_name

_SHIFT = 5  # fractional bits of polygon vertices
_HUE_SHIFTS = {  # RGB direction in which each color can vary and stay recognizable
    "red": (0, -1, 1),
    "green": (1, 0, 1),
    "blue": (0, 1, 0),
    "yellow": (0, 0.3, 1),
    "orange": (0, 0.3, 0.6),
    "purple": (0.6, 0, 0.6),
    "black": (0.5, 0.5, 0.5),
    "white": (-0.5, -0.5, -0.5),
}

UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Patch:
    """One rendered object.

    Attributes:
        rgb: [h, w, 3] uint8, RGB.
        alpha: [h, w] uint8, opacity of the object.
        box: Left, top, width and height in pixels of the visible part, where alpha is above one half.
        shadow: [h, w] float32, opacity of a black shadow under the object, or None.
        mean_rgb: Color that must stand out from the background, 0..255.
    """

    rgb: UInt8
    alpha: UInt8
    box: tuple[int, int, int, int]
    shadow: npt.NDArray[np.float32] | None
    mean_rgb: tuple[float, float, float]


def jittered_color(color: str, rng: np.random.Generator) -> tuple[float, float, float]:
    """Return the RGB of a color, 0..255, varied by about 12 levels and slightly in hue.

    Args:
        color: Key of `COLORS`.
        rng: Source of randomness.
    """
    hue_shift, amount = _HUE_SHIFTS[color], float(rng.uniform(-8, 18))
    *noise, light = rng.uniform(-6, 6, 4).tolist()
    red, green, blue = (
        min(255.0, max(0.0, base + step * amount + shift + light))
        for base, step, shift in zip(COLORS[color], hue_shift, noise, strict=True)
    )
    return red, green, blue


def _shape_mask(shape: str, size: float, rng: np.random.Generator, pad: int, varied: bool) -> UInt8:
    """Rasterize a shape whose longer side is `size` pixels, with `pad` empty pixels around it, as [h, w] uint8."""
    parts = contours(shape, rng, varied=varied)
    offset = pad + (rng.random(2) if varied else np.zeros(2))  # a random subpixel offset
    extent = parts[0].max(0) * size + offset + pad
    width, height = math.ceil(extent[0]) + 1, math.ceil(extent[1]) + 1
    draw = rng.random() if varied else 0.0
    scale, line = (1, cv2.LINE_AA) if draw < 0.55 else (3, cv2.LINE_8) if draw < 0.85 else (1, cv2.LINE_8)
    # OpenCV counts from pixel centers, the outline from pixel edges.
    points = [np.rint(((part * size + offset) * scale - 0.5) * (1 << _SHIFT)).astype(np.int32) for part in parts]
    mask = np.zeros((height * scale, width * scale), np.uint8)
    cv2.fillPoly(mask, points, 255, line, _SHIFT)
    if scale == 1:
        return mask
    return np.asarray(cv2.resize(mask, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def _shaded(mask: UInt8, rgb: tuple[float, float, float], rng: np.random.Generator, varied: bool) -> UInt8:
    """Fill a patch with a color: flat, or with a slight gradient, highlight or grain. Returns [h, w, 3]."""
    height, width = mask.shape
    fill = np.empty((height, width, 3), np.uint8)
    fill[:] = [round(channel) for channel in rgb]
    draw = rng.random() if varied else 0.0
    if draw < 0.55:
        return fill
    # Black and white objects look gray at a depth at which the others keep their color.
    depth = float(rng.uniform(6, 26)) * (0.5 if max(rgb) < 60 or min(rgb) > 200 else 1.0)
    if draw < 0.9:
        corners = rng.uniform(-depth, depth, (2, 2) if draw < 0.75 else (3, 3)).astype(np.float32)
        light = cv2.resize(corners, (width, height), interpolation=cv2.INTER_LINEAR)
    else:
        light = rng.uniform(-depth, depth, (height, width)).astype(np.float32)
    return np.asarray((fill + light[..., None]).clip(0, 255), np.uint8)


def _icon(name: str, size: float, rng: np.random.Generator, pad: int, varied: bool) -> tuple[UInt8, UInt8]:
    """Draw an icon whose longer side is about `size` pixels; return RGB, [h, w, 3], and alpha, [h, w]."""
    # Draw the rotation, the aspect ratio and the mirroring
    sprite = icon_sprite(name, size)
    height, width = sprite.alpha.shape
    angle = math.radians(float(rng.uniform(-12, 12))) if varied and rng.random() < 0.7 else 0.0
    aspect = math.sqrt(float(rng.uniform(0.88, 1.13))) if varied else 1.0
    flip = -1.0 if varied and rng.random() < 0.3 else 1.0
    cos, sin = math.cos(angle), math.sin(angle)
    matrix = np.array([[cos * aspect * flip, -sin * aspect], [sin / aspect * flip, cos / aspect]])
    extent = np.abs(matrix) @ (width, height)
    # `size` is the visible size; the rotated frame of a round icon is larger than the icon.
    scale = size / max(width, height) if angle else size / float(extent.max())
    matrix, extent = matrix * scale, extent * scale
    out_width, out_height = math.ceil(extent[0]) + 2 * pad + 1, math.ceil(extent[1]) + 2 * pad + 1
    offset = (out_width / 2, out_height / 2) - matrix @ (width / 2, height / 2)

    # Warp the sprite; OpenCV counts from pixel centers, so shift by half a pixel before and after
    affine = np.column_stack([matrix, offset + matrix @ (0.5, 0.5) - 0.5])
    rgb = cv2.warpAffine(
        sprite.rgb, affine, (out_width, out_height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    alpha = cv2.warpAffine(sprite.alpha, affine, (out_width, out_height), flags=cv2.INTER_LINEAR)
    if varied and rng.random() < 0.5:
        rgb = cv2.convertScaleAbs(rgb, alpha=float(rng.uniform(0.85, 1.1)), beta=float(rng.uniform(0, 18)))
    return np.asarray(rgb, np.uint8), np.asarray(alpha, np.uint8)


def _shadow(alpha: UInt8, pad: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Return the opacity of a soft shadow, [h, w] float32, that fits into the padding of the patch."""
    reach = max(1, pad // 2)
    shift_x, shift_y = int(rng.integers(-reach, reach + 1)), int(rng.integers(0, reach + 1))
    moved = np.zeros_like(alpha)
    height, width = alpha.shape
    moved[shift_y:, max(0, shift_x) : width + min(0, shift_x)] = alpha[
        : height - shift_y, max(0, -shift_x) : width - max(0, shift_x)
    ]
    soft = cv2.blur(moved, (2 * reach - 1, 2 * reach - 1), borderType=cv2.BORDER_CONSTANT)
    return np.asarray(soft.astype(np.float32) * (float(rng.uniform(0.15, 0.5)) / 255), np.float32)


def paint(
    name: str,
    size: float,
    rng: np.random.Generator,
    *,
    varied: bool = True,
    shadow: bool = False,
) -> Patch:
    """Draw one object.

    Args:
        name: Full name, such as ``"red circle"`` or ``"dog"``.
        size: Longer side in pixels; approximate if `varied`.
        rng: Source of randomness.
        varied: Randomize proportions, rotation, color and shading; otherwise draw a flat, upright standard object.
        shadow: Add a soft shadow, which is not part of the box.

    Raises:
        ValueError: The name is unknown, or is a shape without a color.
    """
    color, shape = split_name(name)
    if color is None and shape not in ICONS:
        raise ValueError(f"{name!r} has no color; use a full name such as {'red ' + shape!r}")
    pad = 1 + (max(2, round(size * 0.08)) if shadow else 0)
    if color is None:
        rgb, alpha = _icon(shape, size, rng, pad, varied)
        mean_rgb = icon_color(shape)
    else:
        alpha = _shape_mask(shape, size, rng, pad, varied)
        mean_rgb = jittered_color(color, rng) if varied else COLORS[color]
        rgb = _shaded(alpha, mean_rgb, rng, varied)
    soft = _shadow(alpha, pad - 1, rng) if shadow else None
    return Patch(rgb, alpha, _visible_box(alpha), soft, mean_rgb)


def outlined(patch: Patch, outline: tuple[int, int, int], thickness: int) -> Patch:
    """Return a patch with an outline, which is part of the object and its box.

    Args:
        patch: Object to outline.
        outline: RGB of the outline, 0..255.
        thickness: Width of the outline in pixels.
    """
    edges = (thickness, thickness, thickness, thickness)
    alpha = cv2.copyMakeBorder(patch.alpha, *edges, cv2.BORDER_CONSTANT, value=0)
    rgb = cv2.copyMakeBorder(patch.rgb, *edges, cv2.BORDER_REPLICATE)
    shadow = patch.shadow
    if shadow is not None:
        shadow = np.asarray(cv2.copyMakeBorder(shadow, *edges, cv2.BORDER_CONSTANT, value=0), np.float32)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * thickness + 1, 2 * thickness + 1))
    grown = np.asarray(cv2.dilate(alpha, kernel), np.uint8)
    weight = alpha.astype(np.float32) / 255
    line = np.empty_like(rgb)
    line[:] = outline
    blended = np.asarray(cv2.blendLinear(rgb, line, weight, 1 - weight), np.uint8)
    return Patch(blended, grown, _visible_box(grown), shadow, patch.mean_rgb)


def _visible_box(alpha: UInt8) -> tuple[int, int, int, int]:
    left, top, width, height = cv2.boundingRect((alpha > 127).view(np.uint8))
    return left, top, width, height


def stamp(image: UInt8, patch: Patch, x: int, y: int) -> None:
    """Blend a patch into an image in place.

    Args:
        image: [H, W, 3] uint8, RGB.
        patch: Object to draw; it is clipped to the image.
        x: Column of the left edge of the object's box.
        y: Row of the top edge of the object's box.
    """
    left, top = x - patch.box[0], y - patch.box[1]
    height, width = patch.alpha.shape
    x0, y0, x1, y1 = max(0, left), max(0, top), min(image.shape[1], left + width), min(image.shape[0], top + height)
    if x0 >= x1 or y0 >= y1:
        return
    region = image[y0:y1, x0:x1]
    rows, columns = slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)
    under: npt.NDArray[Any] = region
    if patch.shadow is not None:
        light = 1 - patch.shadow[rows, columns]
        under = cv2.blendLinear(region, np.zeros_like(region), light, np.zeros_like(light))
    weight = patch.alpha[rows, columns].astype(np.float32) / 255
    region[:] = cv2.blendLinear(np.ascontiguousarray(patch.rgb[rows, columns]), under, weight, 1 - weight)
