"""Parsing and validation of JSON responses: a missing key, a wrong type or a NaN raises an `AttemptError`.

Each dialect chooses the keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from moondream_cv.backends.credentials import shorten
from moondream_cv.backends.retries import AttemptError
from moondream_cv.requests import DetectedObject, DetectedPoint, Grounding, Reasoning

_CORNERS = ("x_min", "y_min", "x_max", "y_max")
_MAX_FRACTION = 1.5  # larger coordinates are in pixels

Item = TypeVar("Item", DetectedObject, DetectedPoint)


def parse_text(body: Mapping[str, Any], key: str) -> str:
    """Return the string under a key.

    Raises:
        AttemptError: The key is missing, or its value is not a string.
    """
    text = body.get(key)
    if not isinstance(text, str):
        raise AttemptError(_missing(body, key, "a string"))
    return text


def parse_objects(
    body: Mapping[str, Any], has_scores: bool, size: tuple[int, int] | None = None, key: str = "objects"
) -> list[DetectedObject]:
    """Return the boxes `x_min`, `y_min`, `x_max`, `y_max` under a key.

    Args:
        body: JSON object of the response.
        has_scores: Use the confidences; otherwise every confidence is 1.0.
        size: (width, height) of the image in pixels, if coordinates may be in pixels. If any coordinate is far above
            1, all are in pixels. None: all coordinates are fractions.
        key: Key of the list.

    Raises:
        AttemptError: The list is missing, or an entry is invalid.
    """
    items = _parse_items(body, key)
    boxes = _to_fractions([[_parse_number(item, name) for name in _CORNERS] for item in items], size)
    return [
        DetectedObject(x_min, y_min, x_max, y_max, _parse_confidence(item, has_scores))
        for item, (x_min, y_min, x_max, y_max) in zip(items, boxes, strict=True)
    ]


def parse_points(
    body: Mapping[str, Any], has_scores: bool, size: tuple[int, int] | None = None, key: str = "points"
) -> list[DetectedPoint]:
    """Return the points `x`, `y` under a key. Arguments and errors are those of `parse_objects`."""
    items = _parse_items(body, key)
    points = _to_fractions([[_parse_number(item, name) for name in ("x", "y")] for item in items], size)
    return [
        DetectedPoint(x, y, _parse_confidence(item, has_scores)) for item, (x, y) in zip(items, points, strict=True)
    ]


def parse_predictions(body: Mapping[str, Any], has_scores: bool, size: tuple[int, int]) -> list[DetectedObject]:
    """Return the boxes of Roboflow's `predictions`: center, width and height in pixels.

    Args:
        body: JSON object of the response.
        has_scores: Use the confidences; otherwise every confidence is 1.0.
        size: (width, height) of the image in pixels, if the response does not have it.

    Raises:
        AttemptError: The list is missing, or an entry is invalid.
    """
    image = body.get("image")
    if isinstance(image, Mapping) and {"width", "height"} <= image.keys():
        image_width, image_height = _parse_number(image, "width"), _parse_number(image, "height")
    else:
        image_width, image_height = map(float, size)
    if image_width <= 0 or image_height <= 0:
        raise AttemptError(f"returned an invalid image size: {image_width:g}x{image_height:g}")
    found = []
    for item in _parse_items(body, "predictions"):
        x, y, width, height = (_parse_number(item, name) for name in ("x", "y", "width", "height"))
        left, right = (x - width / 2) / image_width, (x + width / 2) / image_width
        top, bottom = (y - height / 2) / image_height, (y + height / 2) / image_height
        found.append(DetectedObject(left, top, right, bottom, _parse_confidence(item, has_scores)))
    return found


def truncate(
    items: list[Item], max_objects: int, flag: object = None, limit_sent: bool = True
) -> tuple[tuple[Item, ...], bool]:
    """Return at most `max_objects` items, and whether there may be more.

    Args:
        items: Objects or points of a response.
        max_objects: Maximum number of items.
        flag: Value of `truncated` in the response, if any.
        limit_sent: Whether the request contained the limit, so that a list of that length may be truncated.
    """
    more = flag if isinstance(flag, bool) else limit_sent and len(items) == max_objects
    return tuple(items[:max_objects]), more or len(items) > max_objects


def parse_gaze(body: Mapping[str, Any]) -> DetectedPoint | None:
    """Return the point under `gaze`; None if the model finds no target.

    Raises:
        AttemptError: The point is missing or invalid.
    """
    point = body.get("gaze", ...)
    if point is None:
        return None
    if not isinstance(point, Mapping):
        raise AttemptError(_missing(body, "gaze", "a point or null"))
    return DetectedPoint(_parse_number(point, "x"), _parse_number(point, "y"))


def parse_reasoning(value: object) -> Reasoning | None:
    """Return the reasoning before an answer, from an object or plain text; None if there is none.

    Raises:
        AttemptError: The reasoning is invalid.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return Reasoning(value)
    if not isinstance(value, Mapping):
        raise AttemptError(f"returned invalid reasoning: {excerpt(value)}")
    grounding = value.get("grounding") or []
    if not isinstance(grounding, list):
        raise AttemptError(f"returned invalid grounding, expected a list: {excerpt(grounding)}")
    return Reasoning(parse_text(value, "text"), tuple(map(_parse_grounding, grounding)))


def parse_logprob(body: Mapping[str, Any]) -> float | None:
    """Return the mean log-probability of the tokens; None if the response has none."""
    value = body.get("logprob")
    return _parse_number(body, "logprob") if isinstance(value, int | float) and not isinstance(value, bool) else None


def excerpt(value: object) -> str:
    """Return the repr of a value from a response, shortened for error messages."""
    return shorten(repr(value), 200)


def _parse_grounding(item: object) -> Grounding:
    if not isinstance(item, Mapping) or not isinstance(item.get("points"), list):
        raise AttemptError(f"returned an invalid grounding: {excerpt(item)}")
    points = []
    for point in item["points"]:
        if not isinstance(point, list) or len(point) != 2:
            raise AttemptError(f"returned an invalid grounding point, expected [x, y]: {excerpt(point)}")
        x, y = (_parse_number({"grounding": value}, "grounding") for value in point)
        points.append((x, y))
    start, end = _parse_number(item, "start_idx"), _parse_number(item, "end_idx")
    return Grounding(int(start), int(end), tuple(points))


def _parse_items(body: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    items = body.get(key)
    if not isinstance(items, list):
        raise AttemptError(_missing(body, key, "a list"))
    for item in items:
        if not isinstance(item, Mapping):
            raise AttemptError(f"returned an invalid entry in {key!r}, expected an object: {excerpt(item)}")
    return items


def _parse_number(item: Mapping[str, Any], name: str) -> float:
    value = item.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise AttemptError(f"returned an invalid {name!r}, expected a number: {excerpt(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise AttemptError(f"returned an invalid {name!r}, expected a finite number: {number}")
    return number


def _parse_confidence(item: Mapping[str, Any], has_scores: bool) -> float:
    if not has_scores or item.get("confidence") is None:
        return 1.0
    confidence = _parse_number(item, "confidence")
    if not 0 <= confidence <= 1:
        raise AttemptError(f"returned an invalid 'confidence', expected a number between 0 and 1: {confidence:g}")
    return confidence


def _to_fractions(coordinates: list[list[float]], size: tuple[int, int] | None) -> list[list[float]]:
    """Return lists of x, y, ... as fractions of the image, if they are in pixels."""
    if size is None or all(value <= _MAX_FRACTION for values in coordinates for value in values):
        return coordinates
    return [[value / size[index % 2] for index, value in enumerate(values)] for values in coordinates]


def _missing(body: Mapping[str, Any], key: str, expected: str) -> str:
    return f"returned no valid {key!r}, expected {expected}: {excerpt(dict(body))}"
