"""Checks of nested values from Python callers and from JSON.

Each function receives the path of the value for its message, such as "groups[2].rewards[0]", and raises a `ValueError`
for every other value. The checks of numbers and strings in `arguments.py` take a path as the name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any, TypeVar

import numpy as np

from moondream_cv.arguments import check_probability, check_text
from moondream_cv.requests import MAX_PROMPT_CHARACTERS, Grounding

MAX_REGIONS = 1000  # boxes or points of one request; the decoder's context has room for fewer
POINT_KEYS = ("x", "y")
BOX_KEYS = ("x_min", "y_min", "x_max", "y_max")
_MAX_EXACT_INTEGER = 2**53  # larger integers change in clients whose numbers are doubles

XY = tuple[float, float]
Box = tuple[float, float, float, float]
T = TypeVar("T")


@contextmanager
def limited_nesting(path: str) -> Iterator[None]:
    """Raise a `ValueError` if a value has more nested levels than Python can print in a message."""
    try:
        yield
    except RecursionError as error:
        raise ValueError(f"{path} has too many nested levels; send fewer levels of lists and objects") from error


def check_mapping(
    path: str, value: object, allowed: Collection[str] | None = None, required: Sequence[str] = ()
) -> dict[str, Any]:
    """Return a mapping as a dict. Keys whose value is None count as missing.

    Args:
        path: Path of the value.
        value: Value to check.
        allowed: Keys that the mapping may have; None for any.
        required: Keys that it must have.

    Raises:
        ValueError: The value is not a mapping, has another key, or a required key is missing.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{path} must be an object with named values, got {type(value).__name__}: {value!r:.100}")
    given = {key: item for key, item in value.items() if item is not None}
    other = [] if allowed is None else [key for key in given if key not in allowed]
    if other:
        raise ValueError(
            f"{path} has keys that are not allowed: {other!r:.100}; allowed keys: {', '.join(allowed or ())}"
        )
    for key in required:
        if key not in given:
            raise ValueError(f"{path}.{key} is missing; got the keys {list(value)!r:.100}")
    return given


def check_list(path: str, value: object, low: int = 0, high: int | None = None) -> list[Any]:
    """Return a list, tuple or array as a list.

    Args:
        path: Path of the value.
        value: Value to check.
        low: Minimum number of items.
        high: Maximum number of items; None for no maximum.

    Raises:
        ValueError: The value is not a list, or has too few or too many items.
    """
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        raise ValueError(f"{path} must be a list, got {type(value).__name__}: {value!r:.100}")
    if len(value) < low or (high is not None and len(value) > high):
        limits = f"at least {low}" if high is None else str(low) if low == high else f"{low} to {high:,}"
        raise ValueError(f"{path} must have {limits} items, got {len(value):,}")
    return list(value)


def check_items(
    path: str, value: object, check: Callable[[str, object], T], low: int = 0, high: int | None = None
) -> tuple[T, ...]:
    """Return the items of a list after a check of each.

    Args:
        path: Path of the value.
        value: Value to check.
        check: Check of an item, with its path and value.
        low: Minimum number of items.
        high: Maximum number of items; None for no maximum.

    Raises:
        ValueError: The value is not a list, has too few or too many items, or an item fails its check.
    """
    return tuple(check(f"{path}[{index}]", item) for index, item in enumerate(check_list(path, value, low, high)))


def check_finite(path: str, value: object) -> float:
    """Return a finite number as a float.

    Raises:
        ValueError: The value is not a number, or is infinite or NaN.
    """
    number = math.nan
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{path} must be a finite number, got {value!r:.100}")
    return number


def check_index(path: str, value: object) -> int:
    """Return an integer of at least 0; a float without a fraction, such as 1.0, is accepted.

    Raises:
        ValueError: The value is not such a number, or is above 2**53.
    """
    number = check_finite(path, value)
    if not number.is_integer() or not 0 <= number <= _MAX_EXACT_INTEGER:
        raise ValueError(f"{path} must be an integer of at least 0, got {value!r:.100}")
    return int(number)


def check_string(path: str, value: object) -> str:
    """Return a string, which may be empty.

    Raises:
        ValueError: The value is not a string.
    """
    if not isinstance(value, str):
        raise ValueError(f"{path} must be a string, got {type(value).__name__}: {value!r:.100}")
    return value


def check_prompt(path: str, value: object) -> str:
    """Return text that the tokenizer accepts: not blank, valid Unicode, at most 100,000 characters.

    Raises:
        ValueError: The value is not such a text.
    """
    text = check_text(path, value)
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise ValueError(f"{path} must have at most {MAX_PROMPT_CHARACTERS:,} characters, got {len(text):,}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{path} must be valid Unicode text, got {text!r:.100}") from error
    return text


def check_fraction(path: str, value: object) -> float:
    """Return a coordinate as a fraction of the width or height of the image.

    Args:
        path: Path of the value.
        value: Number between 0 and 1.

    Raises:
        ValueError: The value is not such a number.
    """
    try:
        return check_probability(path, value)
    except ValueError as error:
        raise ValueError(f"{error}; divide pixels by the width and height of the image") from None


def check_coordinates(
    path: str, value: object, keys: Sequence[str], check: Callable[[str, object], float]
) -> tuple[float, ...]:
    """Return the coordinates of a point or a box.

    Args:
        path: Path of the value.
        value: Mapping with the keys, or a list of numbers in their order.
        keys: Names of the coordinates.
        check: Check of each coordinate, with its path and value.

    Raises:
        ValueError: The value has neither form, or a coordinate fails its check.
    """
    if isinstance(value, Mapping):
        named = check_mapping(path, value, keys, required=keys)
        return tuple(check(f"{path}.{key}", named[key]) for key in keys)
    if not isinstance(value, list | tuple | np.ndarray):
        raise ValueError(f"{path} must be [{', '.join(keys)}] or an object with these keys, got {value!r:.100}")
    items = check_list(path, value, len(keys), len(keys))
    return tuple(check(f"{path}[{index}]", item) for index, item in enumerate(items))


def check_point(path: str, value: object, check: Callable[[str, object], float] = check_fraction) -> XY:
    """Return a point as x and y.

    Args:
        path: Path of the value.
        value: [x, y] or {"x", "y"}.
        check: Check of each coordinate; by default a fraction between 0 and 1.

    Raises:
        ValueError: The value is not a point, or a coordinate fails its check.
    """
    x, y = check_coordinates(path, value, POINT_KEYS, check)
    return x, y


def check_box(path: str, value: object) -> Box:
    """Return a box as x_min, y_min, x_max and y_max.

    Args:
        path: Path of the value.
        value: [x_min, y_min, x_max, y_max] or an object with these keys, as fractions between 0 and 1.

    Raises:
        ValueError: The value is not a box, a coordinate is not a fraction, or the box has no area.
    """
    x_min, y_min, x_max, y_max = check_coordinates(path, value, BOX_KEYS, check_fraction)
    if x_max <= x_min or y_max <= y_min:
        raise ValueError(f"{path} must have a positive area: x_min < x_max and y_min < y_max, got {value!r:.100}")
    return x_min, y_min, x_max, y_max


def check_points(path: str, value: object) -> tuple[XY, ...]:
    """Return up to 1,000 points, as fractions. An empty list is valid.

    Raises:
        ValueError: The value is not a list of points, or has too many.
    """
    return check_items(path, value, check_point, 0, MAX_REGIONS)


def check_boxes(path: str, value: object) -> tuple[Box, ...]:
    """Return up to 1,000 boxes, as fractions. An empty list is valid.

    Raises:
        ValueError: The value is not a list of boxes, or has too many.
    """
    return check_items(path, value, check_box, 0, MAX_REGIONS)


def check_grounding(path: str, value: object, check: Callable[[str, object], float] = check_fraction) -> Grounding:
    """Return the points that a part of a reasoning text refers to.

    Args:
        path: Path of the value.
        value: {"start_idx", "end_idx", "points"}: characters of the text, and points.
        check: Check of each coordinate; by default a fraction between 0 and 1.

    Raises:
        ValueError: A key is unknown or missing, or a value has another type.
    """
    keys = ("start_idx", "end_idx", "points")
    given = check_mapping(path, value, keys, required=keys)
    start, end = (check_index(f"{path}.{key}", given[key]) for key in keys[:2])
    points = check_items(f"{path}.points", given["points"], lambda at, item: check_point(at, item, check))
    return Grounding(start, end, points)
