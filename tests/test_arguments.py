"""Argument checks: accepted values, and the messages for rejected ones."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moondream_cv import arguments


@pytest.mark.parametrize(
    ("check", "value", "expected"),
    [
        (lambda v: arguments.check_probability("x", v), np.float32(0.5), 0.5),
        (lambda v: arguments.check_probability("x", v), 1, 1.0),
        (lambda v: arguments.check_share("x", v), 1, 1.0),
        (lambda v: arguments.check_positive("x", v), 0.1, 0.1),
        (lambda v: arguments.check_not_negative("x", v), 0, 0.0),
        (lambda v: arguments.check_integer("x", v), np.int64(3), 3),
        (lambda v: arguments.check_flag("x", v), False, False),
        (lambda v: arguments.check_choice("x", v, ("a", "b")), "b", "b"),
        (lambda v: arguments.check_text("x", v), "dog", "dog"),
        (lambda v: arguments.check_unique("x", v), ("b", "a"), ["b", "a"]),
        (arguments.check_classes, "dog", ["dog"]),
        (arguments.check_classes, ("dog", "cat"), ["dog", "cat"]),
    ],
)
def test_checks_return_accepted_values(check: Callable[[Any], Any], value: Any, expected: Any) -> None:
    result = check(value)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: arguments.check_probability("nms", 1.5), "nms must be between 0 and 1, got 1.5"),
        (lambda: arguments.check_probability("nms", True), "nms must be between 0 and 1, got True"),
        (lambda: arguments.check_probability("nms", math.nan), "nms must be between 0 and 1, got nan"),
        (lambda: arguments.check_share("max_area", 0), "max_area must be above 0 and at most 1, got 0"),
        (lambda: arguments.check_range("fps", "fast", 1, 60), "fps must be between 1 and 60, got 'fast'"),
        (
            lambda: arguments.check_positive("timeout", 0, "seconds"),
            "timeout must be a positive number of seconds, got 0",
        ),
        (lambda: arguments.check_positive("timeout", math.inf), "timeout must be a positive number, got inf"),
        (lambda: arguments.check_positive("scale", -1), "scale must be a positive number, got -1"),
        (lambda: arguments.check_not_negative("min_size", -1, "pixels"), "min_size must be 0 or more pixels, got -1"),
        (lambda: arguments.check_not_negative("min_size", 10**400), "min_size must be 0 or more, got 1000"),
        (lambda: arguments.check_integer("retries", -1, 0), "retries must be an integer of at least 0, got -1"),
        (lambda: arguments.check_integer("retries", 2.0, 0), "retries must be an integer of at least 0, got 2.0"),
        (lambda: arguments.check_integer("crf", 60, 1, 51), "crf must be an integer between 1 and 51, got 60"),
        (lambda: arguments.check_flag("stream", 1), "stream must be True or False, got 1"),
        (lambda: arguments.check_choice("length", "huge", ("short", "long")), "must be one of short, long, got 'huge'"),
        (lambda: arguments.check_text("object", 5), "object must be a string, got int: 5"),
        (lambda: arguments.check_text("object", " "), "object must not be empty, got ' '"),
        (lambda: arguments.check_unique("names", ["b", "a", "b"]), "names must be unique; duplicates: 'b'"),
        (lambda: arguments.check_classes([]), "classes must have at least one class name, got []"),
        (lambda: arguments.check_classes({"dog"}), "must be a string or a sequence of strings, got set: {'dog'}"),  # type: ignore[arg-type]
        (lambda: arguments.check_classes(["dog", ""], "class_names"), "class_names[1] must not be empty, got ''"),
        (lambda: arguments.check_classes(["dog", "dog"]), "classes must be unique; duplicates: 'dog'"),
    ],
)
def test_checks_name_the_argument_and_the_value(check: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check()
