"""Metrics of confidence scores: ROC AUC, average precision and calibration error.

Plain NumPy functions on arrays of scores. Average precision equals that of `sv.metrics.MeanAveragePrecision`, except
that the curve is integrated exactly instead of sampled at fixed recall levels. It accepts points as well as boxes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def roc_auc(scores: Floats, correct: Bools) -> float:
    """Return the area under the ROC curve; NaN unless there are both correct and wrong detections.

    The area is the probability that a correct detection scores higher than a wrong one. A tie counts as one half.

    Args:
        scores: [N] confidence scores.
        correct: [N] true for true positives.
    """
    good, bad = np.sort(scores[correct]), scores[~correct]
    if not len(good) or not len(bad):
        return float("nan")
    below, up_to = np.searchsorted(good, bad, "left"), np.searchsorted(good, bad, "right")
    return float((len(good) - (below + up_to) / 2).mean() / len(good))


def average_precision(scores: Floats, correct: Bools, total: int) -> float:
    """Return the area under the interpolated precision-recall curve.

    Interpolated precision at a recall is the highest precision at that recall or above.

    Args:
        scores: [N] confidence scores. Ties keep the given order.
        correct: [N] true for true positives.
        total: Number of ground-truth objects, at least 1.
    """
    ordered = correct[np.argsort(-scores, kind="stable")]
    precision = np.cumsum(ordered) / np.arange(1, len(ordered) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float(best[ordered].sum() / total)


def random_order_precision(correct: Bools, total: int, orders: int = 20, seed: int = 0) -> float:
    """Return the mean average precision over random orders of the detections: the baseline of a constant score.

    Args:
        correct: [N] true for true positives.
        total: Number of ground-truth objects, at least 1.
        orders: Number of random orders.
        seed: Random seed.
    """
    rng = np.random.default_rng(seed)
    return float(np.mean([average_precision(rng.random(len(correct)), correct, total) for _ in range(orders)]))


def calibration_error(scores: Floats, correct: Bools, bins: int = 15) -> float:
    """Return the expected calibration error: the mean gap between score and precision over equal-width bins of 0..1.

    Guo et al., "On Calibration of Modern Neural Networks", 2017 (https://arxiv.org/abs/1706.04599), section 2.

    Args:
        scores: [N] confidence scores, 0..1.
        correct: [N] true for true positives.
        bins: Number of bins.
    """
    place = np.minimum((scores * bins).astype(int), bins - 1)
    gaps = np.bincount(place, scores - correct, minlength=bins)  # per bin: its count times its gap
    return float(np.abs(gaps).sum() / len(scores)) if len(scores) else float("nan")


def calibration_knots(
    scores: Floats, correct: Bools, pieces: int = 12, slope: float = 0.02
) -> tuple[Sequence[float], Sequence[float]]:
    """Fit a strictly increasing, piecewise linear map from scores to precision.

    Scores are split into quantile bins. An isotonic regression through the means of the bins is mixed with the
    identity, so that the map rises everywhere and distinct scores stay distinct.

    Args:
        scores: [N] confidence scores, 0..1.
        correct: [N] true for true positives.
        pieces: Number of quantile bins.
        slope: Weight of the identity, 0..1.

    Returns:
        Scores from 0 to 1, and the calibrated confidence at each.

    Raises:
        ValueError: There are fewer scores than bins.
    """
    if len(scores) < pieces:
        raise ValueError(f"need at least {pieces} detections for {pieces} pieces, got {len(scores)}; use more scenes")
    parts = np.array_split(np.argsort(scores, kind="stable"), pieces)
    means = np.array([scores[part].mean() for part in parts])
    precision = isotonic_regression([correct[part].mean() for part in parts], weights=[len(part) for part in parts]).x
    inner = (means > 1e-4) & (means < 1 - 1e-4) & np.append(np.diff(means) > 1e-6, True)
    x = np.concatenate(([0.0], means[inner], [1.0]))
    y = np.concatenate(([0.0], precision[inner], [1.0]))
    return x.round(6).tolist(), ((1 - slope) * y + slope * x).round(6).tolist()
