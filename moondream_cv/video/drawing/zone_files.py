"""Zone files: their format as pydantic models, which validate the data and generate the JSON schema."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Real
from typing import Annotated, Any, cast

import numpy as np
import numpy.typing as npt
import supervision as sv
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"

ANCHORS = tuple(anchor.value for anchor in sv.Position if anchor is not sv.Position.CENTER_OF_MASS)  # needs masks

_LARGEST = 1e12  # maximum coordinate, far beyond any frame; its square is still exact enough


def _problem(message: str) -> PydanticCustomError:
    return PydanticCustomError("zone_file", "{message}", {"message": message})


def _point(value: object) -> tuple[float, float]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise _problem(f"must be [x, y], got {shown(value)}")
    if not all(_is_number(number) and abs(number) <= _LARGEST for number in value):
        raise _problem(f"must be two finite numbers, got {shown(value)}")
    return float(value[0]), float(value[1])


def _corners(value: object) -> object:
    if not isinstance(value, (list, tuple)) or len(value) < 3:
        raise _problem(f"needs at least 3 corners [x, y], got {shown(value)}")
    return value


def _name(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _problem(f"must be a non-empty string, got {shown(value)}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise _problem(f"must be a string, got {shown(value)}")
    return value


def _anchors(value: object) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise _problem(f'must be a list of one or more anchors, such as ["BOTTOM_CENTER"], got {shown(value)}')
    for anchor in value:
        if anchor not in ANCHORS:
            raise _problem(f"has the unknown anchor {shown(anchor)}; use any of {_listed(ANCHORS)}")
    if len(set(value)) < len(value):
        raise _problem(f"must have unique anchors, got {shown(value)}")
    return tuple(value)


def _threshold(value: Any) -> int:
    if not _is_number(value) or value != int(value) or not 1 <= value <= 1000:
        raise _problem(f"must be an integer number of frames from 1 to 1000, got {shown(value)}")
    return int(value)


def _distance(value: Any) -> float:
    if not _is_number(value) or not 0 <= value <= 1:
        raise _problem(f"must be a fraction of the box from 0 to 1, got {shown(value)}")
    return float(value)


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise _problem(f"must be true or false, got {shown(value)}")
    return value


def _entries(value: object) -> object:
    if not isinstance(value, (list, tuple)):
        raise _problem(f"must be a list, got {shown(value)}")
    return [dict(entry) if isinstance(entry, Mapping) else entry for entry in value]


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer above the largest float
        return False


_PointArray = {
    "type": "array",
    "items": {"type": "number", "minimum": -_LARGEST, "maximum": _LARGEST},
    "minItems": 2,
    "maxItems": 2,
}

Point = Annotated[tuple[float, float], BeforeValidator(_point), WithJsonSchema(_PointArray)]
Name = Annotated[str, BeforeValidator(_name), WithJsonSchema({"type": "string", "pattern": r"\S"})]
Text = Annotated[str, BeforeValidator(_text), WithJsonSchema({"type": "string"})]
Anchors = Annotated[
    tuple[str, ...],
    BeforeValidator(_anchors),
    WithJsonSchema({"type": "array", "items": {"enum": list(ANCHORS)}, "minItems": 1, "uniqueItems": True}),
]
Threshold = Annotated[
    int, BeforeValidator(_threshold), WithJsonSchema({"type": "integer", "minimum": 1, "maximum": 1000})
]
Distance = Annotated[float, BeforeValidator(_distance), WithJsonSchema({"type": "number", "minimum": 0, "maximum": 1})]
Flag = Annotated[bool, BeforeValidator(_flag), WithJsonSchema({"type": "boolean"})]


class LineEntry(BaseModel):
    """Line at which crossings are counted by direction and class."""

    model_config = ConfigDict(extra="forbid", title="Line")

    name: Name = Field(description="Name of the line, unique among the lines.")
    start: Point = Field(description="Start of the line, [x, y].")
    end: Point = Field(
        description="End of the line, [x, y]. Seen from the start to the end, a crossing to the left counts as in and "
        "one to the right as out."
    )
    triggering_anchors: Anchors = Field(
        ("BOTTOM_CENTER",),
        description="Points of a box that must all be on the same side of the line for the box to be on that side.",
    )
    minimum_crossing_threshold: Threshold = Field(
        1,
        description="Consecutive frames for which a box must be on the other side before it counts. Frames on which "
        "the object is missing, or still on the line, are skipped.",
    )
    minimum_crossing_distance: Distance = Field(
        0.2,
        description="How far beyond the line a box must be to be on that side, as a fraction of its size across the "
        "line, so that boxes that tremble on the line do not count. 0 counts at the line itself.",
    )

    @model_validator(mode="after")
    def _has_length(self) -> LineEntry:
        if self.start == self.end:
            raise _problem(f"start and end are the same point, {_pairs(self.start)}")
        return self

    def array(self) -> npt.NDArray[np.float64]:
        """Return start and end, [2, 2]."""
        return np.array([self.start, self.end])


class ZoneEntry(BaseModel):
    """Polygon in which objects are counted."""

    model_config = ConfigDict(extra="forbid", title="Zone")

    name: Name = Field(description="Name of the zone, unique among the zones.")
    polygon: Annotated[
        list[Point],
        BeforeValidator(_corners),
        WithJsonSchema({"type": "array", "items": _PointArray, "minItems": 3}),
    ] = Field(description="Corners of the zone in order, each [x, y]. The last one is joined to the first.")
    triggering_anchors: Anchors = Field(
        ("BOTTOM_CENTER",), description="Points of a box that must all be inside for the box to be inside."
    )
    minimum_crossing_threshold: Threshold = Field(
        1,
        description="Consecutive frames for which a tracked object must be inside before it counts as inside, and "
        "outside before it counts as gone.",
    )

    @model_validator(mode="after")
    def _has_area(self) -> ZoneEntry:
        points = self.array()
        if np.linalg.matrix_rank(points - points.mean(0), tol=1e-9 * max(1.0, float(np.abs(points).max()))) < 2:
            raise _problem(f"the corners are collinear and enclose no area: {_pairs(*self.polygon)}")
        return self

    def array(self) -> npt.NDArray[np.float64]:
        """Return the corners, [K, 2]."""
        return np.array(self.polygon)


_FRACTION_POINT: dict[str, Any] = {"items": {"minimum": 0, "maximum": 1}}
_HAS_FRACTIONS: dict[str, Any] = {
    "if": {
        "anyOf": [{"properties": {key: {"const": True}}, "required": [key]} for key in ("normalized", "normalised")]
    },
    "then": {
        "properties": {
            "lines": {"items": {"properties": {"start": _FRACTION_POINT, "end": _FRACTION_POINT}}},
            "zones": {"items": {"properties": {"polygon": {"items": _FRACTION_POINT}}}},
        }
    },
}
_HAS_ENTRIES: dict[str, Any] = {
    "anyOf": [{"properties": {key: {"minItems": 1}}, "required": [key]} for key in ("lines", "zones")],
    "not": {"required": ["normalized", "normalised"]},
}


class ZoneFile(BaseModel):
    """Lines and zones at which `moondream-cv video --zone` and `annotate_video(..., zones=...)` count objects."""

    model_config = ConfigDict(
        extra="forbid",
        title="Zone file of moondream_cv",
        json_schema_extra={**_HAS_ENTRIES, **_HAS_FRACTIONS},
    )

    dialect: Text = Field("", alias="$schema", description="Path or URL of this schema, for editors.")
    normalized: Flag = Field(
        False,
        description="Whether coordinates are fractions of the frame's width and height instead of pixels, so that the "
        "file fits videos of every size.",
    )
    normalised: Flag = Field(False, description="Older name of `normalized`.", json_schema_extra={"deprecated": True})
    lines: Annotated[list[LineEntry], BeforeValidator(_entries)] = Field([], description="Lines.")
    zones: Annotated[list[ZoneEntry], BeforeValidator(_entries)] = Field([], description="Zones.")

    @model_validator(mode="after")
    def _is_consistent(self) -> ZoneFile:
        if not self.lines and not self.zones:
            raise _problem('has neither "lines" nor "zones"; add at least one of them')
        if {"normalized", "normalised"} <= self.model_fields_set:
            raise _problem('has both "normalized" and "normalised"; remove the second')
        found: dict[str, Sequence[LineEntry | ZoneEntry]] = {"lines": self.lines, "zones": self.zones}
        for kind, entries in found.items():
            _check_names(kind, [entry.name for entry in entries])
            for number, entry in enumerate(entries):
                _check_scale(f'{kind}[{number}] "{entry.name}"', entry.array(), self.has_fractions)
        return self

    @property
    def has_fractions(self) -> bool:
        """Whether coordinates are fractions of the frame's width and height."""
        return self.normalized or self.normalised


def check_zone_file(data: object, source: str) -> ZoneFile:
    """Validate the contents of a zone file.

    Args:
        data: Decoded JSON.
        source: Name of the file in messages.

    Raises:
        ValueError: The data does not follow the format. The message has the source, the place, the value and a fix.
    """
    try:
        return ZoneFile.model_validate(dict(data) if isinstance(data, Mapping) else data)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        # An unknown key is usually a typo of the missing one, so report it first.
        first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
        raise ValueError(_message(first, data, source)) from None


def zone_schema() -> dict[str, Any]:
    """Return the JSON schema of zone files, draft 2020-12."""
    return {"$schema": SCHEMA_DIALECT, **ZoneFile.model_json_schema()}


def _check_names(kind: str, names: list[str]) -> None:
    for number, name in enumerate(names):
        if name in names[:number]:
            raise _problem(f'{kind}[{number}]: the name "{name}" is taken; names of {kind} must be unique')


def _check_scale(where: str, points: npt.NDArray[np.float64], fractions: bool) -> None:
    inside = bool(points.min() >= 0 and points.max() <= 1)
    if fractions and not inside:
        outside = points[((points < 0) | (points > 1)).any(1)][0]
        raise _problem(f'{where} must have fractions from 0 to 1, because "normalized" is true, got {_pairs(outside)}')
    if inside and not fractions:
        raise _problem(f'{where} is not larger than one pixel; if these are fractions, add "normalized": true')


def _message(problem: ErrorDetails, data: object, source: str) -> str:
    """Return the message for a pydantic error."""
    # Find the line or zone
    place, kind, value = problem["loc"], problem["type"], shown(problem["input"])
    model: type[BaseModel] = ZoneFile
    where = source
    if len(place) > 1:
        model = LineEntry if place[0] == "lines" else ZoneEntry
        entry = cast("Mapping[Any, Any]", data)[place[0]][place[1]]
        name = entry.get("name") if isinstance(entry, Mapping) else None
        where += f": {place[0]}[{place[1]}]" + (f' "{name}"' if isinstance(name, str) and name.strip() else "")
        place = place[2:]
    known = [field.alias or name for name, field in model.model_fields.items()]
    needed = [name for name, field in model.model_fields.items() if field.is_required()]

    # Describe the problem
    if kind == "extra_forbidden":
        key = str(place[-1])
        close = get_close_matches(key, known, 1)
        hint = f'did you mean "{close[0]}"?' if close else f"known keys are {_listed(known)}"
        return f"{where}: unknown key {shown(key)}; {hint}"
    if kind == "missing":
        return f'{where}: "{place[-1]}" is missing; required are {_listed(needed)}'
    if kind == "model_type":
        if model is ZoneFile:
            return f'{where} must contain an object with "lines" or "zones", got {value}'
        return f"{where} must be an object with {_listed(needed)}, got {value}"
    text = problem["msg"]
    if not place:
        separator = " " if text.startswith("has") else ": "
        return f"{where}{separator}{text}"
    part = f'"{place[0]}"' if len(place) == 1 else f"corner {place[1]}"
    return f"{where}: {part} {text}"


def _pairs(*points: Iterable[float]) -> str:
    shown_points = [f"[{', '.join(f'{number:g}' for number in point)}]" for point in points]
    return (
        shown_points[0] if len(points) == 1 else f"[{', '.join(shown_points[:4])}{', ...' if len(points) > 4 else ''}]"
    )


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(f'"{key}"' for key in keys)


def shown(value: object) -> str:
    """Return a value as JSON, shortened for messages."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else f"{text[:70]}..."
