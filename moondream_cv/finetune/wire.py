"""Requests and ground truth of the tuning API, checked and typed.

The same checks apply to arguments from Python and to bodies from JSON. All errors are `ValueError`s that begin with the
path of the wrong value. Images are not checked: a request passes them on as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moondream_cv.arguments import check_choice, check_flag, check_integer, check_share
from moondream_cv.finetune.values import (
    XY,
    Box,
    check_box,
    check_boxes,
    check_finite,
    check_grounding,
    check_items,
    check_list,
    check_mapping,
    check_point,
    check_points,
    check_prompt,
    limited_nesting,
)
from moondream_cv.requests import Detect, Point, Query, Reasoning, Request, Settings, SpatialRef

SKILLS = ("query", "point", "detect")
MAX_ROLLOUTS = 16
MIN_TEMPERATURE = 0.01  # logits are divided by it


@dataclass(frozen=True)
class RolloutSettings:
    """Sampling settings of rollouts.

    Attributes:
        temperature: Sampling temperature of text, coordinates and sizes, at least 0.01.
        top_p: Cumulative probability of nucleus sampling, above 0 and at most 1.
        max_tokens: Maximum number of tokens of an answer, and of its reasoning; None for points and objects.
        max_objects: Maximum number of objects or points; None for answers.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int | None = None
    max_objects: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that the skill has."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class RolloutRequest:
    """A request for rollouts, or the request of a group of a training step. `parse_request` creates it.

    Attributes:
        skill: "query", "point" or "detect".
        image: Image in any form that the package accepts; None for a question without an image.
        question: Question of a query.
        object: Class name of the objects to point at or to detect.
        spatial_refs: Points and boxes that a question refers to, as fractions.
        reasoning: Whether a query generates reasoning before the answer.
        settings: Sampling settings.
    """

    skill: str
    image: Any = None
    question: str | None = None
    object: str | None = None
    spatial_refs: tuple[SpatialRef, ...] = ()
    reasoning: bool = False
    settings: RolloutSettings = field(default_factory=RolloutSettings)

    def to_request(self, seed: int) -> Request:
        """Return the request to the model.

        Args:
            seed: Random seed of the rollout.
        """
        settings = Settings.of({**self.settings.to_dict(), "seed": seed, "sample_regions": True})
        if self.skill == "query":
            return Query(self.image, self.question or "", self.reasoning, self.spatial_refs, settings)
        return (Point if self.skill == "point" else Detect)(self.image, self.object or "", settings)

    def to_dict(self) -> dict[str, Any]:
        """Return the request as JSON values without the image, with the defaults filled in."""
        fields: dict[str, Any] = {"skill": self.skill}
        if self.skill == "query":
            fields.update(question=self.question, reasoning=self.reasoning)
            fields["spatial_refs"] = [list(ref) for ref in self.spatial_refs]
        else:
            fields["object"] = self.object
        return {**fields, "settings": self.settings.to_dict()}


@dataclass(frozen=True)
class GroundTruth:
    """True points or true boxes of a request, as fractions; one of the two is None. An empty tuple means no objects.

    Attributes:
        points: Points as (x, y).
        boxes: Boxes as (x_min, y_min, x_max, y_max).
    """

    points: tuple[XY, ...] | None = None
    boxes: tuple[Box, ...] | None = None


def parse_request(value: object, path: str = "request") -> RolloutRequest:
    """Check a request.

    Args:
        value: Mapping with "skill", "image", "question" or "object", "spatial_refs", "reasoning" and "settings".
        path: Path of the value for error messages.

    Raises:
        ValueError: A key is unknown, missing or belongs to another skill, or a value is out of range.
    """
    with limited_nesting(path):
        # Check the keys
        skill = check_choice(f"{path}.skill", check_mapping(path, value).get("skill"), SKILLS)
        text_key = "question" if skill == "query" else "object"
        allowed = ("skill", "image", text_key, "spatial_refs", "reasoning", "settings")
        given = check_mapping(path, value, allowed, required=[text_key])
        if skill != "query" and "image" not in given:
            raise ValueError(f"{path}.image is missing; {skill} needs an image")

        # Check what only queries have
        reasoning = check_flag(f"{path}.reasoning", given.get("reasoning", False))
        spatial_refs = check_items(f"{path}.spatial_refs", given.get("spatial_refs", ()), _spatial_ref)
        if skill != "query" and (reasoning or spatial_refs):
            name = "reasoning" if reasoning else "spatial_refs"
            raise ValueError(f"{path}.{name} is only for query, got {given[name]!r:.100} for {skill}; leave it out")
        if spatial_refs and "image" not in given:
            raise ValueError(f"{path}.spatial_refs need an image, got none; pass an image")

        # Check the text and the settings
        text = check_prompt(f"{path}.{text_key}", given[text_key])
        settings = _settings(f"{path}.settings", given.get("settings", {}), skill, reasoning)
        return RolloutRequest(
            skill,
            given.get("image"),
            question=text if skill == "query" else None,
            object=None if skill == "query" else text,
            spatial_refs=spatial_refs,
            reasoning=reasoning,
            settings=settings,
        )


def parse_num_rollouts(value: object) -> int:
    """Return the number of rollouts, 1 to 16.

    Raises:
        ValueError: The value is not such an integer.
    """
    with limited_nesting("num_rollouts"):
        return check_integer("num_rollouts", value, 1, MAX_ROLLOUTS)


def parse_ground_truth(value: object, skill: str, path: str = "ground_truth") -> GroundTruth:
    """Check the ground truth of a request.

    Args:
        value: {"points": [[x, y] or {"x", "y"}, ...]} for point, or {"boxes": [[x_min, y_min, x_max, y_max] or an
            object with these keys, ...]} for point and detect. Coordinates are fractions between 0 and 1.
        skill: Skill of the request.
        path: Path of the value for error messages.

    Raises:
        ValueError: The skill has no ground truth, the mapping does not have exactly one of the two keys, or a point or
            box is invalid.
    """
    if skill not in ("point", "detect"):
        raise ValueError(f"{path} is only for point and detect, got a request for {skill}; compute rewards yourself")
    with limited_nesting(path):
        allowed = ("boxes",) if skill == "detect" else ("points", "boxes")
        given = check_mapping(path, value, allowed)
        if len(given) != 1:
            raise ValueError(f"{path} must have exactly one of the keys {' and '.join(allowed)}, got {sorted(given)}")
        if "boxes" in given:
            return GroundTruth(boxes=check_boxes(f"{path}.boxes", given["boxes"]))
        return GroundTruth(points=check_points(f"{path}.points", given["points"]))


def parse_reasoning(value: object, path: str = "reasoning") -> Reasoning:
    """Check reasoning before an answer.

    Args:
        value: Text, or {"text", "grounding"?} with {"start_idx", "end_idx", "points"} for each grounding.
        path: Path of the value for error messages.

    Raises:
        ValueError: The value has neither form, or a grounding is outside the text.
    """
    if isinstance(value, str):
        return Reasoning(check_prompt(path, value))
    with limited_nesting(path):
        given = check_mapping(path, value, ("text", "grounding"), required=["text"])
        text = check_prompt(f"{path}.text", given["text"])
        grounding = check_items(f"{path}.grounding", given.get("grounding", ()), check_grounding)
        for i, item in enumerate(grounding):
            if not item.start <= item.end <= len(text):
                raise ValueError(
                    f"{path}.grounding[{i}] must have start_idx <= end_idx <= {len(text)}, the length of the text, got "
                    f"{item.start} and {item.end}"
                )
        return Reasoning(text, grounding)


def _spatial_ref(path: str, value: object) -> SpatialRef:
    size = len(check_list(path, value))
    if size == 2:
        return check_point(path, value)
    if size == 4:
        return check_box(path, value)
    raise ValueError(f"{path} must be [x, y] or [x_min, y_min, x_max, y_max], got {size} numbers: {value!r:.100}")


def _settings(path: str, value: object, skill: str, reasoning: bool) -> RolloutSettings:
    limit, default = ("max_tokens", 256 if reasoning else 128) if skill == "query" else ("max_objects", 50)
    given = check_mapping(path, value, ("temperature", "top_p", limit))
    temperature = check_finite(f"{path}.temperature", given.get("temperature", 1.0))
    if temperature < MIN_TEMPERATURE:
        raise ValueError(
            f"{path}.temperature must be at least {MIN_TEMPERATURE}, got {given['temperature']!r:.100}; at 0 all "
            "rollouts would be equal"
        )
    return RolloutSettings(
        temperature=temperature,
        top_p=check_share(f"{path}.top_p", given.get("top_p", 1.0)),
        **{limit: check_integer(f"{path}.{limit}", given.get(limit, default))},
    )
