"""Test mAP against pycocotools and by hand, F1 against every threshold, and AP50 of present classes by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from moondream_cv.evaluation.benchmarks.coco import read_coco
from moondream_cv.evaluation.benchmarks.dataset import Benchmark
from moondream_cv.evaluation.benchmarks.detection_metrics import (
    Pair,
    ThresholdCounts,
    coco_metrics,
    detection_pairs,
    present_class_ap50,
)
from moondream_cv.evaluation.matching import Counts, match_boxes

Objects = list[tuple[str, list[float], float]]  # class, xyxy, confidence


def record(name: str, objects: Objects, size: tuple[int, int] = (100, 100)) -> dict[str, Any]:
    """Return the predictions of an image, as `run_model` writes them."""
    results = [
        {
            "prompt": label,
            "objects": [{"box": box, "confidence": score} for one, box, score in objects if one == label],
        }
        for label in dict.fromkeys(label for label, _, _ in objects)
    ]
    return {"image": name, "width": size[0], "height": size[1], "results": results}


def coco_content(boxes: list[list[tuple[str, list[float]]]], size: tuple[int, int] = (100, 100)) -> dict[str, Any]:
    """Return COCO ground truth with the xywh boxes of each image."""
    names = ["dataset", "cat", "dog", "unused"]
    annotations = [
        {"image_id": 7 + image, "category_id": names.index(name), "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for image, found in enumerate(boxes)
        for name, box in found
    ]
    return {
        "images": [
            {"id": 7 + image, "file_name": f"{image}.png", "width": size[0], "height": size[1]}
            for image in range(len(boxes))
        ],
        "annotations": [{"id": number, **one} for number, one in enumerate(annotations)],  # IDs from 0, as Roboflow's
        "categories": [{"id": number, "name": name} for number, name in enumerate(names)],
    }


def metrics_of(content: dict[str, Any], records: list[dict[str, Any]]) -> tuple[Any, Any]:
    coco = read_coco(Path("folder/labels.json"), Path("folder"), content)[1]
    return coco_metrics(coco, records)


@pytest.mark.parametrize(
    ("objects", "mean", "half"),
    [
        # Recall 0.5 at precision 1: 51 of the 101 recall levels
        ([("cat", [0, 0, 10, 10], 0.9), ("cat", [50, 50, 60, 60], 0.8)], 51 / 101, 51 / 101),
        # The false positive comes first: precision 0.5
        ([("cat", [0, 0, 10, 10], 0.8), ("cat", [50, 50, 60, 60], 0.9)], 51 / 202, 51 / 202),
        # IoU 0.82 and 1: both match at 7 of the 10 IoU thresholds, one of them at all
        ([("cat", [0, 0, 10, 8.2], 0.9), ("cat", [20, 20, 40, 40], 0.95)], 0.7 + 0.3 * 51 / 101, 1.0),
        ([], 0.0, 0.0),
    ],
)
def test_map_of_known_cases(objects: Objects, mean: float, half: float) -> None:
    content = coco_content([[("cat", [0, 0, 10, 10]), ("cat", [20, 20, 20, 20])]])
    metrics, classes = metrics_of(content, [record("0.png", objects)])
    assert (metrics["mAP"], metrics["AP50"]) == pytest.approx((mean, half), abs=1e-9)
    assert classes == {"cat": {"mAP": pytest.approx(mean), "AP50": pytest.approx(half)}}
    assert metrics["mAP, large"] is None  # there are no large objects


def test_map_equals_pycocotools_on_files(tmp_path: Path) -> None:
    """Images are half as large as in the labels; there are crowds, duplicates, and classes without predictions."""
    rng = np.random.default_rng(3)
    boxes, records, results = [], [], []
    for image in range(40):
        true = [(str(rng.choice(["cat", "dog"])), [*rng.uniform(0, 300, 2), *rng.uniform(5, 200, 2)]) for _ in range(6)]
        objects: Objects = []
        for name, (x, y, width, height) in true:
            for _ in range(int(rng.integers(0, 3))):
                moved = np.array([x, y, x + width, y + height]) + rng.normal(0, 8, 4)
                score = round(float(rng.random()), 1)  # with ties
                objects.append((name, (moved / 2).tolist(), score))
        boxes.append(true)
        records.append(record(f"{image}.png", objects, (250, 250)))
        for result in records[-1]["results"]:  # pycocotools keeps the order of equal scores
            for one in result["objects"]:
                x0, y0, x1, y1 = (2 * value for value in one["box"])
                category = ["dataset", "cat", "dog"].index(result["prompt"])
                entry = {"image_id": 7 + image, "category_id": category, "bbox": [x0, y0, x1 - x0, y1 - y0]}
                results.append({**entry, "score": one["confidence"]})
    content = coco_content([[(name, [float(v) for v in box]) for name, box in found] for found in boxes], (500, 500))
    for annotation in content["annotations"][::9]:
        annotation["iscrowd"] = 1
    metrics, classes = metrics_of(content, records)

    for number, annotation in enumerate(content["annotations"], 1):  # pycocotools ignores matches of the ID 0
        annotation["id"] = number
    (tmp_path / "true.json").write_text(json.dumps(content))
    (tmp_path / "found.json").write_text(json.dumps(results))
    truth = COCO(str(tmp_path / "true.json"))
    expected = COCOeval(truth, truth.loadRes(str(tmp_path / "found.json")), "bbox")
    expected.evaluate()
    expected.accumulate()
    expected.summarize()
    names = ("mAP", "AP50", "AP75", "mAP, small", "mAP, medium", "mAP, large", "AR at 1", "AR at 10", "AR at 100")
    assert [metrics[name] for name in names] == pytest.approx(expected.stats[: len(names)].tolist(), abs=1e-9)
    assert 0.2 < metrics["mAP"] < metrics["AP50"] < 0.95
    assert classes["cat"]["mAP"] == pytest.approx(expected.eval["precision"][:, :, 1, 0, 2].mean(), abs=1e-9)
    assert set(classes) == {"cat", "dog"}


def pair(predicted: list[list[float]], confidence: list[float], true: list[list[float]]) -> Pair:
    scores = np.array(confidence, np.float32)
    return Pair(
        ("cat",),
        np.array(predicted, np.float32).reshape(-1, 4),
        scores,
        scores,
        np.array(true, np.float32).reshape(-1, 4),
    )


def test_counts_at_each_threshold_equal_those_of_the_remaining_boxes() -> None:
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(60):
        corners = rng.uniform(0, 5, (2, 4, 2))
        first, second = (np.concatenate((corner, corner + 3), 1)[: rng.integers(0, 5)].tolist() for corner in corners)
        pairs.append(pair(first, (rng.integers(0, 6, len(first)) / 5).tolist(), second))
    counted = ThresholdCounts()
    for one in pairs:
        counted.add(one)

    def counts(threshold: float) -> Counts:
        return sum((match_boxes(p.predicted[p.confidence >= threshold], p.true)[0] for p in pairs), Counts())

    scores = {float(score) for one in pairs for score in one.confidence}
    best = max(counts(score).f1 for score in scores)
    threshold, found = counted.best()
    assert counted.all_counts() == counts(0)
    assert found == counts(threshold)
    assert found.f1 == pytest.approx(best)
    assert threshold == min(score for score in scores if counts(score).f1 == pytest.approx(best))


def test_best_threshold_without_true_positives_keeps_nothing() -> None:
    counted = ThresholdCounts()
    counted.add(pair([[0, 0, 1, 1]], [0.4], []))
    assert counted.best() == (1.0, Counts())
    assert counted.all_counts() == Counts(0, 1, 0)


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [
        ([], 0.0),
        ([[0, 0, 10, 10], [20, 0, 30, 10]], 1.0),
        ([[0, 0, 10, 10]], 6 / 11),  # recall 0.5: levels 0 to 0.5
        ([[50, 50, 60, 60], [0, 0, 10, 10], [20, 0, 30, 10]], 2 / 3),  # precision 1/2, then 2/3
        ([[0, 0, 10, 10], [0, 0, 10, 10]], 6 / 11),  # a box matches once
    ],
)
def test_ap50_of_a_present_class(predicted: list[list[float]], expected: float) -> None:
    one = pair(predicted, [1.0] * len(predicted), [[0, 0, 10, 10], [20, 0, 30, 10]])
    assert present_class_ap50(one) == pytest.approx(expected)


def test_pairs_leave_out_classes_with_a_crowd_and_count_unreadable_images() -> None:
    content = coco_content([[("cat", [0, 0, 10, 10])], [("cat", [0, 0, 10, 10]), ("dog", [5, 5, 9, 9])]])
    content["annotations"][1]["iscrowd"] = 1
    examples, coco = read_coco(Path("folder/labels.json"), Path("folder"), content)
    benchmark = Benchmark("coco", "detect", "", "", examples, ("cat", "dog"), coco)
    records = [{"image": "0.png", "error": "damaged"}, record("1.png", [("cat", [0, 0, 10, 10], 0.5)])]
    found = [(one.groups, len(one.predicted), one.true.tolist()) for one in detection_pairs(benchmark, records)]
    assert found == [(("cat",), 0, [[0, 0, 10, 10]]), (("dog",), 0, [[5, 5, 14, 14]])]
