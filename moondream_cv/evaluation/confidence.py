"""Print how much the confidence of boxes and points is worth, on hard scenes, and fit its calibration.

python -m moondream_cv.evaluation.confidence --model tiny --scenes 1000 [--write FOLDER] [--candidates] [--json]

Each scene is asked for every name in it, for its shapes whatever their color, and for names that something in it is
easily taken for. A box is right at an IoU of 0.5, a point within a box, one to one, per name. The formula was chosen
and the calibration is fitted on one half of the scenes; the figures that count are those of the other. Training draws
no hard scenes at all.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from moondream_cv.engine.calibration import FILE_NAME, SKILLS, Calibration, Curve
from moondream_cv.engine.local import LocalModel
from moondream_cv.evaluation.matching import right_boxes, right_points
from moondream_cv.evaluation.rereading import formulas, read_again
from moondream_cv.evaluation.scores import (
    average_precision,
    calibration_error,
    calibration_knots,
    random_order_precision,
    roc_auc,
)
from moondream_cv.geometry import xcycwh_to_xyxy
from moondream_cv.loading import load
from moondream_cv.requests import Detect, ErrorResult, Point
from moondream_cv.scenes.hard import lookalike, render_hard
from moondream_cv.scenes.scene import Scene

SCORE = "confidence"
FIRST_SEEDS = {"fit": 1_100_000_000, "held out": 1_200_000_000}
MIN_ABSENT = 2  # look-alikes asked for in a scene of few names


@dataclass
class Finds:
    """What a model found when it was asked for one name in many scenes.

    Attributes:
        right: Whether each find is right.
        scores: Name of a formula → a score for each find.
        total: How many there were to be found.
    """

    right: list[bool] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    total: int = 0


@dataclass
class Study:
    """All finds of one skill, by the name that was asked for."""

    names: dict[str, Finds] = field(default_factory=lambda: defaultdict(Finds))

    @property
    def right(self) -> np.ndarray:
        """[N] bool, over all names."""
        return np.array([value for finds in self.names.values() for value in finds.right], bool)

    def scores(self, formula: str = SCORE) -> np.ndarray:
        """[N] in the order of `right`."""
        return np.array([value for finds in self.names.values() for value in finds.scores[formula]])

    def mean_average_precision(self, formula: str | None = SCORE) -> float:
        """The mean over all names that are somewhere; with None, over random orders of constant scores."""
        each = []
        for finds in self.names.values():
            right = np.array(finds.right, bool)
            if finds.total and formula is None:
                each.append(random_order_precision(right, finds.total))
            elif finds.total:
                each.append(average_precision(np.array(finds.scores[formula or SCORE]), right, finds.total))
        return float(np.mean(each)) if each else float("nan")

    def figures(self, formula: str = SCORE) -> dict[str, float]:
        """Counts, area under the ROC curve, mean average precision and its gain, calibration error."""
        right, scores, precision = self.right, self.scores(formula), self.mean_average_precision(formula)
        return {
            "true positives": int(right.sum()),
            "false positives": int((~right).sum()),
            "AUC": roc_auc(scores, right),
            "mAP": precision,
            "mAP over random orders": precision - self.mean_average_precision(None),
            "calibration error": calibration_error(scores, right),
        }


def hard_scenes(half: str, count: int) -> Iterator[tuple[int, Scene]]:
    """The first scenes of a half, "fit" or "held out", and their seeds."""
    return ((seed, render_hard(seed)) for seed in range(FIRST_SEEDS[half], FIRST_SEEDS[half] + count))


def hard_names(scene: Scene, rng: np.random.Generator) -> list[str]:
    """The names to ask for: of the objects, of their shapes without color, and half as many look-alikes, absent."""
    names = list(dict.fromkeys(item.name for item in scene.objects))
    shapes = list(dict.fromkeys(item.shape for item in scene.objects if item.color))
    absent: list[str] = []
    for _ in range(20 * len(names)):
        other = lookalike(rng, names[int(rng.integers(len(names)))])
        if other not in names and other not in absent and len(absent) < max(MIN_ABSENT, len(names) // 2):
            absent.append(other)
    return [*names, *shapes, *absent]


def study(model: LocalModel, scenes: Iterable[tuple[int, Scene]], others: bool = False) -> dict[str, Study]:
    """Ask a model about hard scenes: skill → what it found.

    Args:
        model: A local model without an adapter.
        scenes: Seeds, which choose the absent names, and scenes.
        others: Keep the scores of other formulas too.

    Raises:
        Exception: Whatever a request failed with.
    """
    studies = {skill: Study() for skill in SKILLS}
    for seed, scene in scenes:
        image = model.encode_image(Image.fromarray(scene.image))
        names = hard_names(scene, np.random.default_rng(seed))
        requests = [kind(image, name) for kind in (Detect, Point) for name in names]
        for request, result in zip(requests, model.run(requests), strict=True):
            if isinstance(result, ErrorResult):
                raise result.error
            finds = studies[request.skill].names[request.object]
            true = np.array([o.xyxy for o in scene.named(request.object)], np.float32).reshape(-1, 4)
            true /= np.array(scene.resolution_wh * 2, np.float32)
            readings = read_again(model, image, request, result)  # type: ignore[arg-type]
            boxes = np.array([r.box for r in readings], np.float32).reshape(-1, 4 if request.skill == "detect" else 2)
            if request.skill == "detect":
                right = right_boxes(xcycwh_to_xyxy(boxes), true)
            else:
                right = right_points(boxes, true)
            finds.total += len(true)
            finds.right += right.tolist()
            finds.scores[SCORE] += [r.confidence for r in readings]
            for name, scores in formulas(readings).items() if others else ():
                finds.scores[name] += scores
    return studies


def calibrate(studies: dict[str, Study]) -> Calibration:
    """Fit the maps of both skills.

    Raises:
        ValueError: There is too little to fit them to.
    """
    curves = {}
    for skill, found in studies.items():
        scores, probabilities = calibration_knots(found.scores(), found.right)
        curves[skill] = Curve(tuple(scores), tuple(probabilities))
    return Calibration(curves)


def figures(halves: dict[str, dict[str, Study]], calibration: Calibration) -> dict[str, dict[str, dict[str, float]]]:
    """Skill → half → figures, the calibration error of the calibrated scores among them."""
    report: dict[str, dict[str, dict[str, float]]] = {}
    for skill in SKILLS:
        for half, studies in halves.items():
            found = studies[skill]
            calibrated = np.array([calibration.apply(skill, score) for score in found.scores()])
            error = {"calibration error, calibrated": calibration_error(calibrated, found.right)}
            report.setdefault(skill, {})[half] = found.figures() | error
    return report


def main(
    model: Annotated[str, typer.Option(help="A name, a folder, or tiny.")] = "tiny",
    device: Annotated[str | None, typer.Option(help="cpu, mps, cuda or cuda:1; the best there is.")] = None,
    scenes: Annotated[int, typer.Option(min=1, help="Scenes in each half.")] = 1000,
    write: Annotated[Path | None, typer.Option(help=f"Folder to write {FILE_NAME} to.", file_okay=False)] = None,
    candidates: Annotated[bool, typer.Option(help="Compare formulas on the fit half, and print no more.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Print how much the confidence of boxes and points is worth on hard scenes."""
    with load(model, device=device) as opened:
        if candidates:
            _compare(study(opened, hard_scenes("fit", scenes), others=True), as_json)
            return
        halves = {half: study(opened, hard_scenes(half, scenes)) for half in FIRST_SEEDS}
    calibration = calibrate(halves["fit"])
    report = figures(halves, calibration)
    if write is not None:
        calibration.write(write / FILE_NAME)
    if as_json:
        typer.echo(json.dumps({"model": model, "scenes": scenes, "figures": report}, indent=1))
        return
    columns = [(skill, half) for skill in SKILLS for half in FIRST_SEEDS]
    table = Table(f"{scenes} scenes in each half", *(f"{skill}, {half}" for skill, half in columns))
    for name in report["detect"]["fit"]:
        values: list[Any] = [report[skill][half][name] for skill, half in columns]
        table.add_row(name, *(str(v) if isinstance(v, int) else f"{v:.3f}" for v in values))
    Console().print(table)


def _compare(studies: dict[str, Study], as_json: bool) -> None:
    """Print what each formula would give."""
    report = {
        skill: {name: s.figures(name) for name in next(iter(s.names.values())).scores} for skill, s in studies.items()
    }
    if as_json:
        typer.echo(json.dumps(report, indent=1, ensure_ascii=False))
        return
    for skill, formulas_of in report.items():
        table = Table(skill, "AUC", "mAP", "calibration error")
        for name, row in formulas_of.items():
            table.add_row(name, *(f"{row[key]:.4f}" for key in ("AUC", "mAP", "calibration error")))
        Console().print(table)


if __name__ == "__main__":
    typer.run(main)
