"""A model on rendered scenes: boxes, points, absent names, counts, colours, "What is this?" and captions.

    python -m moondream_cv.evaluation.scenes --model tiny --renderer alternate --scenes 200

Scenes come from the training renderer with seeds that training never draws, or from the other renderer, which shares
nothing with it but the names and the icons.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from moondream_cv.evaluation.matching import Counts, match_boxes, match_points
from moondream_cv.requests import (
    Caption,
    CaptionResult,
    Detect,
    DetectResult,
    ErrorResult,
    Point,
    PointResult,
    Query,
    QueryResult,
    Request,
    Result,
)
from moondream_cv.scenes.alternate import render_alternate
from moondream_cv.scenes.render import render_scene
from moondream_cv.scenes.scene import Scene
from moondream_cv.scenes.world import COLOURS, ICONS, SHAPES, plural, with_article
from moondream_cv.vision_model import VisionModel

RENDERERS: dict[str, Callable[..., Scene]] = {"own": render_scene, "alternate": render_alternate}
HELD_OUT = 1_000_000_007  # first seed
GREEDY = {"temperature": 0.0, "max_tokens": 64}


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
        count, colour, what, exists: Right answers.
        caption: Short captions of up to three objects, equal to the letter.
    """

    boxes: Counts = field(default_factory=Counts)
    any_object: Counts = field(default_factory=Counts)
    points: Counts = field(default_factory=Counts)
    overlaps: list[float] = field(default_factory=list)
    absent: Rate = field(default_factory=Rate)
    count: Rate = field(default_factory=Rate)
    colour: Rate = field(default_factory=Rate)
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
            "colour": self.colour.value,
            '"What is this?" at a point': self.what.value,
            "is there": self.exists.value,
            "short captions of up to 3 objects": self.caption.value,
        }


def evaluate_scenes(model: VisionModel, scenes: Iterable[Scene], seed: int = 0) -> SceneReport:
    """Ask a model about scenes and compare with what they hold.

    Args:
        seed: Chooses the absent names.

    Raises:
        Exception: Whatever a request failed with.
    """
    report, rng = SceneReport(), np.random.default_rng(seed)
    for scene in scenes:
        asked = list(_questions(scene, report, rng))
        results = model.run([request for request, _ in asked])
        for (_, check), result in zip(asked, results, strict=True):
            if isinstance(result, ErrorResult):
                raise result.error
            check(result)
    return report


Asked = tuple[Request, Callable[[Any], None]]


def _questions(scene: Scene, report: SceneReport, rng: np.random.Generator) -> Iterable[Asked]:
    """Requests about a scene, each with what to do with its result."""
    image = Image.fromarray(scene.image)
    ordered = sorted(scene.objects, key=lambda o: o.xyxy[0] + o.xyxy[2])
    names = list(dict.fromkeys(o.name for o in ordered))
    for name in names:
        true = _boxes(scene, name)
        yield Detect(image, name), lambda result, true=true: _check_boxes(report, result, true)
        yield Point(image, name), lambda result, true=true: _check_points(report, result, true)
        question = f"How many {plural(name)} are there?"
        yield Query(image, question, settings=GREEDY), _answers(report.count, str(len(true)))  # type: ignore[arg-type]
        yield _exists(image, name), _answers(report.exists, "yes")
    yield Detect(image, "object"), lambda result: _check_any(report, result, _boxes(scene, None))
    for name in _absent(scene, rng, 3):
        yield Detect(image, name), lambda result: report.absent.add(not result.objects)
    yield _exists(image, _absent(scene, rng, 1)[0]), _answers(report.exists, "no")
    for item in ordered:
        if item.colour and sum(o.shape == item.shape for o in ordered) == 1:
            question = f"What colour is the {item.shape}?"
            yield Query(image, question, settings=GREEDY), _answers(report.colour, item.colour)  # type: ignore[arg-type]
        width, height = scene.resolution_wh
        at = (item.centre[0] / width, item.centre[1] / height)
        yield (
            Query(image, "What is this?", spatial_refs=(at,), settings=GREEDY),  # type: ignore[arg-type]
            _answers(report.what, item.name),
        )
    if len(ordered) <= 3:
        listed = [with_article(o.name) for o in ordered]
        yield Caption(image, "short", GREEDY), lambda result: report.caption.add(result.caption == _sentence(listed))  # type: ignore[arg-type]


def _answers(rate: Rate, expected: str) -> Callable[[Result], None]:
    def check(result: Result) -> None:
        assert isinstance(result, QueryResult)
        rate.add(result.answer.strip().lower() == expected)

    return check


def _exists(image: Image.Image, name: str) -> Query:
    return Query(image, f"Is there {with_article(name)}?", settings=GREEDY)  # type: ignore[arg-type]


def _check_boxes(report: SceneReport, result: DetectResult, true: np.ndarray) -> None:
    counts, overlaps = match_boxes(_array(result), true)
    report.boxes += counts
    report.overlaps += overlaps


def _check_any(report: SceneReport, result: DetectResult, true: np.ndarray) -> None:
    report.any_object += match_boxes(_array(result), true)[0]


def _check_points(report: SceneReport, result: PointResult, true: np.ndarray) -> None:
    points = np.array([(p.x, p.y) for p in result.points], np.float32).reshape(-1, 2)
    report.points += match_points(points, true)


def _array(result: DetectResult) -> np.ndarray:
    return np.array([(o.x_min, o.y_min, o.x_max, o.y_max) for o in result.objects], np.float32).reshape(-1, 4)


def _boxes(scene: Scene, name: str | None) -> np.ndarray:
    width, height = scene.resolution_wh
    found = [o.xyxy for o in scene.objects if name is None or o.answers(name)]
    return np.array(found, np.float32).reshape(-1, 4) / np.array((width, height) * 2, np.float32)


def _absent(scene: Scene, rng: np.random.Generator, count: int) -> list[str]:
    """Names of nothing in a scene: the near misses of its objects first, then any."""
    present = {name for o in scene.objects for name in (o.name, o.shape)}
    near = [f"{c} {o.shape}" for o in scene.objects if o.colour for c in COLOURS]
    near += [f"{o.colour} {s}" for o in scene.objects if o.colour for s in SHAPES]
    far = [*ICONS, *SHAPES, *(f"{c} {s}" for c in COLOURS for s in SHAPES)]
    pools = [[n for n in dict.fromkeys(pool) if n not in present] for pool in (near or far, far)]
    return [str(rng.choice(pools[i % 2])) for i in range(count)]


def _sentence(listed: list[str]) -> str:
    text = listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} and {listed[-1]}"
    return f"{text[:1].upper()}{text[1:]}."


def main() -> None:
    from moondream_cv.loading import load

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default=None)
    parser.add_argument("--renderer", choices=[*RENDERERS, "both"], default="both")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    arguments = parser.parse_args()
    model = load(arguments.model, device=arguments.device)
    chosen = list(RENDERERS) if arguments.renderer == "both" else [arguments.renderer]
    figures = {}
    for renderer in chosen:
        scenes = (RENDERERS[renderer](HELD_OUT + i) for i in range(arguments.scenes))
        figures[renderer] = evaluate_scenes(model, scenes).figures()
    if arguments.json:
        print(json.dumps({"scenes": arguments.scenes, "figures": figures}, indent=1))
        return
    print(f"{arguments.scenes} scenes".ljust(38), *(r.rjust(10) for r in chosen))
    for name in figures[chosen[0]]:
        print(name.ljust(38), *(f"{figures[r][name]:10.3f}" for r in chosen))


if __name__ == "__main__":
    main()
