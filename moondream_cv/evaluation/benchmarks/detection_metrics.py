"""Metrics of boxes and points: mAP by pycocotools, F1 at every threshold, and AP50 as in Moondream's evaluation."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moondream_cv.evaluation.benchmarks.dataset import Benchmark
from moondream_cv.evaluation.benchmarks.predictions import Record
from moondream_cv.evaluation.matching import Counts, box_iou, match_boxes, match_points

Floats = npt.NDArray[np.float32]

_STATS = ("mAP", "AP50", "AP75", "mAP, small", "mAP, medium", "mAP, large", "AR at 1", "AR at 10", "AR at 100")
_ALL_AREAS, _IOU_50, _MOST_DETECTIONS = 0, 0, 2  # indices into pycocotools' precision
_RECALLS = np.arange(0, 1.1, 0.1)


class Pair(NamedTuple):
    """The predictions for one prompt on one image, with their ground truth.

    Attributes:
        groups: Class name, or groups of the question.
        predicted: [N, 4] xyxy boxes or [N, 2] points, in pixels or fractions.
        confidence: [N] confidences.
        score: [N] scores before calibration.
        true: [M, 4] xyxy boxes in the same units.
    """

    groups: tuple[str, ...]
    predicted: Floats
    confidence: Floats
    score: Floats
    true: Floats

    def counts(self, kept: npt.NDArray[Any] | slice = slice(None)) -> Counts:
        """Return the matches of some predictions: boxes at IoU 0.5, points inside boxes.

        Args:
            kept: Indices of the predictions.
        """
        if self.predicted.shape[1] == 2:
            return match_points(self.predicted[kept], self.true)
        return match_boxes(self.predicted[kept], self.true)[0]


# --- mAP --------------------------------------------------------------------------------------------------------------


def coco_metrics(
    coco: Mapping[str, Any], records: Iterable[Record]
) -> tuple[dict[str, float | None], dict[str, dict[str, float | None]]]:
    """Return the metrics of COCO, computed by pycocotools, for all classes and for each class.

    Args:
        coco: Ground truth with `images`, `annotations` and `categories`.
        records: Predictions of each image, in the order of `images`.

    Returns:
        Metrics by name; metrics by class and name. None: there are no objects of this size or class.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    # Index the ground truth and the predictions, without pycocotools' messages
    with contextlib.redirect_stdout(io.StringIO()):
        indexed = []
        for annotations in (coco["annotations"], list(_coco_predictions(coco, records))):
            index = COCO()
            index.dataset = {**coco, "annotations": annotations}
            index.createIndex()
            indexed.append(index)

        # Run the evaluation
        evaluation = COCOeval(*indexed, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()

    # Collect the metrics; -1 stands for "no objects"
    precision = evaluation.eval["precision"][..., _ALL_AREAS, _MOST_DETECTIONS]  # [IoU, recall, class]
    ids = {category["id"]: category["name"] for category in coco["categories"]}
    classes = {
        ids[key]: {"mAP": _mean(precision[:, :, place]), "AP50": _mean(precision[_IOU_50, :, place])}
        for place, key in enumerate(evaluation.params.catIds)
    }
    metrics = {name: float(value) for name, value in zip(_STATS, evaluation.stats, strict=False)}
    return {name: None if value < 0 else value for name, value in metrics.items()}, classes


def _coco_predictions(coco: Mapping[str, Any], records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """Yield the predicted boxes as annotations, in pixels of the ground truth."""
    ids = {category["name"]: category["id"] for category in coco["categories"]}
    number = 0
    for image, record in zip(coco["images"], records, strict=True):
        for result in record.get("results", []):
            for one in result["objects"]:
                number += 1
                x_min, y_min, x_max, y_max = _scaled(one["box"], record, (image["width"], image["height"]))
                width, height = x_max - x_min, y_max - y_min
                yield {
                    "id": number,
                    "image_id": image["id"],
                    "category_id": ids[result["prompt"]],
                    "bbox": [x_min, y_min, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                    "score": one["confidence"],
                }


def _scaled(values: Sequence[float], record: Record, size: tuple[float, float]) -> list[float]:
    """Convert x, y, ... from pixels of the image to another size."""
    factors = (size[0] / record["width"], size[1] / record["height"])
    return [value * factors[index % 2] for index, value in enumerate(values)]


def _mean(precision: npt.NDArray[np.float64]) -> float | None:
    valid = precision[precision > -1]
    return float(valid.mean()) if valid.size else None


# --- Pairs of predictions and ground truth ----------------------------------------------------------------------------


def detection_pairs(benchmark: Benchmark, records: Iterable[Record]) -> Iterator[Pair]:
    """Yield the predictions and the ground truth of each prompt on each image, if there are any.

    Classes with a crowd region on an image (`iscrowd`) are left out there, because the boxes are incomplete.

    Args:
        benchmark: Benchmark with boxes.
        records: Predictions of each image.
    """
    return _class_pairs(benchmark, records) if benchmark.classes else _question_pairs(benchmark, records)


def _class_pairs(benchmark: Benchmark, records: Iterable[Record]) -> Iterator[Pair]:
    coco = benchmark.coco
    names = {category["id"]: category["name"] for category in coco["categories"]}
    boxes: dict[Any, dict[str, list[list[float]]]] = {image["id"]: {} for image in coco["images"]}
    crowds: set[tuple[Any, str]] = set()
    for annotation in coco["annotations"]:
        image_id, name = annotation["image_id"], names[annotation["category_id"]]
        x, y, width, height = annotation["bbox"]
        boxes[image_id].setdefault(name, []).append([x, y, x + width, y + height])
        if annotation["iscrowd"]:
            crowds.add((image_id, name))
    for image, record in zip(coco["images"], records, strict=True):
        found = {result["prompt"]: result["objects"] for result in record.get("results", [])}
        true, size = boxes.pop(image["id"]), (image["width"], image["height"])
        for name in benchmark.classes:
            if (name in found or name in true) and (image["id"], name) not in crowds:
                yield _pair((name,), found.get(name, []), record, size, true.get(name, []), benchmark.skill)


def _question_pairs(benchmark: Benchmark, records: Iterable[Record]) -> Iterator[Pair]:
    for example, record in zip(benchmark.examples, records, strict=True):
        results = record.get("results", [{"objects": []}] * len(example.questions))
        for question, result in zip(example.questions, results, strict=True):
            size = (1.0, 1.0) if question.is_fraction else (record.get("width", 1), record.get("height", 1))
            yield _pair(question.groups, result["objects"], record, size, [question.box], benchmark.skill)


def _pair(
    groups: tuple[str, ...],
    objects: Sequence[Record],
    record: Record,
    size: tuple[float, float],
    true: Sequence[Any],
    skill: str,
) -> Pair:
    places = [_scaled(one["point" if skill == "point" else "box"], record, size) for one in objects]
    return Pair(
        groups,
        np.array(places, np.float32).reshape(-1, 2 if skill == "point" else 4),
        np.array([one["confidence"] for one in objects], np.float32),
        np.array([one.get("score", one["confidence"]) for one in objects], np.float32),
        np.array(true, np.float32).reshape(-1, 4),
    )


# --- F1 ---------------------------------------------------------------------------------------------------------------


@dataclass
class ThresholdCounts:
    """Counts of true and false predictions at every minimum confidence.

    Attributes:
        missed: Number of ground-truth boxes, which are all missed at the highest threshold.
        changes: Threshold, and the change of true and false positives when it is reached from above.
    """

    missed: int = 0
    changes: list[tuple[float, int, int]] = field(default_factory=list)

    def add(self, pair: Pair) -> None:
        """Add the predictions for one prompt on one image.

        Args:
            pair: Predictions and ground truth.
        """
        self.missed += len(pair.true)
        order = np.argsort(-pair.confidence, kind="stable")
        before = Counts()
        for count in range(1, len(order) + 1):
            counts = pair.counts(order[:count])
            true, false = counts.true_positives, counts.false_positives
            change = (true - before.true_positives, false - before.false_positives)
            self.changes.append((float(pair.confidence[order[count - 1]]), *change))
            before = counts

    def all_counts(self) -> Counts:
        """Return the counts of all predictions."""
        true = sum(change[1] for change in self.changes)
        return Counts(true, sum(change[2] for change in self.changes), self.missed - true)

    def best(self) -> tuple[float, Counts]:
        """Return the minimum confidence with the highest F1, and its counts. Equal F1: the lowest threshold."""
        best, best_threshold = Counts(0, 0, self.missed), 1.0
        true = false = 0
        ordered = sorted(self.changes, key=lambda change: -change[0])
        for index, (threshold, more_true, more_false) in enumerate(ordered):
            true, false = true + more_true, false + more_false
            is_last = index + 1 == len(ordered) or ordered[index + 1][0] < threshold
            counts = Counts(true, false, self.missed - true)
            if is_last and counts.f1 >= best.f1:
                best, best_threshold = counts, threshold
        return best_threshold, best


# --- AP50 of Moondream's evaluation -----------------------------------------------------------------------------------


def present_class_ap50(pair: Pair) -> float:
    """Return the 11-point average precision at IoU 0.5 of one class on one image, in the order of the model.

    Moondream's evaluation averages it over all classes that are present on an image, and over all images. Absent
    classes are not requested, and confidences are not used.

    Args:
        pair: Predicted boxes in the order of the model, and at least one ground-truth box.
    """
    overlaps = box_iou(pair.predicted, pair.true)
    correct = np.zeros(len(pair.predicted))
    for index, row in enumerate(overlaps):
        best = int(row.argmax())
        if row[best] >= 0.5:
            correct[index] = 1
            overlaps[:, best] = -1
    recall = correct.cumsum() / len(pair.true)
    precision = correct.cumsum() / np.arange(1, len(correct) + 1)
    return float(np.mean([precision[recall >= level].max(initial=0.0) for level in _RECALLS]))
