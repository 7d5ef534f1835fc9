"""Calibration: monotone maps that turn a score into the share of such objects that are right.

A checkpoint may carry one as `calibration.json` beside its weights; `python -m moondream_cv.evaluation.confidence
--write FOLDER` makes it. A map never changes the order of two scores, so that whatever depends on the order alone
stays as it is. How scores come about is the business of `confidence.py`.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from moondream_cv.errors import CheckpointError

FILE_NAME = "calibration.json"
SCHEMA = 1
SKILLS = ("detect", "point")


@dataclass(frozen=True)
class Curve:
    """A piecewise linear map of 0..1 into 0..1 that rises everywhere.

    Attributes:
        scores: Where the pieces meet, from 0 to 1, rising.
        probabilities: What the map gives there, rising.

    Raises:
        ValueError: They are not so.
    """

    scores: tuple[float, ...]
    probabilities: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.scores) != len(self.probabilities):
            raise ValueError(f"{len(self.scores)} scores and {len(self.probabilities)} probabilities; want as many")
        for name, values in (("scores", self.scores), ("probabilities", self.probabilities)):
            if not all(0.0 <= value <= 1.0 for value in values) or any(b <= a for a, b in pairwise(values)):
                raise ValueError(f"{name} must rise within 0..1, not {list(values)}")
        if len(self.scores) < 2 or (self.scores[0], self.scores[-1]) != (0.0, 1.0):
            raise ValueError(f"scores must reach from 0 to 1, not {list(self.scores)}")

    def __call__(self, score: float) -> float:
        """Map a score; NaN stays NaN.

        Raises:
            ValueError: The score is not in 0..1.
        """
        if math.isnan(score):
            return score
        if not 0.0 <= score <= 1.0:
            raise ValueError(f"a score is a number in 0..1, not {score!r}")
        right = min(bisect_right(self.scores, score), len(self.scores) - 1)
        x0, x1 = self.scores[right - 1 : right + 1]
        y0, y1 = self.probabilities[right - 1 : right + 1]
        return min(y0 + (score - x0) * ((y1 - y0) / (x1 - x0)), y1)


@dataclass(frozen=True)
class Calibration:
    """The curves of a checkpoint, one per skill; a skill without one keeps its scores."""

    curves: Mapping[str, Curve] = field(default_factory=dict)

    def apply(self, skill: str, score: float) -> float:
        """Turn a score of a skill, "detect" or "point", into a probability; NaN stays NaN.

        Raises:
            ValueError: The score is not in 0..1.
        """
        curve = self.curves.get(skill)
        return score if curve is None else curve(score)

    def to_dict(self) -> dict[str, Any]:
        """The content of the file."""
        skills = {
            skill: {"scores": list(curve.scores), "probabilities": list(curve.probabilities)}
            for skill, curve in self.curves.items()
        }
        return {"schema": SCHEMA, "skills": skills}

    def write(self, path: Path) -> None:
        """Write the file."""
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """Read a file that `write` has written.

        Raises:
            CheckpointError: It cannot be read, or does not hold what it should; names the file and what is wrong.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
        try:
            return cls(_curves(content))
        except ValueError as error:
            raise CheckpointError(f"{path} is no calibration: {error}") from error

    @classmethod
    def beside(cls, folder: Path) -> Calibration | None:
        """What a checkpoint's folder carries, or None.

        Raises:
            CheckpointError: As `read`.
        """
        file = folder / FILE_NAME
        return cls.read(file) if file.is_file() else None


def _curves(content: Any) -> dict[str, Curve]:
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or isinstance(content["schema"], bool):
        found = content.get("schema") if isinstance(content, dict) else content
        raise ValueError(f"want an object with schema {SCHEMA}, not {found!r}; another version may have written it")
    skills = content.get("skills")
    if not isinstance(skills, dict) or not set(skills) <= set(SKILLS):
        raise ValueError(f"skills must be an object with {' and '.join(SKILLS)}, not {skills!r}")
    curves = {}
    for skill, curve in skills.items():
        if not isinstance(curve, dict):
            raise ValueError(f"{skill} must be an object, not {curve!r}")
        try:
            curves[skill] = Curve(_numbers(curve, "scores"), _numbers(curve, "probabilities"))
        except ValueError as error:
            raise ValueError(f"{skill}: {error}") from error
    return curves


def _numbers(curve: dict[str, Any], name: str) -> tuple[float, ...]:
    values = curve.get(name)
    if not isinstance(values, Sequence) or any(type(value) not in (int, float) for value in values):
        raise ValueError(f"{name} must be a list of numbers, not {values!r}")
    return tuple(map(float, values))
