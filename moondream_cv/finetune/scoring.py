"""Score of a model on held-out images: F1 per class, and the mean reward."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from moondream_cv.errors import ImageError
from moondream_cv.evaluation.matching import Counts, match_boxes, match_points
from moondream_cv.finetune.datasets import Example
from moondream_cv.finetune.rewards import detect_reward, point_reward
from moondream_cv.images import to_rgb
from moondream_cv.requests import Detect, DetectResult, ErrorResult, Point, PointResult, Settings

if TYPE_CHECKING:
    from moondream_cv.engine.local_model import LocalModel

IMAGES_PER_CALL = 8
"""Number of images that are in memory at a time."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoredExample:
    """The result of one example.

    Attributes:
        example: Request and target.
        predicted: [N, 4] boxes or [N, 2] points, as fractions of the image.
        reward: Built-in reward of the prediction, from 0 to 1.
        counts: Matches at IoU 0.5, or of points inside boxes.
    """

    example: Example
    predicted: npt.NDArray[np.float32]
    reward: float
    counts: Counts


@dataclass(frozen=True)
class Score:
    """The score of a model.

    Attributes:
        examples: Results by example.
    """

    examples: tuple[ScoredExample, ...]

    @property
    def f1(self) -> float:
        """F1 of the boxes of all classes at IoU 0.5, or of the points inside boxes."""
        return sum((one.counts for one in self.examples), Counts()).f1

    @property
    def reward(self) -> float:
        """Mean reward of the examples; 0 without examples."""
        return float(np.mean([one.reward for one in self.examples])) if self.examples else 0.0

    def counts_of(self, name: str) -> Counts:
        """Return the matches of one class.

        Args:
            name: Class name.
        """
        return sum((one.counts for one in self.examples if one.example.name == name), Counts())


def evaluate(model: LocalModel, examples: Iterable[Example], skill: str, adapter: str | None = None) -> Score:
    """Return the score of a model. Images that cannot be read are skipped with a warning.

    Args:
        model: Model to run.
        examples: Requests with targets; those of an image follow each other.
        skill: "detect" or "point".
        adapter: Name or file of the adapter; None: the model without an adapter.
    """
    scored: list[ScoredExample] = []
    found = list(examples)
    max_objects = max([50, *(2 * len(example.boxes) for example in found)])
    settings = Settings(variant=adapter, max_objects=max_objects)
    request = Detect if skill == "detect" else Point
    for part in _parts(with_images(found)):
        results = model.run([request(image, example.name, settings) for example, image in part])
        for (example, _), result in zip(part, results, strict=True):
            if isinstance(result, ErrorResult):
                raise result.error
            assert isinstance(result, DetectResult | PointResult)
            scored.append(_scored(example, result))
    return Score(tuple(scored))


def with_images(
    examples: Iterable[Example], unreadable: set[Path] | None = None
) -> Iterator[tuple[Example, Image.Image]]:
    """Yield examples with their images, without those whose image cannot be read.

    Args:
        examples: Examples; those of an image follow each other, so that it is read once.
        unreadable: Images that are skipped without a warning; further unreadable images are added.
    """
    unreadable = set() if unreadable is None else unreadable
    for path, group in groupby(examples, key=lambda example: example.image.path):
        try:
            image = Image.fromarray(to_rgb(path))
        except ImageError as error:
            if path not in unreadable:
                logger.warning("skipped: %s", error)
            unreadable.add(path)
            continue
        for example in group:
            yield example, image


def _parts(pairs: Iterable[tuple[Example, Image.Image]]) -> Iterator[list[tuple[Example, Image.Image]]]:
    """Yield the examples of `IMAGES_PER_CALL` images at a time."""
    part: list[tuple[Example, Image.Image]] = []
    for _, group in groupby(pairs, key=lambda pair: pair[0].image.path):
        part += group
        if len({pair[0].image.path for pair in part}) == IMAGES_PER_CALL:
            yield part
            part = []
    if part:
        yield part


def _scored(example: Example, result: DetectResult | PointResult) -> ScoredExample:
    true = np.array(example.boxes, np.float32).reshape(-1, 4)
    if isinstance(result, DetectResult):
        boxes = _array([(one.x_min, one.y_min, one.x_max, one.y_max) for one in result.objects], 4)
        return ScoredExample(example, boxes, detect_reward(boxes, true), match_boxes(boxes, true)[0])
    points = _array([(one.x, one.y) for one in result.points], 2)
    return ScoredExample(example, points, point_reward(points, true), match_points(points, true))


def _array(values: Sequence[Sequence[float]], size: int) -> npt.NDArray[np.float32]:
    return np.array(values, np.float32).reshape(-1, size)
