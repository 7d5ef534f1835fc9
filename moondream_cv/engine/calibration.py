"""Calibration: monotonic curves that map the score of an object to the probability that it is correct.

A checkpoint may contain one as `calibration.json` next to its weights; `python -m moondream_cv.evaluation.confidence
--write FOLDER` writes it. A curve never changes the order of two scores, so metrics that depend only on the order stay
the same. `confidence.py` computes the scores.
"""

from __future__ import annotations

import json
import math
import os
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
    """A strictly increasing, piecewise linear function from 0..1 to 0..1.

    Attributes:
        scores: Scores of the knots, strictly increasing from 0 to 1.
        probabilities: Probabilities at the knots, strictly increasing.

    Raises:
        ValueError: The knots are invalid.
    """

    scores: tuple[float, ...]
    probabilities: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.scores) != len(self.probabilities):
            lengths = f"{len(self.scores)} and {len(self.probabilities)}"
            raise ValueError(f"scores and probabilities must have the same length, got {lengths}")
        for name, values in (("scores", self.scores), ("probabilities", self.probabilities)):
            if not all(0.0 <= value <= 1.0 for value in values) or any(b <= a for a, b in pairwise(values)):
                raise ValueError(f"{name} must increase strictly within 0..1, got {list(values)}")
        if len(self.scores) < 2 or (self.scores[0], self.scores[-1]) != (0.0, 1.0):
            raise ValueError(f"scores must start at 0 and end at 1, got {list(self.scores)}")

    def __call__(self, score: float) -> float:
        """Return the probability of a score; NaN stays NaN.

        Raises:
            ValueError: The score is not between 0 and 1.
        """
        if math.isnan(score):
            return score
        if not 0.0 <= score <= 1.0:
            raise ValueError(f"a score must be between 0 and 1, got {score!r}")
        right = min(bisect_right(self.scores, score), len(self.scores) - 1)
        x0, x1 = self.scores[right - 1 : right + 1]
        y0, y1 = self.probabilities[right - 1 : right + 1]
        return min(y0 + (score - x0) * ((y1 - y0) / (x1 - x0)), y1)


@dataclass(frozen=True)
class Calibration:
    """Calibration of a checkpoint.

    Attributes:
        curves: One curve per skill; scores of other skills are not changed.
    """

    curves: Mapping[str, Curve] = field(default_factory=dict)

    def apply(self, skill: str, score: float) -> float:
        """Return the probability of a score; NaN stays NaN.

        Args:
            skill: "detect" or "point".
            score: Score between 0 and 1.

        Raises:
            ValueError: The score is not between 0 and 1.
        """
        curve = self.curves.get(skill)
        return score if curve is None else curve(score)

    def to_dict(self) -> dict[str, Any]:
        """Return the calibration as a JSON-compatible dict."""
        skills = {
            skill: {"scores": list(curve.scores), "probabilities": list(curve.probabilities)}
            for skill, curve in self.curves.items()
        }
        return {"schema": SCHEMA, "skills": skills}

    def write(self, path: Path) -> None:
        """Write the calibration as JSON."""
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read a file written by `write`.

        Args:
            path: JSON file.

        Raises:
            CheckpointError: The file cannot be read or is invalid; the message names the file and the problem.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
        try:
            return cls(_curves(content))
        except ValueError as error:
            raise CheckpointError(f"{path} is not a valid calibration: {error}") from error

    @classmethod
    def from_folder(cls, folder: Path) -> Calibration | None:
        """Read the calibration of a checkpoint's folder; None if it has none.

        Raises:
            CheckpointError: The file cannot be read or is invalid.
        """
        file = folder / FILE_NAME
        return cls.read(file) if file.is_file() else None


def _curves(content: Any) -> dict[str, Curve]:
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or isinstance(content["schema"], bool):
        found = content.get("schema") if isinstance(content, dict) else content
        raise ValueError(f"schema must be {SCHEMA}, got {found!r}; another version may have written the file")
    skills = content.get("skills")
    if not isinstance(skills, dict) or not set(skills) <= set(SKILLS):
        raise ValueError(f"skills must be an object with the keys {' and '.join(SKILLS)}, got {skills!r}")
    curves = {}
    for skill, curve in skills.items():
        if not isinstance(curve, dict):
            raise ValueError(f"{skill} must be an object, got {curve!r}")
        try:
            curves[skill] = Curve(_numbers(curve, "scores"), _numbers(curve, "probabilities"))
        except ValueError as error:
            raise ValueError(f"{skill}: {error}") from error
    return curves


def _numbers(curve: dict[str, Any], name: str) -> tuple[float, ...]:
    values = curve.get(name)
    if not isinstance(values, Sequence) or any(type(value) not in (int, float) for value in values):
        raise ValueError(f"{name} must be a list of numbers, got {values!r}")
    return tuple(map(float, values))
