"""Scenes and their objects: the image and ground truth that every renderer returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from moondream_cv._deprecation import renamed_attribute, renamed_function

from .world import split_name


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene.

    Attributes:
        name: Full name, such as ``"red circle"`` or ``"dog"``.
        kind: ``"shape"`` or ``"icon"``.
        shape: Name of the shape or icon, without the color.
        color: Name of the color; None for icons.
        xyxy: Left, top, right and bottom in pixels, tight around all pixels that are more than half covered: a single
            pixel in column 3 and row 5 has the box (3, 5, 4, 6).
    """

    name: str
    kind: Literal["shape", "icon"]
    shape: str
    color: str | None
    xyxy: tuple[float, float, float, float]

    @classmethod
    def from_name(cls, name: str, xyxy: tuple[float, float, float, float]) -> SceneObject:
        """Create an object from its full name and its xyxy box in pixels."""
        color, shape = split_name(name)
        return cls(name, "icon" if color is None else "shape", shape, color, xyxy)

    @property
    def center(self) -> tuple[float, float]:
        """Center of the box, x and y in pixels."""
        return (self.xyxy[0] + self.xyxy[2]) / 2, (self.xyxy[1] + self.xyxy[3]) / 2

    def matches(self, query: str) -> bool:
        """Return whether a query matches this object: a full name, or a shape in any color."""
        return query in (self.name, self.shape)

    colour = renamed_attribute("SceneObject.colour", "color")
    centre = renamed_attribute("SceneObject.centre", "center")
    answers = renamed_function("SceneObject.answers", "SceneObject.matches", matches)


@dataclass(frozen=True, eq=False)
class Scene:
    """An image with ground truth.

    Attributes:
        image: [H, W, 3] uint8, RGB.
        objects: Objects in drawing order.
    """

    image: npt.NDArray[np.uint8]
    objects: tuple[SceneObject, ...]

    @property
    def resolution_wh(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.image.shape[1], self.image.shape[0]

    def named(self, query: str) -> tuple[SceneObject, ...]:
        """Return the objects that match a query, from left to right.

        Args:
            query: ``"red circle"``, ``"circle"`` for any color, or ``"dog"``.

        Raises:
            ValueError: The query is not a name of an object. A color alone, such as ``"red"``, is not a name.
        """
        split_name(query)
        return tuple(sorted((item for item in self.objects if item.matches(query)), key=lambda item: item.xyxy))
