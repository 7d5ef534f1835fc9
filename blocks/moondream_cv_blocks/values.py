"""Parse and check the values of fields, both literals and values of selectors.

Literals are checked when a workflow is compiled, through `parsed_by`. Values of selectors are known only at run time:
the blocks check them with the same functions, and convert exceptions to error outputs.
"""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from collections.abc import Callable
from typing import Any

import numpy as np
from pydantic import BeforeValidator, TypeAdapter, ValidationError, ValidationInfo

from moondream_cv.arguments import check_classes, check_flag, check_integer, check_probability, check_range
from moondream_cv.requests import Settings

_NUMBER, _INTEGER, _FLAG = TypeAdapter(float), TypeAdapter(int), TypeAdapter(bool)
MAX_COUNT = 2**31 - 1
MAX_TEMPERATURE = 2.0
_SELECTOR = re.compile(r"\$(inputs|steps)\.\S+")
_SELECTOR_PREFIX = re.compile(r"\$[A-Za-z_]")  # unlike "$20"


def parsed_by(check: Callable[[Any, str], Any]) -> BeforeValidator:
    """Return a pydantic validator that parses a field with one of the functions below, unless it is a selector.

    Args:
        check: Function of a value and a field name that returns the parsed value.
    """

    def read(value: Any, info: ValidationInfo) -> Any:
        return value if is_selector(value) else check(value, str(info.field_name))

    return BeforeValidator(read)


def parse_class_names(value: Any) -> list[str]:
    """Return class names without surrounding spaces.

    Args:
        value: List of names; or a string with names separated by commas or line breaks, or with a list in JSON or
            Python notation, which `roboflow_core/inner_workflow@v1` makes of lists.

    Raises:
        ValueError: There is no name; a name is empty, repeated or not a string; or a string in brackets is not a list.
    """
    parts = _split_names(value) if isinstance(value, str) else value
    if isinstance(parts, np.ndarray):
        parts = parts.tolist()
    if not isinstance(parts, (list, tuple)):
        raise ValueError(
            "class_names must be a list of names, or names separated by commas, "
            f"got {type(value).__name__}: {value!r:.100}"
        )
    parts = [part.strip() if isinstance(part, str) else part for part in parts]
    for part in parts:
        if isinstance(part, str) and (resembles_selector(part) or _SELECTOR.fullmatch(f"${part}")):
            raise ValueError(
                f"class_names must not contain {part!r}; use a selector, such as $inputs.class_names, for the whole "
                "list"
            )
    return check_classes(parts, "class_names")


def _split_names(text: str) -> list[Any]:
    """Return the class names in a string.

    Raises:
        ValueError: The string is in brackets but is not a list.
    """
    stripped = text.strip()
    in_brackets = stripped[:1] + stripped[-1:] in ("[]", "()", "{}")
    if in_brackets or stripped.startswith(('"', "'")):
        listed = _parsed_list(stripped if in_brackets else f"[{stripped}]")
        if listed is not None:
            return listed
    if stripped[:1] + stripped[-1:] == "[]":
        raise ValueError(
            f'class_names must be a valid list, got {text!r:.100}; write ["dog", "red car"], or dog, red car without '
            "brackets"
        )
    return re.split(r"[,\n]", text)


def _parsed_list(text: str) -> list[Any] | None:
    """Return the items of a list in JSON, Python or NumPy notation; None if the text is not a list."""
    try:
        items = json.loads(text)
        return items if isinstance(items, list) else None
    except (ValueError, RecursionError):
        pass
    try:
        tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.string.strip()]
        brackets = [token.string for token in tokens if token.string in tuple("[](){}")]
        items = [ast.literal_eval(token.string) for token in tokens if token.type == tokenize.STRING]
    except (ValueError, SyntaxError, tokenize.TokenError):
        return None
    others = [token for token in tokens if token.type != tokenize.STRING and token.string not in tuple("[](){},")]
    return None if others or len(brackets) != 2 else items


def resembles_selector(value: Any) -> bool:
    """Return whether a value starts like a selector, valid or not."""
    return isinstance(value, str) and _SELECTOR_PREFIX.match(value) is not None


def is_selector(value: Any) -> bool:
    """Return whether a value is a selector, whose value is known only at run time.

    Raises:
        ValueError: The value starts like a selector but is not valid.
    """
    if not resembles_selector(value):
        return False
    if not _SELECTOR.fullmatch(value):
        raise ValueError(f"invalid selector {value!r}; write $inputs.NAME or $steps.STEP.OUTPUT")
    return True


def parse_fraction(value: Any, field: str) -> float:
    """Return a number between 0 and 1, given as a number or as text.

    Args:
        value: Value of the field.
        field: Name of the field.

    Raises:
        ValueError: The value is not a number between 0 and 1.
    """
    return check_probability(field, _convert(_NUMBER, value))


def parse_temperature(value: Any, field: str) -> float:
    """Return a number between 0 and `MAX_TEMPERATURE`, given as a number or as text.

    Raises:
        ValueError: The value is not a number between 0 and `MAX_TEMPERATURE`.
    """
    return check_range(field, _convert(_NUMBER, value), 0, MAX_TEMPERATURE)


def parse_count(value: Any, field: str) -> int:
    """Return an integer between 1 and `MAX_COUNT`, given as a number or as text.

    Raises:
        ValueError: The value is not an integer between 1 and `MAX_COUNT`.
    """
    return check_integer(field, _convert(_INTEGER, value), 1, MAX_COUNT)


def parse_optional_fraction(value: Any, field: str) -> float | None:
    """Return a number between 0 and 1, or None.

    Args:
        value: Number, a string with a number, None, or the string "", "none" or "null".
        field: Name of the field.

    Raises:
        ValueError: The value is neither None nor a number between 0 and 1.
    """
    missing = value is None or (isinstance(value, str) and value.strip().lower() in ("", "none", "null"))
    return None if missing else parse_fraction(value, field)


def parse_flag(value: Any, field: str) -> bool:
    """Return True or False, given as a flag or as text.

    Raises:
        ValueError: The value is neither true nor false.
    """
    return check_flag(field, _convert(_FLAG, value))


def _convert(adapter: TypeAdapter[Any], value: Any) -> Any:
    """Return a value of the adapter's type, or the unchanged value if it cannot be converted."""
    if isinstance(value, bool) and adapter is not _FLAG:
        return value
    try:
        return adapter.validate_python(value)
    except ValidationError:
        return value


def parse_text_settings(max_tokens: Any, temperature: Any) -> Settings:
    """Return the settings of text generation.

    Args:
        max_tokens: Value of the field max_tokens.
        temperature: Value of the field temperature.

    Raises:
        ValueError: A value is out of range.
    """
    return Settings(
        temperature=parse_temperature(temperature, "temperature"), max_tokens=parse_count(max_tokens, "max_tokens")
    )
