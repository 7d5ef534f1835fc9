"""The training renderer: one call makes one scene, as varied as the model has to cope with.

A scene is drawn from back to front: background, objects with shadows and outlines, camera effects. Objects lie within
the frame, hardly overlap and always stand out from what is behind them. `style="plain"` turns the variation off.
Moving clips are made in `moondream_cv.scenes.clips`; held-out evaluation uses `moondream_cv.scenes.alternate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from .backgrounds import color_distance, make_background
from .effects import apply_effects
from .objects import outlined, paint, stamp
from .sampling import MIN_SIDE, sample_count, sample_names, sample_resolution, sample_sizes, with_colors
from .scene import Scene, SceneObject
from .sprites import icon_color
from .world import COLORS, split_name

Style = Literal["train", "plain"]
Box = tuple[int, int, int, int]  # left, top, right, bottom
UInt8 = npt.NDArray[np.uint8]

_PLACES = 24  # positions tried before an object shrinks
DISTINCT: Final = 120.0  # color distance from which two colors are told apart at a glance


@dataclass(frozen=True)
class Look:
    """How objects are drawn and placed.

    Attributes:
        varied: Draw proportions, colors, shadows and outlines at random; otherwise canonical objects.
        max_cover: Share of the smaller of two boxes that the other may cover.
        distinct: Color distance to what is behind it below which an object gets an outline.
        min_side: Longer side in pixels below which an object is left out rather than shrunk further.
    """

    varied: bool
    max_cover: float
    distinct: float = DISTINCT
    min_side: float = MIN_SIDE


def _grown(box: Box, margin: int) -> Box:
    return box[0] - margin, box[1] - margin, box[2] + margin, box[3] + margin


def _covered(box: Box, others: Sequence[Box]) -> float:
    """Return the largest share that `box` has in common with any other box, of the smaller one's area."""
    worst = 0.0
    for other in others:
        width = min(box[2], other[2]) - max(box[0], other[0])
        height = min(box[3], other[3]) - max(box[1], other[1])
        if width > 0 and height > 0:
            smaller = min((box[2] - box[0]) * (box[3] - box[1]), (other[2] - other[0]) * (other[3] - other[1]))
            worst = max(worst, width * height / smaller)
    return worst


def _stands_out(background: UInt8, box: Box, rgb: tuple[float, float, float], distinct: float) -> bool:
    """Whether a color differs by `distinct` from nearly all of the background behind a box."""
    x0, y0, x1, y1 = box
    behind = background[y0 : y1 : max(1, (y1 - y0) // 7), x0 : x1 : max(1, (x1 - x0) // 7)]
    return bool((color_distance(behind, rgb) < distinct).mean() < 0.12)


def _contrasting(background: UInt8, box: Box, rng: np.random.Generator) -> tuple[int, int, int]:
    """Return an outline's RGB, nearly black or nearly white, that shows on the background behind a box."""
    x0, y0, x1, y1 = box
    behind = float(background[y0 : y1 : max(1, (y1 - y0) // 7), x0 : x1 : max(1, (x1 - x0) // 7)].mean())
    level = int(rng.integers(5, 50)) if behind > 128 else int(rng.integers(215, 256))
    return level, level, level


class Canvas:
    """A background on which objects are placed one after the other."""

    def __init__(self, background: UInt8, look: Look, rng: np.random.Generator) -> None:
        self.background = background
        self.image = background.copy()
        self.look = look
        self.rng = rng
        self.boxes: list[Box] = []

    def find_place(
        self, width: int, height: int, margin: int, rgb: tuple[float, float, float]
    ) -> tuple[Box, bool] | None:
        """Find a place for an object.

        Args:
            width: Width of the object in pixels.
            height: Height of the object in pixels.
            margin: Free pixels around it, room for an outline.
            rgb: The object's color.

        Returns:
            A box and whether `rgb` stands out there, or None if no box is free.
        """
        frame_height, frame_width = self.image.shape[:2]
        room_x, room_y = frame_width - width - 2 * margin - 1, frame_height - height - 2 * margin - 1
        if room_x < 1 or room_y < 1:
            return None
        free: Box | None = None
        for across, down in self.rng.random((_PLACES, 2)).tolist():
            x, y = 1 + margin + int(across * room_x), 1 + margin + int(down * room_y)
            box = (x, y, x + width, y + height)
            if _covered(_grown(box, margin), self.boxes) > self.look.max_cover:
                continue
            if _stands_out(self.background, box, rgb, self.look.distinct):
                return box, True
            free = free or box
        return (free, False) if free else None

    def add(self, name: str, size: float) -> SceneObject | None:
        """Paint an object, shrinking it until it finds a place; None if there is none even for the smallest."""
        rng, varied = self.rng, self.look.varied
        shadow, line = varied and rng.random() < 0.2, varied and rng.random() < 0.15
        while True:
            patch = paint(name, size, rng, varied=varied, shadow=shadow)
            thickness = max(1, round(size * (float(rng.uniform(0.015, 0.06)) if varied else 0.03)))
            place = self.find_place(*patch.box[2:], thickness, patch.mean_rgb)
            if place is not None:
                break
            if size <= self.look.min_side:
                return None
            size = max(float(self.look.min_side), size * 0.8)
        box, visible = place
        if line or not visible:
            patch = outlined(patch, _contrasting(self.background, box, rng), thickness)
            box = _grown(box, thickness)
        stamp(self.image, patch, box[0], box[1])
        self.boxes.append(box)
        left, top = float(box[0]), float(box[1])
        return SceneObject.from_name(name, (left, top, left + patch.box[2], top + patch.box[3]))


def render_scene(
    seed_or_rng: int | np.random.Generator,
    *,
    resolution_wh: tuple[int, int] | None = None,
    num_objects: int | tuple[int, int] | None = None,
    style: Style = "train",
    allow_overlap: bool = False,
    names: Sequence[str] | None = None,
) -> Scene:
    """Render one scene with its ground truth.

    Args:
        seed_or_rng: A seed, which fixes the scene, or a generator to draw from.
        resolution_wh: Width and height in pixels; None draws one, mostly small.
        num_objects: How many objects, an inclusive range to draw from, or None for 1 to 8. A frame too small for them
            all holds fewer.
        style: ``"train"`` varies everything; ``"plain"`` draws canonical objects flat on one color.
        allow_overlap: Let boxes cover each other up to a third instead of a twentieth. A box is that of the whole
            object, the hidden part included.
        names: Exactly the objects to draw, in drawing order, instead of a random choice. A shape without a color gets
            a random one.

    Raises:
        ValueError: If a name or the style is unknown, both `names` and `num_objects` are given, or the frame has no
            room for all `names`.
    """
    if style not in get_args(Style):
        raise ValueError(f"unknown style {style!r}; known are {', '.join(get_args(Style))}")
    if names is not None and num_objects is not None:
        raise ValueError(f"names already says how many objects there are; got num_objects={num_objects!r} as well")
    rng = np.random.default_rng(seed_or_rng)
    size_wh = resolution_wh or sample_resolution(rng)
    chosen = sample_names(rng, sample_count(rng, num_objects)) if names is None else with_colors(rng, names)
    parts = [split_name(name) for name in chosen]
    avoid = [icon_color(shape) if color is None else COLORS[color] for color, shape in parts]
    varied = style == "train"
    background = make_background(rng, size_wh, avoid, plain=not varied)
    canvas = Canvas(background, Look(varied, 1 / 3 if allow_overlap else 0.05), rng)
    sizes = sample_sizes(rng, len(chosen), min(size_wh))
    objects = [canvas.add(name, size) for name, size in zip(chosen, sizes, strict=True)]
    if names is not None and None in objects:
        raise ValueError(f"{len(names)} objects do not fit into a frame of {size_wh[0]}x{size_wh[1]} pixels")
    image = apply_effects(canvas.image, rng) if varied else canvas.image
    return Scene(image, tuple(item for item in objects if item is not None))
