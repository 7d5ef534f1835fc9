"""Hard scenes, on which a detector makes errors, to evaluate its confidence. Never train a model on them.

Each scene has one or two of four difficulties: small objects, crowding with occlusion, low contrast, and look-alikes
such as a red square next to a red circle or a cow next to a horse. Everything else is drawn as in
`moondream_cv.scenes.render`. A person can identify all objects.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from .backgrounds import make_background
from .effects import apply_effects
from .render import MIN_CONTRAST, Canvas, ObjectStyle
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
"""Groups of icons that look alike. Every icon is in exactly one group."""

_MIN_SIDE: Final = 11.0  # minimum longer side in pixels; smaller shapes are not recognizable
_MIN_CONTRAST: Final = 60.0  # color distance at which an object is just visible


@dataclass(frozen=True)
class Difficulties:
    """Difficulties of a scene.

    Attributes:
        small: Objects are small.
        crowded: There are many objects, and they occlude each other.
        faint: Objects have low contrast to the background.
        near_misses: Objects are look-alikes of each other.
    """

    small: bool
    crowded: bool
    faint: bool
    near_misses: bool


def lookalike(rng: np.random.Generator, name: str) -> str:
    """Draw a look-alike of a name: the same shape in another color, another shape, or another icon of its group.

    Args:
        rng: Source of randomness.
        name: Full name, such as ``"red circle"`` or ``"dog"``.
    """
    if name not in ICONS:
        return near_miss(rng, name)
    group = next(group for group in LOOKALIKES if name in group)
    return pick(rng, [other for other in group if other != name])


def draw_difficulties(rng: np.random.Generator) -> Difficulties:
    """Draw one or two of the four difficulties."""
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
        seed_or_rng: Seed that determines the scene, or a random generator.
        resolution_wh: Width and height in pixels; None draws a common size, 320 x 240 to 1280 x 720.
        num_objects: Number of objects, or an inclusive range of it; None: 2 to 7, or 8 to 14 in crowded scenes. A
            scene without enough room has fewer objects. Boxes include occluded parts.
    """
    # Choose the difficulties and the objects
    rng = np.random.default_rng(seed_or_rng)
    size_wh, hard = resolution_wh or pick(rng, FRAMES), draw_difficulties(rng)
    if isinstance(num_objects, int):
        num_objects = (num_objects, num_objects)
    low, high = num_objects or ((8, 14) if hard.crowded else (2, 7))
    names = _names(rng, int(rng.integers(low, high + 1)), hard.near_misses)
    colors = [icon_color(shape) if color is None else COLORS[color] for color, shape in map(split_name, names)]

    # Draw the background; without colors to avoid, it is often close to the color of an object
    background = make_background(rng, size_wh, () if hard.faint else colors)
    style = ObjectStyle(
        varied=True,
        max_overlap=0.4 if hard.crowded else 0.05,
        min_contrast=_MIN_CONTRAST if hard.faint else MIN_CONTRAST,
        min_side=_MIN_SIDE,
    )

    # Place the objects
    canvas = Canvas(background, style, rng)
    sizes = _sizes(rng, len(names), min(size_wh), hard)
    objects = [canvas.add(name, size) for name, size in zip(names, sizes, strict=True)]
    image = _veiled(canvas.image, rng) if hard.faint else canvas.image
    return Scene(apply_effects(image, rng), tuple(item for item in objects if item is not None))


def _names(rng: np.random.Generator, count: int, near_misses: bool) -> list[str]:
    """Draw the names of `count` objects: one or two repeated classes, mixed with others."""
    bases = [sample_name(rng) for _ in range(min(count, int(rng.integers(1, 3))))]
    names = list(bases)
    while len(names) < count:
        base, again = pick(rng, bases), rng.random() < 0.3
        names.append(base if again else lookalike(rng, base) if near_misses else sample_name(rng))
    rng.shuffle(names)
    return names


def _sizes(rng: np.random.Generator, count: int, short_side: int, hard: Difficulties) -> list[float]:
    """Draw the longer side of each object in pixels, uniform on a logarithmic scale.

    Small objects have at most 13 % of the frame's short side. The tiny model scales frames to about 200 pixels, and was
    trained on objects of 9 to 40 %.
    """
    low, high = (0.07, 0.13) if hard.small else (0.1, 0.22 if hard.crowded else 0.3)
    draws = rng.uniform(math.log(low), math.log(high), count).tolist()
    return [max(_MIN_SIDE, math.exp(draw) * short_side) for draw in draws]


def _veiled(image: UInt8, rng: np.random.Generator) -> UInt8:
    """Blend the image with one tone, like haze, glare or dusk, which reduces contrast by 15 to 40 %."""
    kept = float(rng.uniform(0.6, 0.85))
    tone = rng.uniform(10, 245) + rng.uniform(-12, 12, 3)
    return np.asarray((image * kept + tone * (1 - kept)).clip(0, 255), np.uint8)
