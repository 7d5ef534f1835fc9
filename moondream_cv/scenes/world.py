"""The vocabulary of the synthetic scenes: 8 shapes in 8 colors, 32 icons, and a shape for fine-tuning.

Names are plain English, such as ``"red circle"`` for a colored shape and ``"dog"`` for an icon. A query can name a
shape in any color (``"circle"``), but not a color alone. The renderers define the appearance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

SHAPES: Final[tuple[str, ...]] = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond")

UNSEEN_SHAPES: Final[tuple[str, ...]] = ("arrow",)
"""Shapes that the tiny model was not trained on, to teach it something new. Scenes contain them only by name."""

COLORS: Final[dict[str, tuple[int, int, int]]] = {  # RGB
    "red": (215, 35, 35),
    "green": (40, 160, 60),
    "blue": (40, 80, 215),
    "yellow": (245, 215, 40),
    "orange": (245, 135, 25),
    "purple": (140, 50, 175),
    "black": (20, 20, 22),
    "white": (245, 245, 245),
}

GLYPHS: Final[dict[str, str]] = {  # icon name -> emoji of its sprite, in the order of the sprite sheet
    "dog": "🐕",
    "cat": "🐈",
    "car": "🚗",
    "bus": "🚌",
    "bicycle": "🚲",
    "airplane": "✈",
    "boat": "⛵",
    "house": "🏠",
    "tree": "🌳",
    "apple": "🍎",
    "banana": "🍌",
    "pizza": "🍕",
    "ball": "⚽",
    "clock": "⏰",
    "book": "📕",
    "umbrella": "☂",
    "horse": "🐎",
    "cow": "🐄",
    "elephant": "🐘",
    "bird": "🐦",
    "fish": "🐟",
    "rocket": "🚀",
    "truck": "🚚",
    "train": "🚂",
    "flower": "🌻",
    "guitar": "🎸",
    "phone": "📱",
    "laptop": "💻",
    "key": "🔑",
    "cup": "☕",
    "cake": "🎂",
    "donut": "🍩",
}

ICONS: Final[tuple[str, ...]] = tuple(GLYPHS)

COLORED_SHAPES: Final[tuple[str, ...]] = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)

ALL_NAMES: Final[tuple[str, ...]] = COLORED_SHAPES + ICONS
"""All full names of objects: 64 colored shapes and 32 icons."""

_IRREGULAR_PLURALS: Final[dict[str, str]] = {"fish": "fish"}


def split_name(name: str) -> tuple[str | None, str]:
    """Split a name into its color and its shape or icon.

    Args:
        name: ``"red circle"``, ``"circle"`` or ``"dog"``.

    Returns:
        ``("red", "circle")``, ``(None, "circle")`` or ``(None, "dog")``.

    Raises:
        ValueError: The name is not in the vocabulary, such as ``"red"`` or ``"red dog"``.
    """
    color, _, shape = name.rpartition(" ")
    is_shape = shape in SHAPES or shape in UNSEEN_SHAPES
    if (not color and (is_shape or shape in GLYPHS)) or (color in COLORS and is_shape):
        return color or None, shape
    raise ValueError(f"unknown name {name!r}; valid names are, for example, 'red circle', 'circle' and 'dog'")


def article(name: str) -> str:
    """Return the indefinite article of a name: ``"an"`` for ``"orange ring"``, ``"a"`` for ``"dog"``."""
    return "an" if name[:1].lower() in "aeiou" else "a"


def with_article(name: str) -> str:
    """Return a name with its indefinite article: ``"an apple"``."""
    return f"{article(name)} {name}"


def listing(items: Sequence[str]) -> str:
    """Join items in English: ``"a dog, a cat and a cup"``."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def short_caption(names: Sequence[str]) -> str:
    """Return the short caption of an image, such as ``"A red circle, a dog and a cup."``.

    Args:
        names: Full names of the objects, from left to right.
    """
    text = listing([with_article(name) for name in names]) or "an empty picture"
    return f"{text[:1].upper()}{text[1:]}."


def plural(name: str) -> str:
    """Return the plural of a name: ``"buses"``, ``"red crosses"``, ``"fish"``."""
    head, space, noun = name.rpartition(" ")
    if noun in _IRREGULAR_PLURALS:
        noun = _IRREGULAR_PLURALS[noun]
    elif noun.endswith(("s", "x", "z", "ch", "sh")):
        noun += "es"
    elif noun.endswith("y") and noun[-2:-1] not in tuple("aeiou"):
        noun = noun[:-1] + "ies"
    else:
        noun += "s"
    return f"{head}{space}{noun}"


def query_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return all queries that match objects with the given full names, sorted: ``"red circle"`` and ``"circle"``."""
    return tuple(sorted({query for name in names for query in (name, split_name(name)[1])}))
