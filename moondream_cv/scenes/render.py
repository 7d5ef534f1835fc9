"""The renderer of training scenes.

A scene is drawn from back to front: background, objects with shadows and outlines, camera effects. Objects are inside
the frame, hardly overlap and always stand out from the background. `style="plain"` disables the variation.
`moondream_cv.scenes.clips` renders videos; held-out evaluation uses `moondream_cv.scenes.alternate`.
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

_POSITIONS = 24  # positions to try before an object is shrunk
MIN_CONTRAST: Final = 120.0  # color distance at which an object is clearly visible


@dataclass(frozen=True)
class ObjectStyle:
    """Rules for drawing and placing objects.

    Attributes:
        varied: Randomize proportions, colors, shadows and outlines; otherwise draw standard objects.
        max_overlap: Maximum overlap of two boxes, as a share of the smaller one.
        min_contrast: Color distance to the background; objects below it get an outline.
        min_side: Minimum longer side in pixels; an object that does not fit at this size is dropped.
    """

    varied: bool
    max_overlap: float
    min_contrast: float = MIN_CONTRAST
    min_side: float = MIN_SIDE


def _grown(box: Box, margin: int) -> Box:
    return box[0] - margin, box[1] - margin, box[2] + margin, box[3] + margin


def _max_overlap(box: Box, others: Sequence[Box]) -> float:
    """Return the largest intersection of `box` with another box, as a share of the smaller box."""
    worst = 0.0
    for other in others:
        width = min(box[2], other[2]) - max(box[0], other[0])
        height = min(box[3], other[3]) - max(box[1], other[1])
        if width > 0 and height > 0:
            smaller = min((box[2] - box[0]) * (box[3] - box[1]), (other[2] - other[0]) * (other[3] - other[1]))
            worst = max(worst, width * height / smaller)
    return worst


def _stands_out(background: UInt8, box: Box, rgb: tuple[float, float, float], min_contrast: float) -> bool:
    """Return whether a color has enough contrast to nearly all of the background behind a box."""
    x0, y0, x1, y1 = box
    behind = background[y0 : y1 : max(1, (y1 - y0) // 7), x0 : x1 : max(1, (x1 - x0) // 7)]
    return bool((color_distance(behind, rgb) < min_contrast).mean() < 0.12)


def _outline_color(background: UInt8, box: Box, rng: np.random.Generator) -> tuple[int, int, int]:
    """Return an RGB near black or near white, whichever contrasts with the background behind a box."""
    x0, y0, x1, y1 = box
    behind = float(background[y0 : y1 : max(1, (y1 - y0) // 7), x0 : x1 : max(1, (x1 - x0) // 7)].mean())
    level = int(rng.integers(5, 50)) if behind > 128 else int(rng.integers(215, 256))
    return level, level, level


class Canvas:
    """A background on which objects are placed one by one.

    Args:
        background: [H, W, 3] uint8, RGB.
        style: Rules for drawing and placing objects.
        rng: Source of randomness.
    """

    def __init__(self, background: UInt8, style: ObjectStyle, rng: np.random.Generator) -> None:
        self.background = background
        self.image = background.copy()
        self.style = style
        self.rng = rng
        self.boxes: list[Box] = []

    def find_position(
        self, width: int, height: int, margin: int, rgb: tuple[float, float, float]
    ) -> tuple[Box, bool] | None:
        """Find a free position for an object, preferably one at which it stands out.

        Args:
            width: Width of the object in pixels.
            height: Height of the object in pixels.
            margin: Free pixels around the object, for an outline.
            rgb: Color of the object, 0..255.

        Returns:
            The box and whether the color stands out there; None if no tried position is free.
        """
        frame_height, frame_width = self.image.shape[:2]
        room_x, room_y = frame_width - width - 2 * margin - 1, frame_height - height - 2 * margin - 1
        if room_x < 1 or room_y < 1:
            return None
        free: Box | None = None
        for across, down in self.rng.random((_POSITIONS, 2)).tolist():
            x, y = 1 + margin + int(across * room_x), 1 + margin + int(down * room_y)
            box = (x, y, x + width, y + height)
            if _max_overlap(_grown(box, margin), self.boxes) > self.style.max_overlap:
                continue
            if _stands_out(self.background, box, rgb, self.style.min_contrast):
                return box, True
            free = free or box
        return (free, False) if free else None

    def add(self, name: str, size: float) -> SceneObject | None:
        """Draw an object at a free position, and shrink it until it fits.

        Args:
            name: Full name, such as ``"red circle"``.
            size: Longer side in pixels.

        Returns:
            The object, or None if it does not fit even at the minimum size.
        """
        # Find a position
        rng, varied = self.rng, self.style.varied
        shadow, line = varied and rng.random() < 0.2, varied and rng.random() < 0.15
        while True:
            patch = paint(name, size, rng, varied=varied, shadow=shadow)
            thickness = max(1, round(size * (float(rng.uniform(0.015, 0.06)) if varied else 0.03)))
            position = self.find_position(*patch.box[2:], thickness, patch.mean_rgb)
            if position is not None:
                break
            if size <= self.style.min_side:
                return None
            size = max(float(self.style.min_side), size * 0.8)

        # Draw the object, with an outline if it would not stand out
        box, stands_out = position
        if line or not stands_out:
            patch = outlined(patch, _outline_color(self.background, box, rng), thickness)
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
        seed_or_rng: Seed that determines the scene, or a random generator.
        resolution_wh: Width and height in pixels; None draws a random size, mostly small.
        num_objects: Number of objects, or an inclusive range of it; None: 1 to 8. A frame without enough room has
            fewer objects.
        style: ``"train"`` randomizes everything; ``"plain"`` draws flat standard objects on one color.
        allow_overlap: Allow boxes to overlap by 1/3 of the smaller one instead of 1/20. Boxes include occluded parts.
        names: Names of the objects in drawing order, instead of random ones. A shape without a color gets a random one.

    Raises:
        ValueError: A name or the style is unknown, both `names` and `num_objects` are given, or the frame has no room
            for all `names`.
    """
    # Choose the size and the objects
    if style not in get_args(Style):
        raise ValueError(f"style must be one of {', '.join(get_args(Style))}, got {style!r}")
    if names is not None and num_objects is not None:
        raise ValueError(f"names sets the number of objects; got num_objects={num_objects!r} as well, remove one")
    rng = np.random.default_rng(seed_or_rng)
    size_wh = resolution_wh or sample_resolution(rng)
    chosen = sample_names(rng, sample_count(rng, num_objects)) if names is None else with_colors(rng, names)
    parts = [split_name(name) for name in chosen]
    avoid = [icon_color(shape) if color is None else COLORS[color] for color, shape in parts]

    # Draw the background
    varied = style == "train"
    background = make_background(rng, size_wh, avoid, plain=not varied)

    # Place the objects
    canvas = Canvas(background, ObjectStyle(varied, 1 / 3 if allow_overlap else 0.05), rng)
    sizes = sample_sizes(rng, len(chosen), min(size_wh))
    objects = [canvas.add(name, size) for name, size in zip(chosen, sizes, strict=True)]
    if names is not None and None in objects:
        raise ValueError(f"{len(names)} objects do not fit into a frame of {size_wh[0]}x{size_wh[1]} pixels")
    image = apply_effects(canvas.image, rng) if varied else canvas.image
    return Scene(image, tuple(item for item in objects if item is not None))
