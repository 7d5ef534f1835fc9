"""What can be asked of a model and what it replies: plain frozen values that know nothing of how they are computed.

Coordinates are fractions of the image's width and height, from its top left corner. Every result's `to_dict()` is the
dict that the published model's method of that name returns; `confidence`, `truncated` and `logprob` are extra keys.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Union

from moondream_cv.errors import SchemaError

CAPTION_LENGTHS = ("short", "normal", "long")
MAX_PROMPT_CHARACTERS = 100_000
MAX_STOP_STRINGS = 4
MAX_STOP_CHARACTERS = 256
MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 64
SpatialRef = tuple[float, ...]


@dataclass(frozen=True)
class Settings:
    """How a request is computed; the defaults are the published ones.

    Attributes:
        temperature: Of answers and captions; 0 always takes the likeliest token. Objects and points are never sampled.
        top_p: Sampling draws from the likeliest tokens that together reach this probability.
        max_tokens: Tokens of an answer, of its reasoning, or of a caption, at the most.
        max_objects: Objects or points at the most.
        max_crops: Local crops at the most; None: as many as the model was trained with. Fewer are faster and coarser.
        variant: An adapter to use: a file or an id; None: the one that the model was loaded with.
        seed: Makes sampling repeatable.
        repeat_suffix: The published code ends a question twice before the answer. False ends it once, as another engine
            of the model's authors does.
    """

    temperature: float = 0.5
    top_p: float = 0.3
    max_tokens: int = 768
    max_objects: int = 50
    max_crops: int | None = None
    variant: str | None = None
    seed: int | None = None
    repeat_suffix: bool = True

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0.0, math.inf)
        _check_number("top_p", self.top_p, 0.0, 1.0)
        _check_integer("max_tokens", self.max_tokens, 1)
        _check_integer("max_objects", self.max_objects, 1)
        if self.max_crops is not None:
            _check_integer("max_crops", self.max_crops, 1)
        if self.seed is not None:
            _check_integer("seed", self.seed, 0)
        if self.variant is not None and not isinstance(self.variant, str):
            raise ValueError(f"variant must be the name of an adapter, not {self.variant!r}")
        if not isinstance(self.repeat_suffix, bool):
            raise ValueError(f"repeat_suffix must be True or False, not {self.repeat_suffix!r}")

    @classmethod
    def of(cls, values: Settings | Mapping[str, Any] | None, ignore_unknown: bool = False) -> Settings:
        """Settings from a mapping; None gives the defaults, and settings themselves.

        Raises:
            ValueError: A key is unknown (unless they are to be ignored) or a value is out of range.
        """
        if values is None:
            return cls()
        if isinstance(values, Settings):
            return values
        if not isinstance(values, Mapping):
            raise ValueError(f"settings must be a mapping such as {{'max_objects': 50}}, not {values!r}")
        known = [f.name for f in fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown and not ignore_unknown:
            raise ValueError(f"unknown settings {unknown}; known are {', '.join(known)}")
        return cls(**{key: value for key, value in values.items() if key in known})


@dataclass(frozen=True)
class Detect:
    """Boxes of everything that a name means."""

    skill: ClassVar[str] = "detect"
    image: Any
    object: str
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        _check_request(self, self.object, "object")


@dataclass(frozen=True)
class Point:
    """Points on everything that a name means."""

    skill: ClassVar[str] = "point"
    image: Any
    object: str
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        _check_request(self, self.object, "object")


@dataclass(frozen=True)
class Query:
    """A question about an image, or without one.

    Attributes:
        image: An image, or None.
        reasoning: Think first, and return the thoughts.
        spatial_refs: Points (x, y) and boxes (x_min, y_min, x_max, y_max) that the question is about.
        stop: Up to 4 strings; the answer ends before the first occurrence of one of them. A single string is accepted.
        json_schema: JSON schema that the answer conforms to, as a mapping or as JSON text; kept as text. An answer that
            `max_tokens` truncates is incomplete JSON. The reasoning is not constrained.
    """

    skill: ClassVar[str] = "query"
    image: Any
    question: str
    reasoning: bool = False
    spatial_refs: tuple[SpatialRef, ...] = ()
    settings: Settings = field(default_factory=Settings)
    stop: tuple[str, ...] = ()
    json_schema: Mapping[str, Any] | str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "spatial_refs", _spatial_refs(self.spatial_refs))
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "json_schema", _schema_text(self.json_schema))
        if self.spatial_refs and self.image is None:
            raise ValueError("spatial_refs point into an image, and image is None")
        _check_request(self, self.question, "question", image_required=False)


@dataclass(frozen=True)
class Caption:
    """A description: "short", "normal" or "long"."""

    skill: ClassVar[str] = "caption"
    image: Any
    length: str = "normal"
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        if self.length not in CAPTION_LENGTHS:
            raise ValueError(f"length must be one of {', '.join(CAPTION_LENGTHS)}, not {self.length!r}")
        _check_request(self, None, "length")


@dataclass(frozen=True)
class Gaze:
    """Where somebody looks.

    Attributes:
        eye: (x, y) between the eyes.
        force: Give a point even where the model sees none.
    """

    skill: ClassVar[str] = "gaze"
    image: Any
    eye: tuple[float, float]
    force: bool = False
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        refs = _spatial_refs((self.eye,))
        if len(refs[0]) != 2:
            raise ValueError(f"eye must be (x, y), not {self.eye!r}")
        object.__setattr__(self, "eye", refs[0])
        _check_request(self, None, "eye")


Request = Union[Detect, Point, Query, Caption, Gaze]  # noqa: UP007 - evaluated at run time on Python 3.10


@dataclass(frozen=True)
class DetectedObject:
    """A box as the model gave it: not clipped to the image.

    Attributes:
        confidence: 0..1, from the model's token probabilities; 1.0 where the model gives none.
    """

    x_min: float
    y_min: float
    x_max: float
    y_max: float
    confidence: float = 1.0

    def to_dict(self) -> dict[str, float]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class DetectedPoint:
    """A point, and its confidence as that of a `DetectedObject`."""

    x: float
    y: float
    confidence: float = 1.0

    def to_dict(self) -> dict[str, float]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class Grounding:
    """Points that characters `start` to `end` of a reasoning text speak of."""

    start: int
    end: int
    points: tuple[tuple[float, float], ...]

    def to_dict(self) -> dict[str, Any]:
        return {"start_idx": self.start, "end_idx": self.end, "points": list(self.points)}


@dataclass(frozen=True)
class Reasoning:
    """The thoughts before an answer."""

    text: str
    grounding: tuple[Grounding, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {"text": self.text, "grounding": [g.to_dict() for g in self.grounding]}


@dataclass(frozen=True)
class DetectResult:
    """What `Detect` gives.

    Attributes:
        truncated: `max_objects` ended the list.
    """

    objects: tuple[DetectedObject, ...]
    truncated: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {"objects": [o.to_dict() for o in self.objects], "truncated": self.truncated}


@dataclass(frozen=True)
class PointResult:
    """What `Point` gives."""

    points: tuple[DetectedPoint, ...]
    truncated: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {"points": [p.to_dict() for p in self.points], "truncated": self.truncated}


@dataclass(frozen=True)
class QueryResult:
    """What `Query` gives.

    Attributes:
        truncated: `max_tokens` ended the answer or its reasoning.
        logprob: Mean log-probability of the answer's tokens; None where the model gives none.
    """

    answer: str
    reasoning: Reasoning | None = None
    truncated: bool = False
    logprob: float | None = None

    def to_dict(self) -> dict[str, Any]:
        thoughts = {} if self.reasoning is None else {"reasoning": self.reasoning.to_dict()}
        return {**thoughts, "answer": self.answer, "truncated": self.truncated, **_score(self.logprob)}


@dataclass(frozen=True)
class CaptionResult:
    """What `Caption` gives; `truncated` and `logprob` as in a `QueryResult`."""

    caption: str
    truncated: bool = False
    logprob: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"caption": self.caption, "truncated": self.truncated, **_score(self.logprob)}


@dataclass(frozen=True)
class GazeResult:
    """What `Gaze` gives: a point, or None where the model sees none."""

    gaze: DetectedPoint | None

    def to_dict(self) -> dict[str, Any]:
        return {"gaze": None if self.gaze is None else {"x": self.gaze.x, "y": self.gaze.y}}


@dataclass(frozen=True)
class ErrorResult:
    """What stands in the place of a request that failed."""

    error: Exception


Result = Union[DetectResult, PointResult, QueryResult, CaptionResult, GazeResult, ErrorResult]  # noqa: UP007


def pieces_of(result: Result) -> list[Any]:
    """What a reply would have been streamed as, had it not come in one piece: objects, points, thoughts and text."""
    if isinstance(result, DetectResult):
        return list(result.objects)
    if isinstance(result, PointResult):
        return list(result.points)
    if isinstance(result, CaptionResult):
        return [result.caption]
    if isinstance(result, QueryResult):
        return [*([] if result.reasoning is None else [result.reasoning]), result.answer]
    return []


def _score(logprob: float | None) -> dict[str, float]:
    return {} if logprob is None else {"logprob": logprob}


def _check_request(request: Any, text: str | None, what: str, image_required: bool = True) -> None:
    if image_required and request.image is None:
        raise ValueError(f"{request.skill} needs an image, and image is None")
    object.__setattr__(request, "settings", Settings.of(request.settings))
    if what not in ("object", "question"):
        return
    if not isinstance(text, str):
        raise ValueError(f"{what} must be a string, not {type(text).__name__}: {text!r:.100}")
    if not text.strip():
        raise ValueError(f"{what} must say something, not {text!r:.100}")
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise ValueError(f"{what} has {len(text)} characters; at most {MAX_PROMPT_CHARACTERS} are accepted")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is not valid Unicode text: {text!r:.100}") from error


def _spatial_refs(refs: Sequence[Sequence[float]] | None) -> tuple[SpatialRef, ...]:
    checked = []
    for ref in refs or ():
        try:
            values = tuple(float(v) for v in ref)
        except (TypeError, ValueError) as error:
            raise ValueError(f"a spatial reference is (x, y) or (x_min, y_min, x_max, y_max), not {ref!r}") from error
        if len(values) not in (2, 4):
            raise ValueError(f"a spatial reference has 2 or 4 numbers, not {len(values)}: {ref!r}")
        if not all(0.0 <= v <= 1.0 for v in values):
            raise ValueError(f"spatial references are fractions of the image in 0..1, not {ref!r}")
        if len(values) == 4 and (values[2] <= values[0] or values[3] <= values[1]):
            raise ValueError(f"a box is (x_min, y_min, x_max, y_max) with a positive area, not {ref!r}")
        checked.append(values)
    return tuple(checked)


def _stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(strings) > MAX_STOP_STRINGS:
        raise ValueError(f"stop must have at most {MAX_STOP_STRINGS} strings, got {len(strings)}")
    for string in strings:
        if not isinstance(string, str):
            raise ValueError(f"stop must be a string or a sequence of strings, got {string!r:.100}")
        if not 1 <= len(string) <= MAX_STOP_CHARACTERS:
            raise ValueError(
                f"strings of stop must have 1 to {MAX_STOP_CHARACTERS} characters, got {len(string)}: {string!r:.100}"
            )
    return strings


def _schema_text(schema: Mapping[str, Any] | str | None) -> str | None:
    """Return a JSON schema as text, which is hashable and can be pickled.

    Raises:
        SchemaError: It is not a JSON object, or it is too large.
    """
    if schema is None:
        return None
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else schema
        if not isinstance(parsed, Mapping):
            raise SchemaError(f"json_schema must be a JSON object, got {schema!r:.100}")
        text = json.dumps(dict(parsed), ensure_ascii=True, allow_nan=False)
    except RecursionError as error:
        raise SchemaError(f"json_schema must have at most {MAX_SCHEMA_DEPTH} levels") from error
    except (TypeError, ValueError) as error:
        if isinstance(error, SchemaError):
            raise
        raise SchemaError(f"json_schema must be valid JSON: {error}") from error
    if len(text) > MAX_SCHEMA_BYTES:
        raise SchemaError(f"json_schema must have at most {MAX_SCHEMA_BYTES:,} bytes, got {len(text):,}")
    if _depth(parsed) > MAX_SCHEMA_DEPTH:
        raise SchemaError(f"json_schema must have at most {MAX_SCHEMA_DEPTH} levels")
    return text


def _depth(value: Any) -> int:
    """Return how many arrays and objects of a JSON value are nested."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, Mapping | list | tuple)]:
        depth += 1
        level = [child for item in level for child in (item.values() if isinstance(item, Mapping) else item)]
    return depth


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or math.isinf(value):
        raise ValueError(f"{name} must be a number in {low}..{high}, not {value!r}")


def _check_integer(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be an integer of at least {low}, not {value!r}")
