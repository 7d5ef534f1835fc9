"""Argument checks: each returns the value, or raises a `ValueError` with the name of the argument and the value."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import TypeVar

Choice = TypeVar("Choice", bound=str)


def check_probability(name: str, value: object) -> float:
    """Return a number between 0 and 1, both included.

    Args:
        name: Name of the argument.
        value: Value to check.

    Raises:
        ValueError: The value is not a number between 0 and 1.
    """
    return check_range(name, value, 0, 1)


def check_share(name: str, value: object) -> float:
    """Return a number above 0 and at most 1.

    Raises:
        ValueError: The value is not a number, is 0 or less, or is above 1.
    """
    number = _number(value)
    if number is None or not 0 < number <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value!r:.100}")
    return number


def check_range(name: str, value: object, low: float, high: float) -> float:
    """Return a number between two limits, both included.

    Raises:
        ValueError: The value is not a number, or is outside the limits.
    """
    number = _number(value)
    if number is None or not low <= number <= high:
        raise ValueError(f"{name} must be between {low:g} and {high:g}, got {value!r:.100}")
    return number


def check_positive(name: str, value: object, unit: str = "") -> float:
    """Return a finite number above 0.

    Args:
        name: Name of the argument.
        value: Value to check.
        unit: Unit in the message, such as "seconds".

    Raises:
        ValueError: The value is not a finite number above 0.
    """
    number = _number(value)
    if number is None or not 0 < number < math.inf:
        raise ValueError(f"{name} must be a positive number{f' of {unit}' if unit else ''}, got {value!r:.100}")
    return number


def check_not_negative(name: str, value: object, unit: str = "") -> float:
    """Return a finite number that is 0 or more.

    Args:
        name: Name of the argument.
        value: Value to check.
        unit: Unit in the message, such as "seconds".

    Raises:
        ValueError: The value is not a finite number, or is negative.
    """
    number = _number(value)
    if number is None or not 0 <= number < math.inf:
        raise ValueError(f"{name} must be 0 or more{f' {unit}' if unit else ''}, got {value!r:.100}")
    return number


def check_integer(name: str, value: object, low: int = 1, high: int | None = None) -> int:
    """Return an integer of at least `low` and, unless it is None, at most `high`.

    Raises:
        ValueError: The value is not an integer, or is outside the limits.
    """
    number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if number is None or number < low or (high is not None and number > high):
        kind = f"an integer of at least {low}" if high is None else f"an integer between {low} and {high}"
        raise ValueError(f"{name} must be {kind}, got {value!r:.100}")
    return number


def check_flag(name: str, value: object) -> bool:
    """Return True or False.

    Raises:
        ValueError: The value is not a bool.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r:.100}")
    return value


def check_choice(name: str, value: object, choices: Iterable[Choice]) -> Choice:
    """Return one of several strings.

    Raises:
        ValueError: The value is not one of the choices.
    """
    known = list(choices)
    for choice in known:
        if isinstance(value, str) and value == choice:
            return choice
    raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r:.100}")


def check_text(name: str, value: object) -> str:
    """Return a string that is neither empty nor blank.

    Raises:
        ValueError: The value is not a string, is empty or is blank.
    """
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {type(value).__name__}: {value!r:.100}")
    if not value.strip():
        raise ValueError(f"{name} must not be empty, got {value!r:.100}")
    return value


def check_unique(name: str, values: Sequence[str]) -> list[str]:
    """Return strings as a list.

    Raises:
        ValueError: A string occurs more than once.
    """
    repeated = sorted({value for value in values if values.count(value) > 1})
    if repeated:
        raise ValueError(f"{name} must be unique; duplicates: {', '.join(map(repr, repeated))}")
    return list(values)


def check_classes(classes: str | Sequence[str], name: str = "classes") -> list[str]:
    """Return class names as a list, in their order.

    Args:
        classes: Class name, or sequence of different class names.
        name: Name of the argument.

    Raises:
        ValueError: There is no class name; a class name is not a string, is blank or occurs more than once; or
            `classes` is not a sequence.
    """
    names = [classes] if isinstance(classes, str) else classes
    if not isinstance(names, Sequence) or isinstance(names, (bytes, bytearray, memoryview)):
        raise ValueError(
            f"{name} must be a string or a sequence of strings, got {type(classes).__name__}: {classes!r:.100}"
        )
    if not names:
        raise ValueError(f"{name} must have at least one class name, got {classes!r}")
    for index, value in enumerate(names):
        check_text(f"{name}[{index}]", value)
    return check_unique(name, names)


def _number(value: object) -> float | None:
    """Return a real number as a float; None for other values, bool included."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
