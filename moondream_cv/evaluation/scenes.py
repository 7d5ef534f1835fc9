"""A model on rendered scenes: boxes, points, absent names, counts, colors, "What is this?" and captions.

Scenes come from the training renderer with seeds that training never draws, or from the other renderer, which shares
nothing with it but the names and the icons. `python -m moondream_cv.evaluation` prints the figures.
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
HELD_OUT = 1_000_000_007  # first seed; training draws from other streams
GREEDY = Settings(temperature=0.0, max_tokens=64)
CAPTIONED = 3  # captions are compared on scenes of up to so many objects

Asked = tuple[Request, Callable[[Any], None]]  # a request, and what to do with its result


@dataclass
class Rate:
    """How often something was right."""

    right: int = 0
    total: int = 0

    def add(self, right: bool) -> None:
        self.right += right
        self.total += 1

    @property
    def value(self) -> float:
        return self.right / self.total if self.total else float("nan")


@dataclass
class SceneReport:
    """Figures over many scenes.

    Attributes:
        boxes: Matches at IoU 0.5 of every name in a scene.
        any_object: The same of "object".
        points: Points inside the boxes of the name.
        overlaps: IoU of each matched box.
        absent: Names that are not there, answered with nothing.
        count, color, what, exists: Right answers.
        several: Right counts of what is there more than once.
        caption: Short captions of up to three objects, equal to the letter.
    """

    boxes: Counts = field(default_factory=Counts)
    any_object: Counts = field(default_factory=Counts)
    points: Counts = field(default_factory=Counts)
    overlaps: list[float] = field(default_factory=list)
    absent: Rate = field(default_factory=Rate)
    count: Rate = field(default_factory=Rate)
    several: Rate = field(default_factory=Rate)
    color: Rate = field(default_factory=Rate)
    what: Rate = field(default_factory=Rate)
    exists: Rate = field(default_factory=Rate)
    caption: Rate = field(default_factory=Rate)

    def figures(self) -> dict[str, float]:
        """Each figure in 0..1."""
        return {
            "F1 at IoU 0.5": self.boxes.f1,
            "mean IoU of matches": float(np.mean(self.overlaps)) if self.overlaps else float("nan"),
            'F1 of "object"': self.any_object.f1,
            "F1 of points": self.points.f1,
            "absent names answered with nothing": self.absent.value,
            "count": self.count.value,
            "count of two and more": self.several.value,
            "colour": self.color.value,
            '"What is this?" at a point': self.what.value,
            "is there": self.exists.value,
            "short captions of up to 3 objects": self.caption.value,
        }


def held_out_scenes(renderer: str, count: int) -> Iterator[Scene]:
    """The first `count` held-out scenes of a renderer: "own" or "alternate"."""
    return (RENDERERS[renderer](HELD_OUT + i) for i in range(count))


def evaluate_scenes(model: VisionModel, scenes: Iterable[Scene], seed: int = 0) -> SceneReport:
    """Ask a model about scenes and compare with what they hold.

    Args:
        seed: Chooses the absent names.

    Raises:
        Exception: Whatever a request failed with.
    """
    report, rng = SceneReport(), np.random.default_rng(seed)
    for scene in scenes:
        asked = [*_about_names(scene, report, rng), *_about_objects(scene, report)]
        for (_, check), result in zip(asked, model.run([request for request, _ in asked]), strict=True):
            if isinstance(result, ErrorResult):
                raise result.error
            check(result)
    return report


def _about_names(scene: Scene, report: SceneReport, rng: np.random.Generator) -> Iterator[Asked]:
    """Where the named things are, how many, and what is not there."""
    image = Image.fromarray(scene.image)
    for name in dict.fromkeys(o.name for o in scene.objects):
        true = _boxes(scene, scene.named(name))
        yield Detect(image, name), _boxes_into(report, true)
        yield Point(image, name), _points_into(report, true)
        counted = (report.count, report.several) if len(true) > 1 else (report.count,)
        yield _question(image, f"How many {plural(name)} are there?"), _answer_into(str(len(true)), *counted)
        yield _question(image, f"Is there {with_article(name)}?"), _answer_into("yes", report.exists)
    yield Detect(image, "object"), _any_into(report, _boxes(scene, scene.objects))
    absent = _absent(scene, rng, 4)
    for name in absent[1:]:
        yield Detect(image, name), lambda result: report.absent.add(not result.objects)
    yield _question(image, f"Is there {with_article(absent[0])}?"), _answer_into("no", report.exists)


def _about_objects(scene: Scene, report: SceneReport) -> Iterator[Asked]:
    """What each thing is and of which color, and all of them in a caption."""
    image, (width, height) = Image.fromarray(scene.image), scene.resolution_wh
    ordered = sorted(scene.objects, key=lambda o: o.center[0])
    for item in ordered:
        if item.color and sum(o.shape == item.shape for o in ordered) == 1:
            yield _question(image, f"What colour is the {item.shape}?"), _answer_into(item.color, report.color)
        at = (item.center[0] / width, item.center[1] / height)
        yield Query(image, "What is this?", spatial_refs=(at,), settings=GREEDY), _answer_into(item.name, report.what)
    if 0 < len(ordered) <= CAPTIONED:
        expected = short_caption([o.name for o in ordered])
        yield Caption(image, "short", GREEDY), lambda result: report.caption.add(result.caption == expected)


def _question(image: Image.Image, question: str) -> Query:
    return Query(image, question, settings=GREEDY)


def _answer_into(expected: str, *rates: Rate) -> Callable[[Any], None]:
    def check(result: Any) -> None:
        for rate in rates:
            rate.add(result.answer.strip().lower() == expected)

    return check


def _boxes_into(report: SceneReport, true: np.ndarray) -> Callable[[Any], None]:
    def check(result: DetectResult) -> None:
        counts, overlaps = match_boxes(_array(result), true)
        report.boxes += counts
        report.overlaps += overlaps

    return check


def _any_into(report: SceneReport, true: np.ndarray) -> Callable[[Any], None]:
    def check(result: DetectResult) -> None:
        report.any_object += match_boxes(_array(result), true)[0]

    return check


def _points_into(report: SceneReport, true: np.ndarray) -> Callable[[Any], None]:
    def check(result: Any) -> None:
        points = np.array([(p.x, p.y) for p in result.points], np.float32).reshape(-1, 2)
        report.points += match_points(points, true)

    return check


def _array(result: DetectResult) -> np.ndarray:
    return np.array([(o.x_min, o.y_min, o.x_max, o.y_max) for o in result.objects], np.float32).reshape(-1, 4)


def _boxes(scene: Scene, objects: Iterable[SceneObject]) -> np.ndarray:
    """[N, 4] xyxy as fractions of the picture."""
    boxes = np.array([o.xyxy for o in objects], np.float32).reshape(-1, 4)
    return boxes / np.array(scene.resolution_wh * 2, np.float32)


def _absent(scene: Scene, rng: np.random.Generator, count: int) -> list[str]:
    """Names of nothing in a scene: by turns a near miss of one of its shapes, and any."""
    present = {name for o in scene.objects for name in (o.name, o.shape)}
    shapes = [o for o in scene.objects if o.color]
    near = [f"{c} {o.shape}" for o in shapes for c in COLORS] + [f"{o.color} {s}" for o in shapes for s in SHAPES]
    far = [*ICONS, *SHAPES, *(f"{c} {s}" for c in COLORS for s in SHAPES)]
    pools = [[name for name in pool if name not in present] for pool in (near or far, far)]
    return [str(rng.choice(pools[i % 2])) for i in range(count)]
