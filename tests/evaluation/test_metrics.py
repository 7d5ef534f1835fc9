"""Test metrics against their definitions, against supervision, and on known cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import supervision as sv
from hypothesis import given
from hypothesis import strategies as st

from moondream_cv.engine.calibration import Curve
from moondream_cv.evaluation.matching import match_boxes, match_points, true_positive_boxes, true_positive_points
from moondream_cv.evaluation.metrics import (
    average_precision,
    calibration_error,
    calibration_knots,
    random_order_precision,
    roc_auc,
)

SCORED = st.lists(st.tuples(st.integers(0, 8).map(lambda i: i / 8), st.booleans()), max_size=30)


def arrays(scored: list[tuple[float, bool]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([score for score, _ in scored], float), np.array([correct for _, correct in scored], bool)


@given(SCORED)
def test_roc_auc_is_the_share_of_correctly_ordered_pairs(scored: list[tuple[float, bool]]) -> None:
    scores, correct = arrays(scored)
    pairs = [(good > bad) + (good == bad) / 2 for good in scores[correct] for bad in scores[~correct]]
    assert roc_auc(scores, correct) == pytest.approx(np.mean(pairs) if pairs else math.nan, nan_ok=True)


@given(SCORED, st.integers(1, 10))
def test_average_precision_matches_its_definition(scored: list[tuple[float, bool]], missed: int) -> None:
    """Average precision sums, over the true positives in order, the highest precision from there on."""
    scores, correct = arrays(scored)
    total = int(correct.sum()) + missed
    ordered = [r for _, r in sorted(zip(scores, correct, strict=True), key=lambda pair: -pair[0])]
    precision = [sum(ordered[: i + 1]) / (i + 1) for i in range(len(ordered))]
    expected = sum(max(precision[i:]) for i, r in enumerate(ordered) if r) / total
    assert average_precision(scores, correct, total) == pytest.approx(expected)


def test_average_precision_matches_supervision() -> None:
    """Supervision samples the curve at 101 recall levels, so the values differ slightly."""
    rng = np.random.default_rng(0)
    metric, scores, correct, total = sv.metrics.MeanAveragePrecision(), [], [], 0
    for _ in range(60):
        corner = np.arange(8)[:, None] * 100 + rng.uniform(0, 20, (8, 2))
        true = np.concatenate((corner, corner + 40), 1).astype(np.float32)
        kept = rng.random(8) < 0.8
        moved = rng.random(8) < 0.4
        found = (true + np.where(moved, 30, 2)[:, None])[kept].astype(np.float32)
        sure = np.clip(rng.normal(np.where(moved, 0.4, 0.6), 0.15)[kept], 0.01, 0.99)
        target = sv.Detections(true, class_id=np.zeros(8, int))
        metric.update([sv.Detections(found, confidence=sure, class_id=np.zeros(len(found), int))], [target])
        scores += sure.tolist()
        correct += true_positive_boxes(found, true).tolist()
        total += len(true)
    ours = average_precision(np.array(scores), np.array(correct), total)
    assert ours == pytest.approx(metric.compute().map50, abs=0.01)


def test_random_order_precision_of_all_correct_is_one() -> None:
    assert random_order_precision(np.ones(7, bool), 7) == 1.0
    assert random_order_precision(np.zeros(7, bool), 7) == 0.0
    correct = np.arange(200) % 2 == 0
    assert random_order_precision(correct, 100) == pytest.approx(0.5, abs=0.1)
    assert random_order_precision(correct, 100) < average_precision(correct.astype(float), correct, 100) == 1.0


def test_calibration_error_of_known_cases() -> None:
    correct = np.array([True, False, True, True])
    assert calibration_error(np.full(4, 0.75), correct) == pytest.approx(0.0)
    assert calibration_error(np.full(4, 0.95), correct) == pytest.approx(0.2)
    assert calibration_error(np.array([0.0, 1.0]), np.array([True, False])) == pytest.approx(1.0)
    assert math.isnan(calibration_error(np.array([]), np.array([], bool)))


@given(st.integers(0, 1000), st.sampled_from([0.3, 1.0, 3.0]))
def test_calibration_knots_reduce_the_error_and_keep_the_order(seed: int, power: float) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.random(3000)
    correct = rng.random(3000) < scores**power
    x, y = calibration_knots(scores[::2], correct[::2])
    curve = Curve(tuple(x), tuple(y))
    calibrated = np.array([curve(score) for score in scores[1::2]])
    assert calibration_error(calibrated, correct[1::2]) < 0.08
    assert roc_auc(calibrated, correct[1::2]) == pytest.approx(roc_auc(scores[1::2], correct[1::2]), abs=1e-9)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.booleans()), min_size=12, max_size=60))
def test_calibration_knots_accept_few_distinct_scores(scored: list[tuple[float, bool]]) -> None:
    x, y = calibration_knots(*arrays(scored))
    Curve(tuple(x), tuple(y))


def test_too_few_detections_raise() -> None:
    with pytest.raises(ValueError, match="need at least 12 detections for 12 pieces, got 3"):
        calibration_knots(np.array([0.1, 0.2, 0.3]), np.ones(3, bool))


@given(st.integers(0, 10_000), st.integers(0, 5), st.integers(0, 5))
def test_true_positives_are_the_matched_predictions(seed: int, predicted: int, true: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = (np.sort(rng.random((n, 2, 2)), 1).reshape(n, 4).astype(np.float32) for n in (predicted, true))
    assert true_positive_boxes(first, second, 0.2).sum() == match_boxes(first, second, 0.2)[0].true_positives
    points = first[:, :2]
    assert true_positive_points(points, second).sum() == match_points(points, second).true_positives


def test_box_with_the_higher_iou_is_the_true_positive() -> None:
    true = np.array([[0, 0, 2, 2]], np.float32)
    assert true_positive_boxes(np.array([[0, 0, 2, 1.5], [0, 0, 2, 2]], np.float32), true).tolist() == [False, True]
