"""Matching predicted boxes and points to true boxes, and the counts that precision and recall are made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass
class Counts:
    """True positives, false positives and false negatives; they add up over images."""

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
        """2 · TP / (2 · TP + FP + FN); 1 where there was nothing to find and nothing was found."""
        wrong = self.false_positives + self.false_negatives
        return 2 * self.true_positives / (2 * self.true_positives + wrong) if self.true_positives or wrong else 1.0


def match_boxes(
    predicted: npt.NDArray[np.float32], true: npt.NDArray[np.float32], iou_threshold: float = 0.5
) -> tuple[Counts, list[float]]:
    """Match boxes one to one, best overlaps first.

    Args:
        predicted: [N, 4] xyxy, of one class.
        true: [M, 4] xyxy, in the same units.
        iou_threshold: Overlap from which a pair counts.

    Returns:
        The counts, and the overlap of each matched pair.
    """
    rows, overlaps = _match(_iou(predicted, true), iou_threshold)
    return _counts(rows, predicted, true), overlaps


def right_boxes(
    predicted: npt.NDArray[np.float32], true: npt.NDArray[np.float32], iou_threshold: float = 0.5
) -> npt.NDArray[np.bool_]:
    """Which of the predicted boxes `match_boxes` matches: [N]."""
    return np.isin(np.arange(len(predicted)), _match(_iou(predicted, true), iou_threshold)[0])


def match_points(predicted: npt.NDArray[np.float32], true: npt.NDArray[np.float32]) -> Counts:
    """Match points one to one to boxes that they lie in, nearest to the center first.

    Args:
        predicted: [N, 2] x, y.
        true: [M, 4] xyxy.
    """
    return _counts(_match(_depth(predicted, true), 1.0)[0], predicted, true)


def right_points(predicted: npt.NDArray[np.float32], true: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Which of the predicted points `match_points` matches: [N]."""
    return np.isin(np.arange(len(predicted)), _match(_depth(predicted, true), 1.0)[0])


def _counts(rows: list[int], predicted: npt.NDArray[np.float32], true: npt.NDArray[np.float32]) -> Counts:
    return Counts(len(rows), len(predicted) - len(rows), len(true) - len(rows))


def _depth(points: npt.NDArray[np.float32], true: npt.NDArray[np.float32]) -> npt.NDArray[np.floating]:
    """How deep points lie in boxes: [N, M], 2 at the center, 1 at the edge."""
    center, half = (true[:, :2] + true[:, 2:]) / 2, (true[:, 2:] - true[:, :2]) / 2
    offset = np.abs(points[:, None] - center) / np.maximum(half, 1e-9)  # [N, M, 2], 1 at the edge
    depth: npt.NDArray[np.floating] = 2.0 - offset.max(-1)
    return depth


def _match(score: npt.NDArray[np.floating], threshold: float) -> tuple[list[int], list[float]]:
    """Pair rows and columns, highest scores first; give back the rows and their scores."""
    score, rows, matched = score.copy(), [], []
    while score.size and score.max() >= threshold:
        row, column = np.unravel_index(score.argmax(), score.shape)
        rows.append(int(row))
        matched.append(float(score[row, column]))
        score[row], score[:, column] = -np.inf, -np.inf
    return rows, matched


def _iou(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    corner = np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])
    common = corner.clip(0).prod(-1)
    areas = [(x[:, 2:] - x[:, :2]).prod(-1) for x in (a, b)]
    union: npt.NDArray[np.float32] = areas[0][:, None] + areas[1] - common
    return common / np.maximum(union, 1e-12)
