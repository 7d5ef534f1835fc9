"""Measure the confidence of boxes and points on hard scenes, and fit its calibration.

python -m moondream_cv.evaluation.confidence --model tiny --scenes 1000 [--write FOLDER] [--candidates] [--json]

Each scene is queried for every name in it, for its shapes in any color, and for absent look-alikes of its objects. A
detection is correct at an IoU of 0.5, a point if it is inside a box; matching is one to one per name. The formula was
chosen and the calibration is fitted on the "fit" split of the scenes. Quote the metrics of the "held out" split.
Training draws no hard scenes.
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
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.evaluation.matching import true_positive_boxes, true_positive_points
from moondream_cv.evaluation.metrics import (
    average_precision,
    calibration_error,
    calibration_knots,
    random_order_precision,
    roc_auc,
)
from moondream_cv.evaluation.rescoring import candidate_scores, rescore
from moondream_cv.geometry import xcycwh_to_xyxy
from moondream_cv.loading import load
from moondream_cv.requests import Detect, ErrorResult, Point
from moondream_cv.scenes.hard import lookalike, render_hard
from moondream_cv.scenes.scene import Scene

SCORE = "confidence"
FIRST_SEEDS = {"fit": 1_100_000_000, "held out": 1_200_000_000}
MIN_ABSENT = 2  # absent look-alikes per scene, even if the scene has few names


@dataclass
class NameDetections:
    """Detections of one name, over many scenes.

    Attributes:
        correct: Whether each detection is a true positive.
        scores: One score per detection, for each confidence formula.
        total: Number of ground-truth objects.
    """

    correct: list[bool] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    total: int = 0


@dataclass
class SkillDetections:
    """Detections of one skill, over many scenes.

    Attributes:
        names: Detections of each requested name.
    """

    names: dict[str, NameDetections] = field(default_factory=lambda: defaultdict(NameDetections))

    @property
    def correct(self) -> np.ndarray:
        """Whether each detection is a true positive, [N] bool, over all names."""
        return np.array([value for detections in self.names.values() for value in detections.correct], bool)

    def scores(self, formula: str = SCORE) -> np.ndarray:
        """Return the scores of a formula, [N], in the order of `correct`."""
        return np.array([value for detections in self.names.values() for value in detections.scores[formula]])

    def mean_average_precision(self, formula: str | None = SCORE) -> float:
        """Return the mean of the average precision over all names that occur in a scene.

        Args:
            formula: Name of the confidence formula. None: the mean over random orders, as for a constant score.
        """
        each = []
        for detections in self.names.values():
            correct = np.array(detections.correct, bool)
            if detections.total and formula is None:
                each.append(random_order_precision(correct, detections.total))
            elif detections.total:
                scores = np.array(detections.scores[formula or SCORE])
                each.append(average_precision(scores, correct, detections.total))
        return float(np.mean(each)) if each else float("nan")

    def metrics(self, formula: str = SCORE) -> dict[str, float]:
        """Return counts, ROC AUC, mean average precision, its gain over random orders, and calibration error."""
        correct, scores, precision = self.correct, self.scores(formula), self.mean_average_precision(formula)
        return {
            "true positives": int(correct.sum()),
            "false positives": int((~correct).sum()),
            "AUC": roc_auc(scores, correct),
            "mAP": precision,
            "mAP over random orders": precision - self.mean_average_precision(None),
            "calibration error": calibration_error(scores, correct),
        }


def hard_scenes(split: str, count: int) -> Iterator[tuple[int, Scene]]:
    """Return the first scenes of a split, with their seeds.

    Args:
        split: "fit" or "held out".
        count: Number of scenes.
    """
    return ((seed, render_hard(seed)) for seed in range(FIRST_SEEDS[split], FIRST_SEEDS[split] + count))


def hard_names(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Return the names to request: object names, shapes without their color, and half as many absent look-alikes."""
    names = list(dict.fromkeys(item.name for item in scene.objects))
    shapes = list(dict.fromkeys(item.shape for item in scene.objects if item.color))
    absent: list[str] = []
    for _ in range(20 * len(names)):
        other = lookalike(rng, names[int(rng.integers(len(names)))])
        if other not in names and other not in absent and len(absent) < max(MIN_ABSENT, len(names) // 2):
            absent.append(other)
    return [*names, *shapes, *absent]


def collect_detections(
    model: LocalModel, scenes: Iterable[tuple[int, Scene]], candidates: bool = False
) -> dict[str, SkillDetections]:
    """Run a model on hard scenes.

    Args:
        model: Local model without an adapter.
        scenes: Seeds, which choose the absent names, and scenes.
        candidates: Also compute the scores of the alternative formulas.

    Returns:
        The detections of each skill.

    Raises:
        Exception: A request failed; the error of that request.
    """
    skills = {skill: SkillDetections() for skill in SKILLS}
    for seed, scene in scenes:
        # Run both skills for all names of the scene
        image = model.encode_image(Image.fromarray(scene.image))
        names = hard_names(scene, np.random.default_rng(seed))
        requests = [kind(image, name) for kind in (Detect, Point) for name in names]
        for request, result in zip(requests, model.run(requests), strict=True):
            if isinstance(result, ErrorResult):
                raise result.error

            # Match the objects to the ground truth
            true = np.array([o.xyxy for o in scene.named(request.object)], np.float32).reshape(-1, 4)
            true /= np.array(scene.resolution_wh * 2, np.float32)
            objects = rescore(model, image, request, result)  # type: ignore[arg-type]
            boxes = np.array([o.box for o in objects], np.float32).reshape(-1, 4 if request.skill == "detect" else 2)
            if request.skill == "detect":
                correct = true_positive_boxes(xcycwh_to_xyxy(boxes), true)
            else:
                correct = true_positive_points(boxes, true)

            # Collect the scores
            detections = skills[request.skill].names[request.object]
            detections.total += len(true)
            detections.correct += correct.tolist()
            detections.scores[SCORE] += [o.confidence for o in objects]
            for name, scores in candidate_scores(objects).items() if candidates else ():
                detections.scores[name] += scores
    return skills


def calibrate(skills: dict[str, SkillDetections]) -> Calibration:
    """Fit the calibration curves of all skills.

    Raises:
        ValueError: There are too few detections.
    """
    curves = {}
    for skill, detections in skills.items():
        scores, probabilities = calibration_knots(detections.scores(), detections.correct)
        curves[skill] = Curve(tuple(scores), tuple(probabilities))
    return Calibration(curves)


def confidence_metrics(
    splits: dict[str, dict[str, SkillDetections]], calibration: Calibration
) -> dict[str, dict[str, dict[str, float]]]:
    """Return the metrics of each skill and split, with the calibration error before and after calibration.

    Args:
        splits: Detections of each split and skill.
        calibration: Calibration to measure.
    """
    report: dict[str, dict[str, dict[str, float]]] = {}
    for skill in SKILLS:
        for split, skills in splits.items():
            detections = skills[skill]
            calibrated = np.array([calibration.apply(skill, score) for score in detections.scores()])
            error = {"calibration error, calibrated": calibration_error(calibrated, detections.correct)}
            report.setdefault(skill, {})[split] = detections.metrics() | error
    return report


def main(
    model: Annotated[str, typer.Option(help="Model name or checkpoint folder.")] = "tiny",
    device: Annotated[
        str | None, typer.Option(help="Device, such as cpu, mps, cuda or cuda:1. Default: the fastest available.")
    ] = None,
    scenes: Annotated[int, typer.Option(min=1, help="Number of scenes per split.")] = 1000,
    write: Annotated[Path | None, typer.Option(help=f"Folder to write {FILE_NAME} to.", file_okay=False)] = None,
    candidates: Annotated[bool, typer.Option(help="Only compare formulas on the fit split.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print the metrics of the confidence of boxes and points on hard scenes."""
    # Run the model
    with load(model, device=device) as opened:
        if candidates:
            _print_candidates(collect_detections(opened, hard_scenes("fit", scenes), candidates=True), as_json)
            return
        splits = {split: collect_detections(opened, hard_scenes(split, scenes)) for split in FIRST_SEEDS}

    # Fit the calibration
    calibration = calibrate(splits["fit"])
    report = confidence_metrics(splits, calibration)
    if write is not None:
        calibration.write(write / FILE_NAME)

    # Print the metrics
    if as_json:
        typer.echo(json.dumps({"model": model, "scenes": scenes, "figures": report}, indent=1))
        return
    columns = [(skill, split) for skill in SKILLS for split in FIRST_SEEDS]
    table = Table(f"{scenes} scenes per split", *(f"{skill}, {split}" for skill, split in columns))
    for name in report["detect"]["fit"]:
        values: list[Any] = [report[skill][split][name] for skill, split in columns]
        table.add_row(name, *(str(v) if isinstance(v, int) else f"{v:.3f}" for v in values))
    Console().print(table)


def _print_candidates(skills: dict[str, SkillDetections], as_json: bool) -> None:
    """Print the metrics of each confidence formula."""
    report = {
        skill: {name: detections.metrics(name) for name in next(iter(detections.names.values())).scores}
        for skill, detections in skills.items()
    }
    if as_json:
        typer.echo(json.dumps(report, indent=1, ensure_ascii=False))
        return
    for skill, formulas in report.items():
        table = Table(skill, "AUC", "mAP", "calibration error")
        for name, metrics in formulas.items():
            table.add_row(name, *(f"{metrics[key]:.4f}" for key in ("AUC", "mAP", "calibration error")))
        Console().print(table)


if __name__ == "__main__":
    typer.run(main)
