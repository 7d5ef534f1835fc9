"""Values of fields: what is accepted, whether it is written down or comes while a workflow runs.

What is written down is checked when the workflow is compiled (`checked`); what comes from a selector by the same
functions in the block, which makes error outputs of what they raise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pydantic import BeforeValidator, TypeAdapter, ValidationError, ValidationInfo

from moondream_cv.detector import check_classes
from moondream_cv.requests import Settings

T = TypeVar("T")

_NUMBER, _INTEGER, _FLAG = TypeAdapter(float), TypeAdapter(int), TypeAdapter(bool)
_MOST = 2**31 - 1
_SELECTOR = re.compile(r"\$(inputs|steps)\.\S+")
_LIKE_A_SELECTOR = re.compile(r"\$[A-Za-z_]")  # unlike "$20"


def checked(check: Callable[[Any, str], Any]) -> BeforeValidator:
    """Have a manifest read a field by one of the functions below, but for a selector."""

    def read(value: Any, info: ValidationInfo) -> Any:
        return value if is_selector(value) else check(value, str(info.field_name))

    return BeforeValidator(read)


def class_list(value: Any) -> list[str]:
    """Class names from a list, or from a string with commas or line breaks, without spaces around them.

    Raises:
        ValueError: There is none, one says nothing, is there twice or is no string.
    """
    parts = re.split(r"[,\n]", value) if isinstance(value, str) else value
    if isinstance(parts, Sequence):
        parts = [part.strip() if isinstance(part, str) else part for part in parts]
        for part in parts:
            if like_a_selector(part) or _SELECTOR.fullmatch(f"${part}"):
                raise ValueError(
                    f"class_names has {part!r}, which is no name; a selector, such as $inputs.class_names, stands for "
                    "the whole list"
                )
    return check_classes(parts, "class_names")


def like_a_selector(value: Any) -> bool:
    """Whether a value is a selector, or was meant to be one."""
    return isinstance(value, str) and _LIKE_A_SELECTOR.match(value) is not None


def is_selector(value: Any) -> bool:
    """Whether a value is known only while the workflow runs.

    Raises:
        ValueError: It looks like a selector and is none.
    """
    if not like_a_selector(value):
        return False
    if not _SELECTOR.fullmatch(value):
        raise ValueError(f"{value!r} is no selector; write $inputs.NAME or $steps.STEP.OUTPUT")
    return True


def fraction(value: Any, field: str) -> float:
    """A number in 0..1, perhaps written as a string.

    Raises:
        ValueError: It is none.
    """
    given = _read(_NUMBER, value)
    if given is None or not 0 <= given <= 1:
        raise ValueError(f"{field} must be a number in 0..1, not {value!r:.100}")
    return given


def number(value: Any, field: str) -> float:
    """A number from 0 on; otherwise as `fraction`."""
    given = _read(_NUMBER, value)
    if given is None or not 0 <= given < math.inf:
        raise ValueError(f"{field} must be a number from 0 on, not {value!r:.100}")
    return given


def count(value: Any, field: str) -> int:
    """An integer from 1 on; otherwise as `fraction`."""
    given = _read(_INTEGER, value)
    if given is None or not 1 <= given <= _MOST:
        raise ValueError(f"{field} must be an integer from 1 to {_MOST}, not {value!r:.100}")
    return given


def optional_fraction(value: Any, field: str) -> float | None:
    """As `fraction`, or None."""
    return None if value is None else fraction(value, field)


def flag(value: Any, field: str) -> bool:
    """True or false, perhaps written as a string; otherwise as `fraction`."""
    given = _read(_FLAG, value)
    if given is None:
        raise ValueError(f"{field} must be true or false, not {value!r:.100}")
    return given


def _read(adapter: TypeAdapter[T], value: Any) -> T | None:
    """A value, perhaps written as a string; None where it is no such value."""
    if isinstance(value, bool) and adapter is not _FLAG:
        return None
    try:
        return adapter.validate_python(value)
    except ValidationError:
        return None


def text_settings(max_tokens: Any, temperature: Any) -> Settings:
    """The settings of a text from two fields; raises `ValueError` for what is out of range."""
    return Settings(temperature=number(temperature, "temperature"), max_tokens=count(max_tokens, "max_tokens"))
