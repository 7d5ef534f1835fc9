"""Hard scenes: what makes a detector err, for measuring how well it knows that it might.

Each scene has one or two of four difficulties: its objects are small, it is crowded and they cover one another, they
hardly show on what is behind them, or they are near misses of one another: a red square beside a red circle, a cow
beside a horse. All else is drawn as in `moondream_cv.scenes.render`, and what is there can be told by a person who
looks closely. A model must never be trained on these scenes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from .backgrounds import make_background
from .effects import apply_effects
from .render import DISTINCT, Canvas, Look
from .sampling import near_miss, pick, sample_name
from .scene import Scene
from .sprites import icon_color
from .world import COLORS, ICONS, split_name

UInt8 = npt.NDArray[np.uint8]

FRAMES: Final = ((320, 240), (480, 360), (640, 480), (480, 640), (640, 360), (800, 600), (1280, 720), (720, 1280))
LOOKALIKES: Final = (
    ("dog", "cat", "horse", "cow", "elephant"),
    ("car", "bus", "truck", "train"),
    ("airplane", "rocket", "bird", "fish"),
    ("ball", "clock", "donut", "cake", "pizza"),
    ("book", "phone", "laptop", "cup"),
    ("tree", "flower", "apple", "umbrella"),
    ("banana", "key", "guitar"),
    ("boat", "house", "bicycle"),
)
"""The icons in groups of similar looks or use; every icon stands in one."""

_SMALLEST: Final = 11.0  # longer side in pixels: below, a star is a blot to anyone
_FAINT: Final = 60.0  # color distance from which an object can just be told from what is behind it


@dataclass(frozen=True)
class Difficulties:
    """What is hard about a scene."""

    small: bool
    crowded: bool
    faint: bool
    near_misses: bool


def lookalike(rng: np.random.Generator, name: str) -> str:
    """Draw a name that is easily taken for the given one: another color, another shape, or an icon of its group."""
    if name not in ICONS:
        return near_miss(rng, name)
    group = next(group for group in LOOKALIKES if name in group)
    return pick(rng, [other for other in group if other != name])


def draw_difficulties(rng: np.random.Generator) -> Difficulties:
    """Draw one or two of the four."""
    chosen = rng.permutation(4)[: int(rng.integers(1, 3))].tolist()
    return Difficulties(*(i in chosen for i in range(4)))


def render_hard(
    seed_or_rng: int | np.random.Generator,
    *,
    resolution_wh: tuple[int, int] | None = None,
    num_objects: int | tuple[int, int] | None = None,
) -> Scene:
    """Render one hard scene with its ground truth.

    Args:
        seed_or_rng: A seed, which fixes the scene, or a generator to draw from.
        resolution_wh: Width and height in pixels; None draws a common frame, 320 x 240 to 1280 x 720.
        num_objects: How many objects, an inclusive range to draw from, or None for 2 to 7, and 8 to 14 in a crowd.
            Where there is no room for all, the scene holds fewer. A box is that of the whole object, the hidden part
            included.
    """
    rng = np.random.default_rng(seed_or_rng)
    size_wh, hard = resolution_wh or pick(rng, FRAMES), draw_difficulties(rng)
    if isinstance(num_objects, int):
        num_objects = (num_objects, num_objects)
    low, high = num_objects or ((8, 14) if hard.crowded else (2, 7))
    names = _names(rng, int(rng.integers(low, high + 1)), hard.near_misses)
    colors = [icon_color(shape) if color is None else COLORS[color] for color, shape in map(split_name, names)]
    # A background that avoids no color is often close to an object's.
    background = make_background(rng, size_wh, () if hard.faint else colors)
    look = Look(
        varied=True,
        max_cover=0.4 if hard.crowded else 0.05,
        distinct=_FAINT if hard.faint else DISTINCT,
        min_side=_SMALLEST,
    )
    canvas = Canvas(background, look, rng)
    sizes = _sizes(rng, len(names), min(size_wh), hard)
    objects = [canvas.add(name, size) for name, size in zip(names, sizes, strict=True)]
    image = _veiled(canvas.image, rng) if hard.faint else canvas.image
    return Scene(apply_effects(image, rng), tuple(item for item in objects if item is not None))


def _names(rng: np.random.Generator, count: int, near_misses: bool) -> list[str]:
    """Draw the names of `count` objects: one or two classes, again and again, among others."""
    bases = [sample_name(rng) for _ in range(min(count, int(rng.integers(1, 3))))]
    names = list(bases)
    while len(names) < count:
        base, again = pick(rng, bases), rng.random() < 0.3
        names.append(base if again else lookalike(rng, base) if near_misses else sample_name(rng))
    rng.shuffle(names)
    return names


def _sizes(rng: np.random.Generator, count: int, short_side: int, hard: Difficulties) -> list[float]:
    """Draw each object's longer side in pixels, logarithms being uniform.

    Small is up to an eighth of the frame's short side: the tiny model sees a frame as 200 pixels, and learned from
    objects of a tenth to two fifths.
    """
    low, high = (0.07, 0.13) if hard.small else (0.1, 0.22 if hard.crowded else 0.3)
    draws = rng.uniform(math.log(low), math.log(high), count).tolist()
    return [max(_SMALLEST, math.exp(draw) * short_side) for draw in draws]


def _veiled(image: UInt8, rng: np.random.Generator) -> UInt8:
    """Mix the image with one tone, as haze, glare or dusk do: contrasts shrink by a sixth to two fifths."""
    kept = float(rng.uniform(0.6, 0.85))
    tone = rng.uniform(10, 245) + rng.uniform(-12, 12, 3)
    return np.asarray((image * kept + tone * (1 - kept)).clip(0, 255), np.uint8)
