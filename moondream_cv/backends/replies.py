"""JSON of replies → results, with nothing believed: a missing key, a wrong type or a NaN is a `Failure`.

Which keys a dialect answers with is left to the dialects.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from moondream_cv.backends.addresses import shortened
from moondream_cv.backends.failures import Failure
from moondream_cv.requests import DetectedObject, DetectedPoint, Grounding, Reasoning

_CORNERS = ("x_min", "y_min", "x_max", "y_max")
_MOST_OF_A_FRACTION = 1.5  # of the image's side; what is above it is in pixels

Item = TypeVar("Item", DetectedObject, DetectedPoint)


def text_of(reply: Mapping[str, Any], key: str) -> str:
    """The text under a key.

    Raises:
        Failure: There is none.
    """
    text = reply.get(key)
    if not isinstance(text, str):
        raise Failure(_lacks(reply, key, "a text"))
    return text


def objects_of(
    reply: Mapping[str, Any], scores: bool, size: tuple[int, int] | None = None, key: str = "objects"
) -> list[DetectedObject]:
    """Boxes `x_min`, `y_min`, `x_max`, `y_max` under a key.

    Args:
        scores: Whether the confidences count.
        size: (width, height) of the image, where the boxes may be in pixels: those of a reply are, all of them, if one
            of their numbers is far above 1. None: they are fractions.

    Raises:
        Failure: There are none, or something is wrong with one.
    """
    items = _items(reply, key)
    boxes = _fractions([[_number(item, name) for name in _CORNERS] for item in items], size)
    return [
        DetectedObject(x_min, y_min, x_max, y_max, _confidence(item, scores))
        for item, (x_min, y_min, x_max, y_max) in zip(items, boxes, strict=True)
    ]


def points_of(
    reply: Mapping[str, Any], scores: bool, size: tuple[int, int] | None = None, key: str = "points"
) -> list[DetectedPoint]:
    """Points `x`, `y` under a key; arguments and errors as in `objects_of`."""
    items = _items(reply, key)
    points = _fractions([[_number(item, name) for name in ("x", "y")] for item in items], size)
    return [DetectedPoint(x, y, _confidence(item, scores)) for item, (x, y) in zip(items, points, strict=True)]


def centred_objects_of(reply: Mapping[str, Any], scores: bool, size: tuple[int, int]) -> list[DetectedObject]:
    """Boxes of Roboflow's `predictions`: centre, width and height in pixels of an image.

    Args:
        scores: Whether the confidences count.
        size: (width, height) of the image, where the reply does not say it.

    Raises:
        Failure: There are none, or something is wrong with one.
    """
    image = reply.get("image")
    if isinstance(image, Mapping) and {"width", "height"} <= image.keys():
        wide, high = _number(image, "width"), _number(image, "height")
    else:
        wide, high = map(float, size)
    if wide <= 0 or high <= 0:
        raise Failure(f"answered an image that is {wide:g} wide and {high:g} high")
    found = []
    for item in _items(reply, "predictions"):
        x, y, width, height = (_number(item, name) for name in ("x", "y", "width", "height"))
        left, right = (x - width / 2) / wide, (x + width / 2) / wide
        top, bottom = (y - height / 2) / high, (y + height / 2) / high
        found.append(DetectedObject(left, top, right, bottom, _confidence(item, scores)))
    return found


def limited(items: list[Item], most: int, flag: object = None, sent: bool = True) -> tuple[tuple[Item, ...], bool]:
    """At most so many items, and whether there may be more.

    Args:
        flag: What the reply says under `truncated`.
        sent: Whether the server was told the limit, so that a list of that length was ended by it.
    """
    more = flag if isinstance(flag, bool) else sent and len(items) == most
    return tuple(items[:most]), more or len(items) > most


def gaze_of(reply: Mapping[str, Any]) -> DetectedPoint | None:
    """Return the point under `gaze`; None if the model sees no target.

    Raises:
        Failure: It is missing or invalid.
    """
    point = reply.get("gaze", ...)
    if point is None:
        return None
    if not isinstance(point, Mapping):
        raise Failure(_lacks(reply, "gaze", "a point or null"))
    return DetectedPoint(_number(point, "x"), _number(point, "y"))


def reasoning_of(value: object) -> Reasoning | None:
    """The thoughts before an answer, an object or plain text; None where there are none.

    Raises:
        Failure: Something is wrong with them.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return Reasoning(value)
    if not isinstance(value, Mapping):
        raise Failure(f"answered a reasoning that is {shown(value)}")
    grounding = value.get("grounding") or []
    if not isinstance(grounding, list):
        raise Failure(f"answered a grounding that is {shown(grounding)}")
    return Reasoning(text_of(value, "text"), tuple(map(_grounding, grounding)))


def logprob_of(reply: Mapping[str, Any]) -> float | None:
    """The mean log-probability of the tokens, where the server gives it."""
    value = reply.get("logprob")
    return _number(reply, "logprob") if isinstance(value, int | float) and not isinstance(value, bool) else None


def _grounding(item: object) -> Grounding:
    if not isinstance(item, Mapping) or not isinstance(item.get("points"), list):
        raise Failure(f"answered a grounding with {shown(item)}")
    points = []
    for point in item["points"]:
        if not isinstance(point, list) or len(point) != 2:
            raise Failure(f"answered a grounding with the point {shown(point)}")
        x, y = (_number({"grounding": value}, "grounding") for value in point)
        points.append((x, y))
    start, end = _number(item, "start_idx"), _number(item, "end_idx")
    return Grounding(int(start), int(end), tuple(points))


def _items(reply: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    items = reply.get(key)
    if not isinstance(items, list):
        raise Failure(_lacks(reply, key, "a list"))
    for item in items:
        if not isinstance(item, Mapping):
            raise Failure(f"answered {shown(item)} among its {key}")
    return items


def _number(item: Mapping[str, Any], name: str) -> float:
    value = item.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Failure(f"answered {shown(value)} as {name}, where a number belongs")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise Failure(f"answered {number} as {name}, where a finite number belongs")
    return number


def _confidence(item: Mapping[str, Any], scores: bool) -> float:
    if not scores or item.get("confidence") is None:
        return 1.0
    confidence = _number(item, "confidence")
    if not 0 <= confidence <= 1:
        raise Failure(f"answered a confidence of {confidence:g}, which is not in 0..1")
    return confidence


def _fractions(rows: list[list[float]], size: tuple[int, int] | None) -> list[list[float]]:
    """Rows of coordinates x, y, ... as fractions of an image, which they may be already."""
    if size is None or all(value <= _MOST_OF_A_FRACTION for row in rows for value in row):
        return rows
    return [[value / size[index % 2] for index, value in enumerate(row)] for row in rows]


def _lacks(reply: Mapping[str, Any], key: str, what: str) -> str:
    return f"answered no {key!r} that is {what}: {shown(dict(reply))}"


def shown(value: object) -> str:
    """The repr of what a server sent, shortened."""
    return shortened(repr(value), 200)
