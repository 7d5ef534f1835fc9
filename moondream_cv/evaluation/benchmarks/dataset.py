"""Benchmarks in memory: examples with questions and ground truth. Images stay on disk until they are needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moondream_cv.evaluation.benchmarks.parquet import ParquetImage

Task = Literal["coco", "screenspot", "countbenchqa", "docvqa", "textvqa", "chartqa", "ocrbench"]
Skill = Literal["detect", "point", "query"]


@dataclass(frozen=True)
class Question:
    """A prompt for one image, with its ground truth.

    Attributes:
        prompt: Question in the published prompt of the task, or the description of the object to find.
        answers: Accepted answers of a question.
        box: Box of the object to find: x_min, y_min, x_max, y_max.
        is_fraction: Whether `box` is in fractions of the image instead of pixels.
        groups: Groups of the question, each of which has its own score.
    """

    prompt: str
    answers: tuple[str, ...] = ()
    box: tuple[float, float, float, float] | None = None
    is_fraction: bool = False
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Example:
    """An image with its questions.

    Attributes:
        name: Name of the image, unique in the benchmark.
        image: File, or row of a Parquet file.
        questions: Questions about this image. They are empty if all images have the same prompts.
    """

    name: str
    image: Path | ParquetImage
    questions: tuple[Question, ...] = ()


@dataclass(frozen=True)
class Benchmark:
    """A split of a dataset.

    Attributes:
        task: Task that determines prompts and metrics.
        skill: Skill of the model that the task needs.
        title: Name of the dataset.
        split: Split; empty if the files have no splits.
        examples: Images in a fixed order.
        classes: Class names that are requested on each image, for the task "coco".
        coco: Ground truth of the task "coco", with the keys `images`, `annotations` and `categories`. Its images are
            those of `examples`, in the same order.
        is_on_card: Whether the model card has a figure for this split.
    """

    task: Task
    skill: Skill
    title: str
    split: str
    examples: Sequence[Example]
    classes: tuple[str, ...] = ()
    coco: Mapping[str, Any] = field(default_factory=dict)
    is_on_card: bool = False

    def digest(self) -> str:
        """Return a hash of the images' names and of all prompts, which is the same wherever the files are."""
        hasher = hashlib.sha256(json.dumps([self.task, self.skill, self.classes]).encode())
        for example in self.examples:
            hasher.update(json.dumps([example.name, [one.prompt for one in example.questions]]).encode())
        return hasher.hexdigest()
