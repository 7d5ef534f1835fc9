"""Requests to a model and their results, as frozen dataclasses.

Coordinates are fractions of the image's width and height, from its top left corner. `to_dict()` of a result returns
the dict of the published model's method; `confidence`, `truncated` and `logprob` are additional keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Union

from moondream_cv.arguments import (
    check_choice,
    check_flag,
    check_integer,
    check_not_negative,
    check_probability,
    check_text,
)
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
    """Sampling and size settings of a request. The defaults are those of the published model.

    Attributes:
        temperature: Sampling temperature of answers and captions, 0 or more; 0 is greedy decoding. Objects and points
            are sampled only with `sample_regions`.
        top_p: Cumulative probability of nucleus sampling, between 0 and 1.
        max_tokens: Maximum number of tokens of an answer, of its reasoning, or of a caption.
        max_objects: Maximum number of objects or points.
        max_crops: Maximum number of local crops; fewer are faster and less accurate. None uses the value that the
            model was trained with.
        variant: LoRA adapter to use, as a file, a folder, "ID@STEP" of a finetune or a published ID. None uses the
            adapter that the model was loaded with.
        seed: Random seed for repeatable sampling.
        repeat_suffix: Append the end of the question template twice, as the published code does. False appends it
            once, as an earlier inference engine of the model's authors did.
        sample_regions: Sample the number of objects or points, their coordinates and sizes with `temperature` and
            `top_p`, as the rollouts of fine-tuning do. False: the most likely ones.
    """

    temperature: float = 0.5
    top_p: float = 0.3
    max_tokens: int = 768
    max_objects: int = 50
    max_crops: int | None = None
    variant: str | None = None
    seed: int | None = None
    repeat_suffix: bool = True
    sample_regions: bool = False

    def __post_init__(self) -> None:
        checked = {
            "temperature": check_not_negative("temperature", self.temperature),
            "top_p": check_probability("top_p", self.top_p),
            "max_tokens": check_integer("max_tokens", self.max_tokens),
            "max_objects": check_integer("max_objects", self.max_objects),
            "max_crops": None if self.max_crops is None else check_integer("max_crops", self.max_crops),
            "seed": None if self.seed is None else check_integer("seed", self.seed, 0),
            "repeat_suffix": check_flag("repeat_suffix", self.repeat_suffix),
            "sample_regions": check_flag("sample_regions", self.sample_regions),
        }
        if self.variant is not None and not isinstance(self.variant, str):
            raise ValueError(f"variant must be the name of an adapter, got {self.variant!r:.100}")
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    @classmethod
    def of(cls, values: Settings | Mapping[str, Any] | None, ignore_unknown: bool = False) -> Settings:
        """Return settings from a mapping.

        Args:
            values: Settings by name; None for the defaults. A `Settings` object is returned unchanged.
            ignore_unknown: Ignore unknown keys instead of raising.

        Raises:
            ValueError: A key is unknown (unless `ignore_unknown` is set), or a value is out of range.
        """
        if values is None:
            return cls()
        if isinstance(values, Settings):
            return values
        if not isinstance(values, Mapping):
            raise ValueError(f"settings must be a mapping such as {{'max_objects': 50}}, got {values!r:.100}")
        known = [f.name for f in fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown and not ignore_unknown:
            raise ValueError(f"unknown settings {unknown}; known settings: {', '.join(known)}")
        return cls(**{key: value for key, value in values.items() if key in known})


@dataclass(frozen=True)
class Detect:
    """A request for the boxes of all objects of a class."""

    skill: ClassVar[str] = "detect"
    image: Any
    object: str
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        _check_request(self, self.object, "object")


@dataclass(frozen=True)
class Point:
    """A request for one point on each object of a class."""

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
        image: Image, or None.
        question: Question text.
        reasoning: Generate reasoning before the answer, and return it.
        spatial_refs: Points (x, y) and boxes (x_min, y_min, x_max, y_max) that the question refers to, as fractions.
        settings: Settings of the request.
        stop: Up to 4 strings; the answer ends before the first occurrence of any of them. A single string is accepted.
        json_schema: JSON schema that the answer conforms to, as a mapping or as JSON text; stored as text. An answer
            that `max_tokens` truncates is incomplete JSON. The reasoning is not constrained.
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
            raise ValueError("spatial_refs need an image, got image=None; pass an image")
        _check_request(self, self.question, "question", image_required=False)


@dataclass(frozen=True)
class Turn:
    """A question of a conversation and its answer.

    Attributes:
        question: Question text, which may be empty if there are images; None for an answer without a question, such as
            a greeting.
        answer: Answer text; None for a question without an answer.
        images: Images of the question. They precede its text.
    """

    question: str | None
    answer: str | None = None
    images: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.images, list | tuple) or any(image is None for image in self.images):
            raise ValueError(
                f"images must be a tuple of images that are not None, got {self.images!r:.100}; pass (image,) for one "
                "image and () for none"
            )
        object.__setattr__(self, "images", tuple(self.images))
        if self.question is None and (self.answer is None or self.images):
            raise ValueError(
                f"a turn without a question must have an answer and no images, got the answer {self.answer!r:.100} and "
                f"{len(self.images)} images"
            )
        for name, text in (("question", self.question), ("answer", self.answer)):
            if text is not None:
                _check_prompt_text(name, text)


@dataclass(frozen=True)
class Chat:
    """A request for the answer to the last question of a conversation. The result is a `QueryResult`.

    It needs the skill "query". A conversation of one turn with at most one image equals a `Query`.

    Attributes:
        turns: Questions and answers in order. The last turn has a question and no answer.
        reasoning: Generate reasoning before the answer, and return it.
        settings: Settings of the request.
        stop: Stop strings, as of a `Query`.
        json_schema: JSON schema of the answer, as of a `Query`.
    """

    skill: ClassVar[str] = "query"
    turns: tuple[Turn, ...]
    reasoning: bool = False
    settings: Settings = field(default_factory=Settings)
    stop: tuple[str, ...] = ()
    json_schema: Mapping[str, Any] | str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.turns, list | tuple) or not all(isinstance(turn, Turn) for turn in self.turns):
            raise ValueError(
                f"turns must be a tuple of Turn, got {self.turns!r:.100}; pass messages to the method chat"
            )
        object.__setattr__(self, "turns", tuple(self.turns))
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "json_schema", _schema_text(self.json_schema))
        object.__setattr__(self, "settings", Settings.of(self.settings))
        if not self.turns or self.turns[-1].answer is not None:
            raise ValueError("the last turn must have a question and no answer; append the question to answer")
        check_text("the question of the last turn", self.turns[-1].question)
        length = sum(len(text) for turn in self.turns for text in (turn.question, turn.answer) if text)
        if length > MAX_PROMPT_CHARACTERS:
            raise ValueError(f"a conversation must have at most {MAX_PROMPT_CHARACTERS} characters, got {length}")

    @property
    def images(self) -> tuple[Any, ...]:
        """Images of all turns, in order."""
        return tuple(image for turn in self.turns for image in turn.images)

    @property
    def image(self) -> Any:
        """First image; None without an image."""
        return next(iter(self.images), None)

    def with_images(self, images: Sequence[Any]) -> Chat:
        """Return the same conversation with other images.

        Args:
            images: As many images as `images` has, in the same order.

        Raises:
            ValueError: The number of images differs.
        """
        if len(images) != len(self.images):
            raise ValueError(f"the conversation has {len(self.images)} images, got {len(images)}; pass one for each")
        left = iter(images)
        turns = tuple(replace(turn, images=tuple(next(left) for _ in turn.images)) for turn in self.turns)
        return replace(self, turns=turns)


@dataclass(frozen=True)
class Caption:
    """A request for a caption; `length` is "short", "normal" or "long"."""

    skill: ClassVar[str] = "caption"
    image: Any
    length: str = "normal"
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        check_choice("length", self.length, CAPTION_LENGTHS)
        _check_request(self, None, "length")


@dataclass(frozen=True)
class Gaze:
    """A request for the gaze target of a person.

    Attributes:
        image: Image.
        eye: (x, y) between the eyes, as fractions.
        force: Return a point even if the model finds no target.
        settings: Settings of the request.
    """

    skill: ClassVar[str] = "gaze"
    image: Any
    eye: tuple[float, float]
    force: bool = False
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        refs = _spatial_refs((self.eye,))
        if len(refs[0]) != 2:
            raise ValueError(f"eye must be (x, y), got {self.eye!r:.100}")
        object.__setattr__(self, "eye", refs[0])
        _check_request(self, None, "eye")


Request = Union[Detect, Point, Query, Chat, Caption, Gaze]  # noqa: UP007 - evaluated at run time on Python 3.10


@dataclass(frozen=True)
class DetectedObject:
    """A detected box, not clipped to the image.

    Attributes:
        x_min: Left edge, as a fraction of the image width.
        y_min: Top edge, as a fraction of the image height.
        x_max: Right edge, as a fraction of the image width.
        y_max: Bottom edge, as a fraction of the image height.
        confidence: Confidence between 0 and 1, from the model's token probabilities; 1.0 if the model returns none.
    """

    x_min: float
    y_min: float
    x_max: float
    y_max: float
    confidence: float = 1.0

    def to_dict(self) -> dict[str, float]:
        """Return the fields as a dict."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class DetectedPoint:
    """A detected point.

    Attributes:
        x: Fraction of the image width.
        y: Fraction of the image height.
        confidence: Confidence, as of a `DetectedObject`.
    """

    x: float
    y: float
    confidence: float = 1.0

    def to_dict(self) -> dict[str, float]:
        """Return the fields as a dict."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class Grounding:
    """Points in the image that the characters `start` to `end` of a reasoning text refer to."""

    start: int
    end: int
    points: tuple[tuple[float, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the dict of the published model."""
        return {"start_idx": self.start, "end_idx": self.end, "points": list(self.points)}


@dataclass(frozen=True)
class Reasoning:
    """Reasoning text before an answer, and the points that it refers to."""

    text: str
    grounding: tuple[Grounding, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the dict of the published model."""
        return {"text": self.text, "grounding": [g.to_dict() for g in self.grounding]}


@dataclass(frozen=True)
class DetectResult:
    """Result of `Detect`.

    Attributes:
        objects: Detected boxes.
        truncated: Whether `max_objects` ended the list.
    """

    objects: tuple[DetectedObject, ...]
    truncated: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the dict of the published model."""
        return {"objects": [o.to_dict() for o in self.objects], "truncated": self.truncated}


@dataclass(frozen=True)
class PointResult:
    """Result of `Point`; `truncated` as in a `DetectResult`."""

    points: tuple[DetectedPoint, ...]
    truncated: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the dict of the published model."""
        return {"points": [p.to_dict() for p in self.points], "truncated": self.truncated}


@dataclass(frozen=True)
class QueryResult:
    """Result of `Query` and `Chat`.

    Attributes:
        answer: Answer text.
        reasoning: Reasoning, if the request asked for it.
        truncated: Whether `max_tokens` ended the answer or its reasoning.
        logprob: Mean log-probability of the answer's tokens; None if the model returns none.
    """

    answer: str
    reasoning: Reasoning | None = None
    truncated: bool = False
    logprob: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the dict of the published model."""
        reasoning = {} if self.reasoning is None else {"reasoning": self.reasoning.to_dict()}
        return {**reasoning, "answer": self.answer, "truncated": self.truncated, **_score(self.logprob)}


@dataclass(frozen=True)
class CaptionResult:
    """Result of `Caption`; `truncated` and `logprob` as in a `QueryResult`."""

    caption: str
    truncated: bool = False
    logprob: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the dict of the published model."""
        return {"caption": self.caption, "truncated": self.truncated, **_score(self.logprob)}


@dataclass(frozen=True)
class GazeResult:
    """Result of `Gaze`: a point, or None if the model finds no target."""

    gaze: DetectedPoint | None

    def to_dict(self) -> dict[str, Any]:
        """Return the dict of the published model."""
        return {"gaze": None if self.gaze is None else {"x": self.gaze.x, "y": self.gaze.y}}


@dataclass(frozen=True)
class ErrorResult:
    """Result of a request that failed."""

    error: Exception


Result = Union[DetectResult, PointResult, QueryResult, CaptionResult, GazeResult, ErrorResult]  # noqa: UP007


def pieces_of(result: Result) -> list[Any]:
    """Return the parts of a result in the order of streaming: objects, points, reasoning or text."""
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


def _check_request(request: Any, text: str | None, name: str, image_required: bool = True) -> None:
    if image_required and request.image is None:
        raise ValueError(f"{request.skill} needs an image, got image=None; pass an image")
    object.__setattr__(request, "settings", Settings.of(request.settings))
    if name not in ("object", "question"):
        return
    _check_prompt_text(name, check_text(name, text))


def _check_prompt_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a string, got {text!r:.100}")
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise ValueError(f"{name} must have at most {MAX_PROMPT_CHARACTERS} characters, got {len(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be valid Unicode text, got {text!r:.100}") from error


def _spatial_refs(refs: Sequence[Sequence[float]] | None) -> tuple[SpatialRef, ...]:
    checked = []
    for ref in refs or ():
        try:
            values = tuple(float(v) for v in ref)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"a spatial reference must be (x, y) or (x_min, y_min, x_max, y_max), got {ref!r:.100}"
            ) from error
        if len(values) not in (2, 4):
            raise ValueError(f"a spatial reference must have 2 or 4 numbers, got {len(values)}: {ref!r:.100}")
        if not all(0.0 <= v <= 1.0 for v in values):
            raise ValueError(f"a spatial reference must have fractions between 0 and 1, got {ref!r:.100}")
        if len(values) == 4 and (values[2] <= values[0] or values[3] <= values[1]):
            raise ValueError(f"a box must be (x_min, y_min, x_max, y_max) with a positive area, got {ref!r:.100}")
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
                f"a stop string must have 1 to {MAX_STOP_CHARACTERS} characters, got {len(string)}: {string!r:.100}"
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
    """Return the number of nested levels of a JSON value."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, Mapping | list | tuple)]:
        depth += 1
        level = [child for item in level for child in (item.values() if isinstance(item, Mapping) else item)]
    return depth
