"""The ground truth: what lies where in a picture. Plain values, shared by every renderer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from .world import split_name


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene.

    Attributes:
        name: Its full name, ``"red circle"`` or ``"dog"``.
        kind: ``"shape"`` or ``"icon"``.
        shape: The shape's or the icon's name without color.
        color: The color's name; None for icons.
        xyxy: Left, top, right and bottom in pixels, edges of the box tight around all pixels that are more than half
            covered: a lone pixel at column 3, row 5 has the box (3, 5, 4, 6).
    """

    name: str
    kind: Literal["shape", "icon"]
    shape: str
    color: str | None
    xyxy: tuple[float, float, float, float]

    @classmethod
    def from_name(cls, name: str, xyxy: tuple[float, float, float, float]) -> SceneObject:
        """Build an object from its full name and its box in pixels."""
        color, shape = split_name(name)
        return cls(name, "icon" if color is None else "shape", shape, color, xyxy)

    @property
    def center(self) -> tuple[float, float]:
        """Center of the box, x and y in pixels."""
        return (self.xyxy[0] + self.xyxy[2]) / 2, (self.xyxy[1] + self.xyxy[3]) / 2

    def answers(self, query: str) -> bool:
        """Whether a query means this object: ``"red circle"`` exactly, ``"circle"`` in any color, ``"dog"``."""
        return query in (self.name, self.shape)


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture and what it shows.

    Attributes:
        image: [H, W, 3] uint8, RGB.
        objects: The objects in drawing order.
    """

    image: npt.NDArray[np.uint8]
    objects: tuple[SceneObject, ...]

    @property
    def resolution_wh(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.image.shape[1], self.image.shape[0]

    def named(self, query: str) -> tuple[SceneObject, ...]:
        """Return the objects that a query name means, left to right.

        Args:
            query: ``"red circle"``, ``"circle"`` for any color, or ``"dog"``.

        Raises:
            ValueError: If the query is not a name of this world. A color alone (``"red"``) is none.
        """
        split_name(query)
        return tuple(sorted((item for item in self.objects if item.answers(query)), key=lambda item: item.xyxy))
