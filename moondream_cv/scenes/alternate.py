"""A second renderer for held-out evaluation. Never train a model on its images.

It shares the vocabulary, the icons and the result type with `moondream_cv.scenes.render`, but no drawing code: shapes
are Pillow primitives, rendered at four times the size and scaled down; the backgrounds differ; objects are placed in
the cells of a loose grid. Accuracy on these images shows that a model has not overfitted to the training renderer. The
renderer is not optimized for speed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from .scene import Scene, SceneObject
from .sprites import icon_levels
from .world import COLORED_SHAPES, COLORS, ICONS, split_name

_OVERSAMPLING: Final = 4
_FRAMES: Final = ((640, 480), (640, 480), (640, 480), (480, 640), (512, 512), (800, 600), (1280, 720), (320, 240))
_Color = tuple[int, int, int]


def _upright(shape: str, side: int, rng: np.random.Generator) -> Image.Image:
    """Draw an upright shape as a white-on-black mask of `side` x `side` pixels, with a margin of 1/8 on each side."""
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    low, high = side / 8, side * 7 / 8
    span, middle = high - low, side / 2
    if shape == "circle":
        draw.ellipse((low, low, high, high), fill=255)
    elif shape == "ring":
        draw.ellipse((low, low, high, high), outline=255, width=round(span * rng.uniform(0.14, 0.22)))
    elif shape == "square":
        draw.rectangle((low, low, high, high), fill=255)
    elif shape == "diamond":
        half = span * rng.uniform(0.34, 0.45)
        draw.polygon([(middle - half, middle), (middle, low), (middle + half, middle), (middle, high)], fill=255)
    elif shape == "triangle":
        draw.regular_polygon((middle, middle, span / 2), 3, fill=255)
    elif shape == "cross":
        bar = span * rng.uniform(0.24, 0.36) / 2
        draw.rectangle((low, middle - bar, high, middle + bar), fill=255)
        draw.rectangle((middle - bar, low, middle + bar, high), fill=255)
    elif shape == "star":
        radii = (span / 2, span / 2 * 0.382)  # the inner radius of a pentagram
        corners = [
            (middle - radii[i % 2] * math.sin(i * math.pi / 5), middle - radii[i % 2] * math.cos(i * math.pi / 5))
            for i in range(10)
        ]
        draw.polygon(corners, fill=255)
    else:
        # A heart is a square turned by 45 degrees, with a disc on each upper side.
        edge = span * 0.56
        tip, reach = high - span * 0.04, edge / math.sqrt(2)
        left, right, top = (middle - reach, tip - reach), (middle + reach, tip - reach), (middle, tip - 2 * reach)
        draw.polygon([(middle, tip), left, top, right], fill=255)
        for side_corner in (left, right):
            cx, cy = (side_corner[0] + top[0]) / 2, (side_corner[1] + top[1]) / 2
            draw.ellipse((cx - edge / 2, cy - edge / 2, cx + edge / 2, cy + edge / 2), fill=255)
    return mask


def _shape_layer(color: str, shape: str, size: float, rng: np.random.Generator) -> Image.Image:
    """Draw a colored shape, rotated by up to 10 degrees, as an RGBA image."""
    side = round(size * 4 / 3)  # the mask has a margin of 1/8 on each side
    mask = _upright(shape, side * _OVERSAMPLING, rng)
    if rng.random() < 0.5:
        mask = mask.rotate(float(rng.uniform(-10, 10)), Image.Resampling.BICUBIC)
    mask = mask.resize((side, side), Image.Resampling.LANCZOS)
    shift = rng.integers(-8, 9, 3)
    fill = tuple(int(np.clip(base + step, 0, 255)) for base, step in zip(COLORS[color], shift, strict=True))
    layer = Image.new("RGBA", mask.size, (*fill, 255))
    layer.putalpha(mask)
    return layer


def _icon_layer(name: str, size: float, rng: np.random.Generator) -> Image.Image:
    """Draw an icon, sometimes mirrored or rotated by up to 8 degrees, as an RGBA image."""
    sprite = icon_levels(name)[0]
    icon = Image.fromarray(np.dstack([sprite.rgb, sprite.alpha]))
    if rng.random() < 0.2:
        icon = icon.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.4:
        icon = icon.rotate(float(rng.uniform(-8, 8)), Image.Resampling.BICUBIC, expand=True)
    scale = size / max(icon.size)
    target = (max(2, round(icon.width * scale)), max(2, round(icon.height * scale)))
    # Premultiplied alpha keeps the colors of transparent pixels out of the resampled edges.
    return icon.convert("RGBa").resize(target, Image.Resampling.LANCZOS).convert("RGBA")


def _background_tone(avoid: Sequence[Sequence[float]], rng: np.random.Generator) -> tuple[_Color, _Color]:
    """Draw two related tones that differ from the objects' colors: the best of 20 attempts."""
    best: tuple[float, list[npt.NDArray[np.float64]]] = (-1.0, [])
    for _ in range(20):
        mix = rng.uniform(0.55, 0.95)  # share of gray: pastel, dusk or slate
        gray = rng.choice([rng.uniform(200, 245), rng.uniform(90, 170), rng.uniform(25, 60)], p=[0.6, 0.25, 0.15])
        first = mix * gray + (1 - mix) * rng.uniform(0, 255, 3)
        pair = [first, np.clip(first + rng.uniform(-28, 28), 0, 255)]
        distances = [np.abs(tone - np.asarray(other)).sum() for tone in pair for other in avoid]
        gap = float(min(distances, default=765))
        if gap > best[0]:
            best = (gap, pair)
        if gap > 200:
            break
    first, second = ((int(tone[0]), int(tone[1]), int(tone[2])) for tone in best[1])
    return first, second


def _background(size: tuple[int, int], tones: tuple[_Color, _Color], rng: np.random.Generator) -> Image.Image:
    """Draw one of seven kinds of background in two tones."""
    width, height = size
    image = Image.new("RGB", size, tones[0])
    draw = ImageDraw.Draw(image)
    kind = int(rng.integers(7))
    if kind == 1:  # horizon
        draw.rectangle((0, int(height * rng.uniform(0.4, 0.75)), width, height), fill=tones[1])
    elif kind == 2:  # vignette
        glow = ImageChops.invert(Image.radial_gradient("L")).resize(size)
        image = Image.composite(image, Image.new("RGB", size, tones[1]), glow)
    elif kind == 3:  # printed lines with ragged ends
        pitch = int(rng.integers(9, 22))
        for y in range(pitch, height, pitch):
            draw.line((width * 0.03, y, width * rng.uniform(0.7, 0.97), y), fill=tones[1], width=2)
    elif kind == 4:  # diagonal ramp
        ramp = Image.linear_gradient("L").resize((width * 2, height * 2)).rotate(45, expand=False)
        ramp = ramp.crop((width // 2, height // 2, width // 2 + width, height // 2 + height))
        image = Image.composite(image, Image.new("RGB", size, tones[1]), ramp)
    elif kind == 5:  # watercolor
        noise = Image.fromarray(rng.integers(0, 256, (9, 12), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        image = Image.composite(image, Image.new("RGB", size, tones[1]), noise.filter(ImageFilter.GaussianBlur(8)))
    elif kind == 6:  # wide soft waves
        for x in range(0, width, max(24, width // 12)):
            draw.arc((x - width // 3, -height, x + width // 3, height * 2), 90, 270, fill=tones[1], width=5)
        image = image.filter(ImageFilter.GaussianBlur(3))
    return image


def _with_halo(layer: Image.Image, light: bool) -> Image.Image:
    """Outline a layer by two pixels, for objects that would not stand out from the background."""
    padded = Image.new("RGBA", (layer.width + 6, layer.height + 6))
    padded.paste(layer, (3, 3))
    halo = Image.new("RGBA", padded.size, (250, 250, 250, 0) if light else (30, 30, 30, 0))
    halo.putalpha(padded.getchannel("A").filter(ImageFilter.MaxFilter(5)))
    return Image.alpha_composite(halo, padded)


def _visible_box(layer: Image.Image) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of the pixels that are more than half opaque."""
    box = layer.getchannel("A").point([0] * 128 + [255] * 128).getbbox()
    if box is None:
        raise AssertionError("the object has no visible pixels")
    return box


def _cells(size: tuple[int, int], count: int) -> tuple[int, int, float]:
    """Return the columns, the rows and the short side of a cell, in pixels, of a grid for `count` objects."""
    grids = ((columns, -(-count // columns)) for columns in range(1, count + 1))
    columns, rows = max(grids, key=lambda grid: min(size[0] / grid[0], size[1] / grid[1]))
    return columns, rows, min(size[0] / columns, size[1] / rows)


def _sample(rng: np.random.Generator, count: int) -> list[str]:
    """Draw object names from a few classes, so that objects often share a class."""
    pool = list(rng.choice(COLORED_SHAPES, 3)) + list(rng.choice(ICONS, 3))
    return [str(rng.choice(pool)) for _ in range(count)]


def render_alternate(
    seed: int | np.random.Generator,
    *,
    resolution_wh: tuple[int, int] | None = None,
    num_objects: int | tuple[int, int] | None = None,
    names: Sequence[str] | None = None,
) -> Scene:
    """Render one held-out scene with its ground truth.

    Args:
        seed: Seed that determines the scene, or a random generator.
        resolution_wh: Width and height in pixels; None draws a common size, mostly 640 x 480.
        num_objects: Number of objects, or an inclusive range of it; None: 1 to 7.
        names: Full names of the objects, such as ``"red circle"``, instead of random ones.

    Raises:
        ValueError: A name is unknown, or is a shape without a color.
    """
    # Choose the size and the objects
    rng = np.random.default_rng(seed)
    size = resolution_wh or _FRAMES[int(rng.integers(len(_FRAMES)))]
    low, high = (num_objects, num_objects) if isinstance(num_objects, int) else num_objects or (1, 7)
    chosen = _sample(rng, int(rng.integers(low, high + 1))) if names is None else list(names)
    for name in chosen:
        if name not in ICONS and split_name(name)[0] is None:
            raise ValueError(f"{name!r} has no color; use a full name such as {'red ' + name!r}")

    # Draw the background
    columns, rows, cell = _cells(size, max(len(chosen), 2))
    parts = [split_name(name) for name in chosen]
    representative = [COLORS[color] if color else icon_levels(shape)[0].rgb.mean((0, 1)) for color, shape in parts]
    tones = _background_tone(representative, rng)
    image = _background(size, tones, rng)

    # Draw the objects into the cells of the grid
    objects = []
    places = rng.permutation(columns * rows)[: len(chosen)]
    for name, (color, shape), rgb, place in zip(chosen, parts, representative, places.tolist(), strict=True):
        side = max(15.0, min(size) * rng.uniform(0.1, 0.34))
        side = min(side, cell - 8)
        layer = _shape_layer(color, shape, side, rng) if color else _icon_layer(shape, side, rng)
        if min(np.abs(np.subtract(tone, rgb)).sum() for tone in tones) < 130:
            layer = _with_halo(layer, light=sum(tones[0]) < 380)
        left, top, right, bottom = _visible_box(layer)
        room_x, room_y = size[0] / columns - (right - left), size[1] / rows - (bottom - top)
        x = int(place % columns * size[0] / columns + room_x * rng.uniform(0.1, 0.9))
        y = int(place // columns * size[1] / rows + room_y * rng.uniform(0.1, 0.9))
        image.paste(layer, (x - left, y - top), layer)
        box = (float(x), float(y), float(x + right - left), float(y + bottom - top))
        objects.append(SceneObject.from_name(name, box))
    return Scene(np.asarray(image, np.uint8).copy(), tuple(objects))
