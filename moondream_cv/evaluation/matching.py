"""Match predicted boxes and points to ground-truth boxes, and count true and false positives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass
class Counts:
    """True positives, false positives and false negatives. Counts of several images can be added.

    Attributes:
        true_positives: Predictions with a match.
        false_positives: Predictions without a match.
        false_negatives: Ground-truth boxes without a match.
    """

    true_positives: int = 0
    false_positives: int = 0
    false_negatives: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.true_positives + other.true_positives,
            self.false_positives + other.false_positives,
            self.false_negatives + other.false_negatives,
        )

    @property
    def f1(self) -> float:
        """F1 score, 2 · TP / (2 · TP + FP + FN); 1 if there are neither objects nor predictions."""
        wrong = self.false_positives + self.false_negatives
        return 2 * self.true_positives / (2 * self.true_positives + wrong) if self.true_positives or wrong else 1.0


def match_boxes(
    predicted: npt.NDArray[np.float32], true: npt.NDArray[np.float32], iou_threshold: float = 0.5
) -> tuple[Counts, list[float]]:
    """Match boxes one to one, highest IoU first.

    Args:
        predicted: [N, 4] xyxy boxes of one class.
        true: [M, 4] xyxy ground-truth boxes, in the same units.
        iou_threshold: Minimum IoU of a match.

    Returns:
        The counts, and the IoU of each matched pair.
    """
    matched, overlaps = _match(box_iou(predicted, true), iou_threshold)
    return _counts(matched, predicted, true), overlaps


def true_positive_boxes(
    predicted: npt.NDArray[np.float32], true: npt.NDArray[np.float32], iou_threshold: float = 0.5
) -> npt.NDArray[np.bool_]:
    """Return a mask of the predicted boxes that `match_boxes` matches, [N] bool."""
    return np.isin(np.arange(len(predicted)), _match(box_iou(predicted, true), iou_threshold)[0])


def match_points(predicted: npt.NDArray[np.float32], true: npt.NDArray[np.float32]) -> Counts:
    """Match points one to one to the boxes that contain them, nearest to the center first.

    Args:
        predicted: [N, 2] points, x and y.
        true: [M, 4] xyxy ground-truth boxes, in the same units.
    """
    return _counts(_match(_depth(predicted, true), 1.0)[0], predicted, true)


def true_positive_points(predicted: npt.NDArray[np.float32], true: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Return a mask of the predicted points that `match_points` matches, [N] bool."""
    return np.isin(np.arange(len(predicted)), _match(_depth(predicted, true), 1.0)[0])


def box_iou(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the IoU of each pair of boxes, [N, M].

    Args:
        a: [N, 4] xyxy boxes.
        b: [M, 4] xyxy boxes, in the same units.
    """
    corner = np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])
    intersection = corner.clip(0).prod(-1)
    areas = [(x[:, 2:] - x[:, :2]).prod(-1) for x in (a, b)]
    union: npt.NDArray[np.float32] = areas[0][:, None] + areas[1] - intersection
    return intersection / np.maximum(union, 1e-12)


def _counts(matched: list[int], predicted: npt.NDArray[np.float32], true: npt.NDArray[np.float32]) -> Counts:
    return Counts(len(matched), len(predicted) - len(matched), len(true) - len(matched))


def _depth(points: npt.NDArray[np.float32], true: npt.NDArray[np.float32]) -> npt.NDArray[np.floating]:
    """Return the depth of each point in each box, [N, M]: 2 at the center, 1 at the edge, below 1 outside."""
    center, half = (true[:, :2] + true[:, 2:]) / 2, (true[:, 2:] - true[:, :2]) / 2
    offset = np.abs(points[:, None] - center) / np.maximum(half, 1e-9)  # [N, M, 2], 1 at the edge
    depth: npt.NDArray[np.floating] = 2.0 - offset.max(-1)
    return depth


def _match(score: npt.NDArray[np.floating], threshold: float) -> tuple[list[int], list[float]]:
    """Match predictions to boxes greedily, highest score first.

    Args:
        score: [N, M] score of each pair.
        threshold: Minimum score of a match.

    Returns:
        Indices of the matched predictions, and their scores.
    """
    score, matched, scores = score.copy(), [], []
    while score.size and score.max() >= threshold:
        prediction, box = np.unravel_index(score.argmax(), score.shape)
        matched.append(int(prediction))
        scores.append(float(score[prediction, box]))
        score[prediction], score[:, box] = -np.inf, -np.inf
    return matched, scores
