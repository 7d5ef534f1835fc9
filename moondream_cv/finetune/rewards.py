"""Built-in rewards of rollouts for detect and point, from 0 to 1, against true boxes or points.

Both rewards are F1 scores with partial credit. Predictions and truth are matched one to one so that the sum S of the
pairs' scores is as large as possible (`scipy.optimize.linear_sum_assignment`). With N predictions and M true regions:

    reward = 2 · S / (N + M), and 1 if N = M = 0

Every extra prediction and every miss lowers this reward, and it is continuous in the coordinates. The alternatives are
not. S / max(N, M) has no penalty for a wrong prediction while N < M, so a policy that misses objects learns to guess.
S / (N + M − pairs) jumps when a pair begins to overlap. If every pair scores 0 or 1, the reward is the F1 score that
`evaluation` reports.

Coordinates are fractions of the image's width and height. Distances are therefore relative to its sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import supervision as sv
from scipy.optimize import linear_sum_assignment

from moondream_cv.finetune.wire import GroundTruth, RolloutRequest
from moondream_cv.requests import DetectResult, PointResult, Result

POINT_DISTANCE_SCALE = 0.1
"""Distance between a point and its true point at which its score is exp(−1/2) = 0.61, as a fraction of the image."""

Floats = npt.NDArray[np.floating[Any]]


def detect_reward(predicted: npt.ArrayLike, true: npt.ArrayLike) -> float:
    """Return the reward of predicted boxes: 2 · Σ IoU / (N + M).

    The sum is over the pairs of the matching with the largest sum of IoUs. Boxes are clipped to the image first, as
    `Detector` clips them. A box that is not finite, is inverted or has no area in the image has IoU 0 with every box.

    Args:
        predicted: [N, 4] boxes as x_min, y_min, x_max, y_max, as fractions.
        true: [M, 4] true boxes.

    Returns:
        1.0 for exact boxes, or if there are none on both sides; 0.0 if no boxes overlap.

    Raises:
        ValueError: An array has another shape.
    """
    boxes, valid = _valid_boxes(_regions("predicted", predicted, 4))
    true_boxes, true_valid = _valid_boxes(_regions("true", true, 4))
    scores = np.zeros((len(boxes), len(true_boxes)))
    scores[np.ix_(valid, true_valid)] = sv.box_iou_batch(boxes[valid], true_boxes[true_valid])
    return _partial_f1(scores)


def point_reward(predicted: npt.ArrayLike, true: npt.ArrayLike) -> float:
    """Return the reward of predicted points: 2 · Σ score / (N + M).

    The sum is over the pairs of the matching with the largest sum of scores:

    - true boxes: 1 if the box contains the point, edges included, otherwise 0
    - true points: exp(−(d / 0.1)² / 2) with the distance d, as fractions of the image

    A point that is not finite and a box that `detect_reward` gives IoU 0 have the score 0.

    Args:
        predicted: [N, 2] points as x, y, as fractions.
        true: [M, 4] true boxes, or [M, 2] true points.

    Returns:
        1.0 if each point has its box or is exact, or if there are none on both sides; 0.0 if no point scores.

    Raises:
        ValueError: An array has another shape.
    """
    points, regions = _regions("predicted", predicted, 2), _regions("true", true, 2, 4)
    if regions.shape[1] == 4:
        boxes, valid = _valid_boxes(regions)
        inside = (points[:, None] >= boxes[:, :2]) & (points[:, None] <= boxes[:, 2:])  # [N, M, 2]
        return _partial_f1((inside.all(-1) & valid).astype(np.float64))
    with np.errstate(over="ignore", invalid="ignore"):  # values may be infinite, or too large to square
        distances = (points[:, None] - regions) / POINT_DISTANCE_SCALE
        scores = np.exp(-(distances**2).sum(-1) / 2)
    return _partial_f1(np.nan_to_num(scores, nan=0.0))


def rewards_for(request: RolloutRequest, results: Sequence[Result], ground_truth: GroundTruth) -> list[float]:
    """Return the reward of each rollout of a request.

    Args:
        request: Request for point or detect.
        results: Result of each rollout.
        ground_truth: True boxes, or true points for a point request.

    Returns:
        One reward from 0 to 1 per result.

    Raises:
        ValueError: The skill has no built-in reward, the ground truth does not fit it, or a result is of another skill.
    """
    true = ground_truth.points if ground_truth.boxes is None else ground_truth.boxes
    if true is None or (request.skill == "detect" and ground_truth.boxes is None):
        raise ValueError(f"ground_truth for {request.skill} must have boxes, got {ground_truth!r:.100}")
    rewards = []
    for result in results:
        if request.skill == "detect" and isinstance(result, DetectResult):
            rewards.append(detect_reward([(o.x_min, o.y_min, o.x_max, o.y_max) for o in result.objects], true))
        elif request.skill == "point" and isinstance(result, PointResult):
            rewards.append(point_reward([(point.x, point.y) for point in result.points], true))
        else:
            raise ValueError(
                f"built-in rewards are for point and detect, got {type(result).__name__} for {request.skill}; compute "
                "the rewards of other results yourself"
            )
    return rewards


def _regions(name: str, values: npt.ArrayLike, *sizes: int) -> Floats:
    """Return boxes or points as float64, with one of several numbers of coordinates."""
    array = np.asarray(values, np.float64)
    if array.ndim >= 1 and len(array) == 0:
        return array.reshape(0, sizes[0])
    if array.ndim != 2 or array.shape[1] not in sizes:
        expected = " or ".join(f"[N, {size}]" for size in sizes)
        raise ValueError(f"{name} must have the shape {expected}, got {list(array.shape)}")
    return array


def _valid_boxes(boxes: Floats) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Return boxes clipped to the image, and a mask of those that were finite and have an area."""
    clipped = boxes.clip(0.0, 1.0)
    usable = np.isfinite(boxes) & np.tile(clipped[:, :2] < clipped[:, 2:], 2)
    valid: npt.NDArray[np.bool_] = np.all(usable, axis=-1)
    return clipped, valid


def _partial_f1(scores: Floats) -> float:
    """Return 2 · Σ scores of the best matching / (N + M): [N, M] scores from 0 to 1; 1.0 if N = M = 0."""
    if sum(scores.shape) == 0:
        return 1.0
    return float(2 * scores[linear_sum_assignment(scores, maximize=True)].sum() / sum(scores.shape))
