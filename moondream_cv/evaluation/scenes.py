"""Evaluate a model on rendered scenes: detection, pointing, counting, questions and captions.

Scenes come from the training renderer, with seeds that training never uses, or from a second renderer that shares only
the names and the icons with it. `python -m moondream_cv.evaluation` prints the metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from moondream_cv.evaluation.matching import Counts, match_boxes, match_points
from moondream_cv.requests import Caption, Detect, DetectResult, ErrorResult, Point, Query, Request, Settings
from moondream_cv.scenes.alternate import render_alternate
from moondream_cv.scenes.render import render_scene
from moondream_cv.scenes.scene import Scene, SceneObject
from moondream_cv.scenes.world import COLORS, ICONS, SHAPES, plural, short_caption, with_article
from moondream_cv.vision_model import VisionModel

RENDERERS: dict[str, Callable[..., Scene]] = {"own": render_scene, "alternate": render_alternate}
HELD_OUT = 1_000_000_007  # first seed of the held-out scenes; training uses other random streams
GREEDY = Settings(temperature=0.0, max_tokens=64)
MAX_CAPTIONED = 3  # captions are compared on scenes of at most this many objects

Case = tuple[Request, Callable[[Any], None]]  # a request, and the function that scores its result


@dataclass
class Accuracy:
    """Share of correct answers.

    Attributes:
        correct: Number of correct answers.
        total: Number of answers.
    """

    correct: int = 0
    total: int = 0

    def add(self, correct: bool) -> None:
        """Count one answer."""
        self.correct += correct
        self.total += 1

    @property
    def value(self) -> float:
        """Accuracy, 0..1; NaN without answers."""
        return self.correct / self.total if self.total else float("nan")


@dataclass
class SceneReport:
    """Counts and accuracies over many scenes.

    Attributes:
        boxes: Detections of every name in a scene, matched at IoU 0.5.
        any_object: Detections of "object", matched at IoU 0.5.
        points: Points of every name, matched to the boxes that contain them.
        overlaps: IoU of each matched box.
        absent: Names that are not in the scene and return no detections.
        count: Answers to "How many ... are there?".
        several: The same for names that occur more than once.
        color: Answers to the question for a shape's color.
        identity: Answers to "What is this?" at a point.
        exists: Answers to "Is there ...?".
        caption: Short captions of at most three objects that equal the expected text.
    """

    boxes: Counts = field(default_factory=Counts)
    any_object: Counts = field(default_factory=Counts)
    points: Counts = field(default_factory=Counts)
    overlaps: list[float] = field(default_factory=list)
    absent: Accuracy = field(default_factory=Accuracy)
    count: Accuracy = field(default_factory=Accuracy)
    several: Accuracy = field(default_factory=Accuracy)
    color: Accuracy = field(default_factory=Accuracy)
    identity: Accuracy = field(default_factory=Accuracy)
    exists: Accuracy = field(default_factory=Accuracy)
    caption: Accuracy = field(default_factory=Accuracy)

    def metrics(self) -> dict[str, float]:
        """Return each metric, 0..1; NaN if no scene has a case for it."""
        return {
            "F1 at IoU 0.5": self.boxes.f1,
            "mean IoU of matches": float(np.mean(self.overlaps)) if self.overlaps else float("nan"),
            'F1 of "object"': self.any_object.f1,
            "F1 of points": self.points.f1,
            "absent names answered with nothing": self.absent.value,
            "count": self.count.value,
            "count of two and more": self.several.value,
            "colour": self.color.value,
            '"What is this?" at a point': self.identity.value,
            "is there": self.exists.value,
            "short captions of up to 3 objects": self.caption.value,
        }


def held_out_scenes(renderer: str, count: int) -> Iterator[Scene]:
    """Return the first held-out scenes of a renderer.

    Args:
        renderer: "own" for the training renderer, or "alternate".
        count: Number of scenes.
    """
    return (RENDERERS[renderer](HELD_OUT + i) for i in range(count))


def evaluate_scenes(model: VisionModel, scenes: Iterable[Scene], seed: int = 0) -> SceneReport:
    """Run a model on scenes and compare the results with the ground truth.

    Args:
        model: Model to evaluate.
        scenes: Scenes with ground truth.
        seed: Random seed for the choice of absent names.

    Raises:
        Exception: A request failed; the error of that request.
    """
    report, rng = SceneReport(), np.random.default_rng(seed)
    for scene in scenes:
        cases = [*_name_cases(scene, report, rng), *_object_cases(scene, report)]
        for (_, score), result in zip(cases, model.run([request for request, _ in cases]), strict=True):
            if isinstance(result, ErrorResult):
                raise result.error
            score(result)
    return report


def _name_cases(scene: Scene, report: SceneReport, rng: np.random.Generator) -> Iterator[Case]:
    """Yield the cases for names: boxes, points, counts and existence, of present and absent objects."""
    image = Image.fromarray(scene.image)
    for name in dict.fromkeys(o.name for o in scene.objects):
        true = _boxes(scene, scene.named(name))
        yield Detect(image, name), _score_boxes(report, true)
        yield Point(image, name), _score_points(report, true)
        counted = (report.count, report.several) if len(true) > 1 else (report.count,)
        yield _question(image, f"How many {plural(name)} are there?"), _score_answer(str(len(true)), *counted)
        yield _question(image, f"Is there {with_article(name)}?"), _score_answer("yes", report.exists)
    yield Detect(image, "object"), _score_any_object(report, _boxes(scene, scene.objects))
    absent = _absent(scene, rng, 4)
    for name in absent[1:]:
        yield Detect(image, name), lambda result: report.absent.add(not result.objects)
    yield _question(image, f"Is there {with_article(absent[0])}?"), _score_answer("no", report.exists)


def _object_cases(scene: Scene, report: SceneReport) -> Iterator[Case]:
    """Yield the cases for objects: name and color of each, and a caption of all."""
    image, (width, height) = Image.fromarray(scene.image), scene.resolution_wh
    ordered = sorted(scene.objects, key=lambda o: o.center[0])
    for item in ordered:
        if item.color and sum(o.shape == item.shape for o in ordered) == 1:
            yield _question(image, f"What colour is the {item.shape}?"), _score_answer(item.color, report.color)
        at = (item.center[0] / width, item.center[1] / height)
        yield (
            Query(image, "What is this?", spatial_refs=(at,), settings=GREEDY),
            _score_answer(item.name, report.identity),
        )
    if 0 < len(ordered) <= MAX_CAPTIONED:
        expected = short_caption([o.name for o in ordered])
        yield Caption(image, "short", GREEDY), lambda result: report.caption.add(result.caption == expected)


def _question(image: Image.Image, question: str) -> Query:
    return Query(image, question, settings=GREEDY)


def _score_answer(expected: str, *accuracies: Accuracy) -> Callable[[Any], None]:
    def score(result: Any) -> None:
        for accuracy in accuracies:
            accuracy.add(result.answer.strip().lower() == expected)

    return score


def _score_boxes(report: SceneReport, true: np.ndarray) -> Callable[[Any], None]:
    def score(result: DetectResult) -> None:
        counts, overlaps = match_boxes(_box_array(result), true)
        report.boxes += counts
        report.overlaps += overlaps

    return score


def _score_any_object(report: SceneReport, true: np.ndarray) -> Callable[[Any], None]:
    def score(result: DetectResult) -> None:
        report.any_object += match_boxes(_box_array(result), true)[0]

    return score


def _score_points(report: SceneReport, true: np.ndarray) -> Callable[[Any], None]:
    def score(result: Any) -> None:
        points = np.array([(p.x, p.y) for p in result.points], np.float32).reshape(-1, 2)
        report.points += match_points(points, true)

    return score


def _box_array(result: DetectResult) -> np.ndarray:
    return np.array([(o.x_min, o.y_min, o.x_max, o.y_max) for o in result.objects], np.float32).reshape(-1, 4)


def _boxes(scene: Scene, objects: Iterable[SceneObject]) -> np.ndarray:
    """Return the boxes of objects, [N, 4] xyxy as fractions of the image."""
    boxes = np.array([o.xyxy for o in objects], np.float32).reshape(-1, 4)
    return boxes / np.array(scene.resolution_wh * 2, np.float32)


def _absent(scene: Scene, rng: np.random.Generator, count: int) -> list[str]:
    """Draw names of absent objects: near misses of the scene's shapes and arbitrary names, in turn."""
    present = {name for o in scene.objects for name in (o.name, o.shape)}
    shapes = [o for o in scene.objects if o.color]
    near = [f"{c} {o.shape}" for o in shapes for c in COLORS] + [f"{o.color} {s}" for o in shapes for s in SHAPES]
    far = [*ICONS, *SHAPES, *(f"{c} {s}" for c in COLORS for s in SHAPES)]
    pools = [[name for name in pool if name not in present] for pool in (near or far, far)]
    return [str(rng.choice(pools[i % 2])) for i in range(count)]
