"""How good scores are: do right finds come before wrong ones, and is a score the share of right finds.

Plain NumPy on arrays of scores; where they come from is left to others. Average precision is that of
`sv.metrics.MeanAveragePrecision` but for the levels of recall that it is read at, and takes points as well as boxes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def roc_auc(scores: Floats, right: Bools) -> float:
    """The chance that a right find has a higher score than a wrong one, a tie being half a chance; NaN without both."""
    good, bad = np.sort(scores[right]), scores[~right]
    if not len(good) or not len(bad):
        return float("nan")
    below, up_to = np.searchsorted(good, bad, "left"), np.searchsorted(good, bad, "right")
    return float((len(good) - (below + up_to) / 2).mean() / len(good))


def average_precision(scores: Floats, right: Bools, total: int) -> float:
    """The area under the curve of precision over recall, each precision being the best at that recall or above.

    Args:
        scores: [N]. Ties count in the order given.
        right: [N] whether each find is right.
        total: How many there were to be found, at least one.
    """
    ordered = right[np.argsort(-scores, kind="stable")]
    precision = np.cumsum(ordered) / np.arange(1, len(ordered) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float(best[ordered].sum() / total)


def random_order_precision(right: Bools, total: int, orders: int = 20, seed: int = 0) -> float:
    """The mean average precision that a constant score gets over random orders of its finds."""
    rng = np.random.default_rng(seed)
    return float(np.mean([average_precision(rng.random(len(right)), right, total) for _ in range(orders)]))


def calibration_error(scores: Floats, right: Bools, bins: int = 15) -> float:
    """Expected calibration error: how far the mean score is from the share of right finds, over equal bins of 0..1.

    Guo et al., "On Calibration of Modern Neural Networks", 2017 (https://arxiv.org/abs/1706.04599), section 2.
    """
    place = np.minimum((scores * bins).astype(int), bins - 1)
    gaps = np.bincount(place, scores - right, minlength=bins)  # per bin: its count times its gap
    return float(np.abs(gaps).sum() / len(scores)) if len(scores) else float("nan")


def calibration_knots(
    scores: Floats, right: Bools, pieces: int = 12, slope: float = 0.02
) -> tuple[Sequence[float], Sequence[float]]:
    """Fit a rising, piecewise linear map from scores to the share of right finds.

    Scores are cut into pieces of as many finds; an isotonic fit through their means is mixed with the identity by
    `slope`, so that it rises everywhere and no two scores become one.

    Returns:
        Scores from 0 to 1, and what each stands for.

    Raises:
        ValueError: There are fewer finds than pieces.
    """
    if len(scores) < pieces:
        raise ValueError(f"{len(scores)} finds are too few to fit {pieces} pieces; use more scenes")
    parts = np.array_split(np.argsort(scores, kind="stable"), pieces)
    means = np.array([scores[part].mean() for part in parts])
    shares = isotonic_regression([right[part].mean() for part in parts], weights=[len(part) for part in parts]).x
    inner = (means > 1e-4) & (means < 1 - 1e-4) & np.append(np.diff(means) > 1e-6, True)
    x = np.concatenate(([0.0], means[inner], [1.0]))
    y = np.concatenate(([0.0], shares[inner], [1.0]))
    return x.round(6).tolist(), ((1 - slope) * y + slope * x).round(6).tolist()
