"""Scores of predictions: the metrics of each task, in total, by class and by group, and a fit of the calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from moondream_cv.evaluation.benchmarks.answer_metrics import (
    anls,
    exact_match,
    ocrbench_match,
    relaxed_match,
    vqa_accuracy,
    vqa_consensus,
)
from moondream_cv.evaluation.benchmarks.dataset import Benchmark, Question
from moondream_cv.evaluation.benchmarks.detection_metrics import (
    Pair,
    ThresholdCounts,
    coco_metrics,
    detection_pairs,
    present_class_ap50,
)
from moondream_cv.evaluation.benchmarks.predictions import (
    MODEL_CALIBRATION,
    EvaluationError,
    PredictionsFolder,
    Record,
)
from moondream_cv.evaluation.benchmarks.questions import FORMULAS
from moondream_cv.evaluation.matching import Counts, true_positive_boxes, true_positive_points
from moondream_cv.evaluation.metrics import calibration_error, calibration_knots

if TYPE_CHECKING:
    from moondream_cv.engine.calibration import Calibration

F1 = {"detect": "F1 at IoU 0.5", "point": "F1 of points in boxes"}
"""Name of the F1 score of each skill."""

_ANSWER_METRICS: dict[str, dict[str, Callable[[str, Sequence[str]], float]]] = {
    "countbenchqa": {"accuracy": exact_match},
    "docvqa": {"ANLS": anls, "exact match": exact_match},
    "textvqa": {
        "VQA accuracy": vqa_accuracy,
        "VQA accuracy, min(matches / 3, 1)": vqa_consensus,
        "exact match": exact_match,
    },
    "chartqa": {"relaxed accuracy": relaxed_match, "exact match": exact_match},
}

_LIBRARIES = {"coco": "pycocotools", "docvqa": "rapidfuzz"}


@dataclass
class Scores:
    """Scores of a benchmark, from 0 to 1.

    Attributes:
        metrics: Metrics by name; None: not defined, such as the mAP of small objects without small objects.
        classes: Metrics by class and name.
        groups: Metric and number of questions by group.
        threshold: Minimum confidence with the best F1; None for questions and for models without scores.
        unreadable: Errors of unreadable images by name. They count as misses.
        calibration: Calibration that was fitted to the predictions; None if there are too few, or no scores.
    """

    metrics: dict[str, float | None] = field(default_factory=dict)
    classes: dict[str, dict[str, float | None]] = field(default_factory=dict)
    groups: dict[str, tuple[float, int]] = field(default_factory=dict)
    threshold: float | None = None
    unreadable: dict[str, str] = field(default_factory=dict)
    calibration: Calibration | None = None


def check_libraries(benchmark: Benchmark) -> None:
    """Check that the library that computes the metrics is installed.

    Args:
        benchmark: Benchmark to score.

    Raises:
        EvaluationError: The library is missing.
    """
    name = _LIBRARIES.get(benchmark.task)
    try:
        if name is not None:
            import_module(name)
    except ImportError as error:
        raise EvaluationError(
            f'the metrics of {benchmark.title} need {name}; pip install "moondream-cv[labeling]"'
        ) from error


def score_predictions(benchmark: Benchmark, folder: PredictionsFolder) -> Scores:
    """Return the scores of complete predictions.

    Args:
        benchmark: Benchmark of the predictions.
        folder: Folder with the predictions of all images.

    Raises:
        EvaluationError: A line of the predictions is damaged.
    """
    scores = Scores()
    scores.unreadable = {one["image"]: one["error"] for one in folder.records() if "error" in one}
    if benchmark.skill == "query":
        _score_answers(benchmark, folder.records(), scores)
        return scores
    if benchmark.task == "coco" and benchmark.skill == "detect":
        scores.metrics, scores.classes = coco_metrics(benchmark.coco, folder.records())
    _score_detections(benchmark, folder.records(), folder.has_scores, scores)
    if folder.has_scores:
        _fit_calibration(benchmark, folder, scores)
    return scores


def _score_detections(benchmark: Benchmark, records: Iterable[Record], has_scores: bool, scores: Scores) -> None:
    """Add F1 in total, by class or group, and at the best threshold, and AP50 of present classes."""
    name = F1[benchmark.skill]
    total, groups, average_precisions = ThresholdCounts(), dict[str, Counts](), []
    num_prompts: dict[str, int] = {}
    for pair in detection_pairs(benchmark, records):
        total.add(pair)
        for group in pair.groups:
            groups[group] = groups.get(group, Counts()) + pair.counts()
            num_prompts[group] = num_prompts.get(group, 0) + 1
        if benchmark.task == "coco" and benchmark.skill == "detect" and len(pair.true):
            average_precisions.append(present_class_ap50(pair))
    if average_precisions:
        scores.metrics["AP50 per image and present class"] = float(np.mean(average_precisions))
    scores.metrics[name] = total.all_counts().f1
    if has_scores:
        scores.threshold, best = total.best()
        scores.metrics[f"{name}, best threshold"] = best.f1
    if benchmark.classes:
        for group, counts in groups.items():
            scores.classes.setdefault(group, {})[name] = counts.f1
    else:
        scores.groups = {group: (groups[group].f1, num_prompts[group]) for group in sorted(groups)}


def _score_answers(benchmark: Benchmark, records: Iterable[Record], scores: Scores) -> None:
    """Add the mean of each metric, and the first metric by group. Unreadable images score 0."""
    metrics = _ANSWER_METRICS.get(benchmark.task, {"accuracy": exact_match})
    values: dict[str, list[float]] = {name: [] for name in metrics}
    groups: dict[str, list[float]] = {}
    for example, record in zip(benchmark.examples, records, strict=True):
        results: Sequence[Mapping[str, Any]] = record.get("results", [{"answer": None}] * len(example.questions))
        for question, result in zip(example.questions, results, strict=True):
            found = [_score_answer(benchmark.task, metric, result["answer"], question) for metric in metrics.values()]
            for name, value in zip(metrics, found, strict=True):
                values[name].append(value)
            for group in question.groups:
                groups.setdefault(group, []).append(found[0])
    scores.metrics = {name: float(np.mean(found)) for name, found in values.items()}
    scores.groups = {name: (float(np.mean(groups[name])), len(groups[name])) for name in sorted(groups)}


def _score_answer(
    task: str, metric: Callable[[str, Sequence[str]], float], answer: str | None, question: Question
) -> float:
    if answer is None:
        return 0.0
    if task == "ocrbench":
        return ocrbench_match(answer, question.answers, ignore_spaces=FORMULAS in question.groups)
    return metric(answer, question.answers)


def _fit_calibration(benchmark: Benchmark, folder: PredictionsFolder, scores: Scores) -> None:
    """Fit a calibration to all predictions, and add calibration errors.

    The error after the fit is measured on each half of the pairs with the curve of the other half.
    """
    from moondream_cv.engine.calibration import Calibration, Curve

    # Collect the scores
    raw, confidence, correct, half = [], [], [], []
    for number, pair in enumerate(detection_pairs(benchmark, folder.records())):
        raw += pair.score.tolist()
        confidence += pair.confidence.tolist()
        correct += _correct(pair)
        half += [number % 2] * len(pair.score)
    if not raw:
        return
    right = np.array(correct, bool)
    scores.metrics["calibration error"] = calibration_error(np.array(confidence), right)

    # Fit a curve to all predictions, and one to each half
    values, parts = np.array(raw), np.array(half)
    try:
        fitted = Curve(*map(tuple, calibration_knots(values, right)))
        halves = [Curve(*map(tuple, calibration_knots(values[parts == i], right[parts == i]))) for i in (0, 1)]
    except ValueError:  # too few predictions
        return
    calibrated = np.array([halves[1 - part](score) for score, part in zip(raw, half, strict=True)])
    scores.metrics["calibration error, refitted"] = calibration_error(calibrated, right)
    path = folder.folder / MODEL_CALIBRATION
    curves = Calibration.read(path).curves if path.exists() else {}  # keeps the curve of the other skill
    scores.calibration = Calibration({**curves, benchmark.skill: fitted})


def _correct(pair: Pair) -> list[bool]:
    match = true_positive_points if pair.predicted.shape[1] == 2 else true_positive_boxes
    found: list[bool] = match(pair.predicted, pair.true).tolist()
    return found
