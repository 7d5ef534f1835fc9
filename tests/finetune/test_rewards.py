"""Test the built-in rewards against values computed by hand, brute-force matching and their properties."""

from __future__ import annotations

import itertools
import math
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moondream_cv.evaluation.matching import match_points
from moondream_cv.finetune.rewards import POINT_DISTANCE_SCALE, detect_reward, point_reward, rewards_for
from moondream_cv.finetune.wire import GroundTruth, RolloutRequest
from moondream_cv.requests import (
    DetectedObject,
    DetectedPoint,
    DetectResult,
    ErrorResult,
    PointResult,
    QueryResult,
    Result,
)

Region = tuple[float, ...]

NAN, INF = math.nan, math.inf
LEFT, RIGHT = (0.0, 0.0, 0.4, 0.4), (0.5, 0.5, 0.9, 0.9)

GRID = st.integers(0, 8).map(lambda i: i / 8)  # coincident edges and equal scores are frequent
POINTS = st.lists(st.tuples(GRID, GRID), max_size=4)
BOXES = st.lists(
    st.tuples(GRID, GRID, GRID, GRID)
    .map(lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3])))
    .filter(lambda b: b[0] < b[2] and b[1] < b[3]),
    max_size=4,
)


def iou(a: Region, b: Region) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    return intersection / union


def closeness(a: Region, b: Region) -> float:
    return math.exp(-((math.dist(a, b) / POINT_DISTANCE_SCALE) ** 2) / 2)


def containment(point: Region, box: Region) -> float:
    return float(box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3])


def brute_force(scores: list[list[float]], num_predicted: int, num_true: int) -> float:
    """Return the reward by trying every matching; `scores` has a row per prediction."""
    if not num_predicted + num_true:
        return 1.0
    if num_predicted > num_true:
        scores = [list(column) for column in zip(*scores, strict=True)]
    longer, shorter = max(num_predicted, num_true), min(num_predicted, num_true)
    sums = [
        sum(scores[i][j] for i, j in enumerate(chosen)) for chosen in itertools.permutations(range(longer), shorter)
    ]
    return 2 * max(sums) / (num_predicted + num_true)


@given(BOXES, BOXES)
def test_detect_reward_uses_the_best_matching(predicted: list[Region], true: list[Region]) -> None:
    scores = [[iou(a, b) for b in true] for a in predicted]
    assert detect_reward(predicted, true) == pytest.approx(brute_force(scores, len(predicted), len(true)), abs=1e-6)


@given(POINTS, POINTS)
def test_point_reward_uses_the_best_matching_of_points(predicted: list[Region], true: list[Region]) -> None:
    scores = [[closeness(a, b) for b in true] for a in predicted]
    assert point_reward(predicted, true) == pytest.approx(brute_force(scores, len(predicted), len(true)))


@given(POINTS, BOXES)
def test_point_reward_uses_the_best_matching_of_boxes(predicted: list[Region], true: list[Region]) -> None:
    scores = [[containment(a, b) for b in true] for a in predicted]
    assert point_reward(predicted, true) == pytest.approx(brute_force(scores, len(predicted), len(true)))


@given(POINTS, BOXES)
def test_point_reward_is_at_least_the_f1_score_of_the_greedy_matching(
    predicted: list[Region], true: list[Region]
) -> None:
    counts = match_points(np.float32(predicted).reshape(-1, 2), np.float32(true).reshape(-1, 4))
    assert point_reward(predicted, true) >= counts.f1 - 1e-6


@pytest.mark.parametrize(
    ("predicted", "true", "reward"),
    [
        ([], [], 1),
        ([LEFT], [], 0),
        ([], [LEFT], 0),
        ([LEFT, RIGHT], [RIGHT, LEFT], 1),
        ([LEFT], [RIGHT], 0),
        ([LEFT, RIGHT], [LEFT], 2 / 3),  # an extra box
        ([LEFT], [LEFT, RIGHT], 2 / 3),  # a miss
        ([LEFT, LEFT], [LEFT, RIGHT], 1 / 2),  # a duplicate and a miss
        ([(0.0, 0.0, 0.4, 0.2)], [LEFT], 1 / 2),  # half of the true box: IoU 1/2
        ([(0.2, 0.0, 0.6, 0.4)], [LEFT], 1 / 3),  # half of each box: IoU 0.08 / 0.24
        # The IoUs are 27/33 and 1/2 for the first box, 13/37 and 0 for the second one. The pair with the highest IoU
        # would leave the second box without a partner.
        (
            [(0.1, 0.0, 0.4, 0.1), (0.3, 0.0, 0.5, 0.1)],
            [(0.13, 0.0, 0.43, 0.1), (0.0, 0.0, 0.3, 0.1)],
            2 * (1 / 2 + 13 / 37) / 4,
        ),
    ],
)
def test_detect_reward_of_known_cases(predicted: list[Region], true: list[Region], reward: float) -> None:
    assert detect_reward(predicted, true) == pytest.approx(reward, abs=1e-6)


@pytest.mark.parametrize(
    ("predicted", "true", "reward"),
    [
        ([], [], 1),
        ([(0.5, 0.5)], [], 0),
        ([], [(0.5, 0.5)], 0),
        ([(0.2, 0.3)], [(0.2, 0.3)], 1),
        ([(0.2, 0.3)], [(0.2, 0.4)], math.exp(-0.5)),
        ([(0.2, 0.3)], [(0.26, 0.38)], math.exp(-0.5)),  # 0.06, 0.08 and 0.1 are a right triangle
        ([(0.2, 0.3), (0.9, 0.9)], [(0.2, 0.3)], 2 / 3),  # an extra point
        ([(0.2, 0.2)], [LEFT], 1),
        ([(0.4, 0.4)], [LEFT], 1),  # the corner belongs to the box
        ([(0.41, 0.2)], [LEFT], 0),
        ([(0.1, 0.1), (0.3, 0.3)], [LEFT, RIGHT], 1 / 2),  # a box counts once
        ([(0.1, 0.1), (0.3, 0.3)], [(0.0, 0.0, 0.2, 0.2), LEFT], 1),  # either box contains the first point
    ],
)
def test_point_reward_of_known_cases(predicted: list[Region], true: list[Region], reward: float) -> None:
    assert point_reward(predicted, true) == pytest.approx(reward)


@given(BOXES, BOXES, st.randoms())
def test_detect_reward_is_symmetric_and_ignores_the_order(
    predicted: list[Region], true: list[Region], rng: Random
) -> None:
    reward = detect_reward(predicted, true)
    assert 0 <= reward <= 1
    assert detect_reward(true, predicted) == pytest.approx(reward)
    assert detect_reward(rng.sample(predicted, len(predicted)), rng.sample(true, len(true))) == pytest.approx(reward)


@given(POINTS, POINTS, st.randoms())
def test_point_reward_is_symmetric_and_ignores_the_order(
    predicted: list[Region], true: list[Region], rng: Random
) -> None:
    reward = point_reward(predicted, true)
    assert 0 <= reward <= 1
    assert point_reward(true, predicted) == pytest.approx(reward)
    assert point_reward(rng.sample(predicted, len(predicted)), rng.sample(true, len(true))) == pytest.approx(reward)


@given(BOXES)
def test_reward_of_the_truth_is_one(boxes: list[Region]) -> None:
    assert detect_reward(boxes, boxes) == 1
    centers = [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in boxes]
    assert point_reward(centers, boxes) == point_reward(centers, centers) == 1


@given(BOXES.filter(len), st.integers(1, 3))
def test_extras_and_misses_lower_the_reward(boxes: list[Region], number: int) -> None:
    """Exact boxes with 0, 1, 2, ... others that overlap none of them, and the same as misses."""
    others = [(1 - 0.01 * i - 0.005, 0.0, 1 - 0.01 * i, 0.001) for i in range(number + 1)]
    extras = [detect_reward(boxes + others[:count], boxes) for count in range(number + 1)]
    misses = [detect_reward(boxes, boxes + others[:count]) for count in range(number + 1)]
    assert extras == sorted(set(extras), reverse=True)
    assert misses == pytest.approx(extras)


def test_extra_box_lowers_the_reward_even_if_objects_are_missed() -> None:
    """A policy that misses an object gains nothing from a guess that hits none."""
    elsewhere = (0.9, 0.0, 1.0, 0.1)
    assert detect_reward([LEFT, elsewhere], [LEFT, RIGHT]) < detect_reward([LEFT], [LEFT, RIGHT])


def test_rewards_fall_with_the_distance_from_the_truth() -> None:
    shifts = np.linspace(0, 0.4, 9)[:-1]
    boxes = [detect_reward([(x, 0.0, 0.4 + x, 0.4)], [LEFT]) for x in shifts]
    points = [point_reward([(0.2 + x, 0.2)], [(0.2, 0.2)]) for x in shifts]
    for rewards in (boxes, points):
        assert rewards[0] == 1
        assert (np.diff(rewards) < 0).all()
        assert rewards[-1] > 0


@pytest.mark.parametrize(
    "box",
    [
        (NAN, 0.0, 0.4, 0.4),
        (0.0, 0.0, INF, 0.4),
        (-INF, -INF, INF, INF),
        (0.4, 0.4, 0.0, 0.0),  # both axes inverted: the product of the sides is positive
        (0.0, 0.4, 0.4, 0.0),
        (0.2, 0.0, 0.2, 0.4),  # without area
        (1.1, 0.0, 1.5, 0.4),  # outside the image
    ],
)
def test_invalid_boxes_score_zero_and_count_as_extras(box: Region) -> None:
    assert detect_reward([box], [LEFT]) == detect_reward([LEFT], [box]) == 0
    assert detect_reward([box, LEFT], [LEFT]) == pytest.approx(2 / 3)
    assert point_reward([(0.2, 0.2)], [box]) == 0


@pytest.mark.parametrize("point", [(NAN, 0.2), (0.2, INF), (-INF, INF), (1e200, 0.2)])
def test_invalid_points_score_zero_and_count_as_extras(point: Region) -> None:
    assert point_reward([point], [(0.2, 0.2)]) == point_reward([(0.2, 0.2)], [point]) == 0
    assert point_reward([point], [point]) == float(math.isfinite(sum(point)))
    assert point_reward([point], [LEFT]) == 0
    assert point_reward([point, (0.2, 0.2)], [LEFT]) == pytest.approx(2 / 3)


def test_boxes_are_clipped_to_the_image() -> None:
    assert detect_reward([(-0.3, -0.1, 0.4, 0.4)], [LEFT]) == pytest.approx(1)


@pytest.mark.parametrize("wrong", [[(0.1, 0.2, 0.3)], [0.1, 0.2], 0.5, [[(0.1, 0.2)]]])
def test_arrays_of_another_shape_are_errors(wrong: object) -> None:
    for reward in (detect_reward, point_reward):
        with pytest.raises(ValueError, match="predicted must have the shape"):
            reward(wrong, [LEFT])
        with pytest.raises(ValueError, match="true must have the shape"):
            reward([], wrong)


def test_rewards_for_rates_each_result() -> None:
    detect, point = RolloutRequest("detect", object="cat"), RolloutRequest("point", object="cat")
    boxes, points = GroundTruth(boxes=(LEFT,)), GroundTruth(points=((0.2, 0.2),))
    found = [DetectResult((DetectedObject(*LEFT),)), DetectResult(()), DetectResult((DetectedObject(*RIGHT),))]
    assert rewards_for(detect, found, boxes) == pytest.approx([1, 0, 0])
    assert rewards_for(detect, found, GroundTruth(boxes=())) == [0, 1, 0]
    pointed = [PointResult((DetectedPoint(0.3, 0.2),)), PointResult(())]
    assert rewards_for(point, pointed, boxes) == [1, 0]
    assert rewards_for(point, pointed, points) == pytest.approx([math.exp(-0.5), 0])
    assert rewards_for(point, pointed, GroundTruth(points=())) == [0, 1]


@pytest.mark.parametrize(
    ("skill", "result", "ground_truth", "message"),
    [
        ("detect", DetectResult(()), GroundTruth(points=()), "ground_truth for detect must have boxes"),
        ("point", PointResult(()), GroundTruth(), "ground_truth for point must have boxes"),
        ("detect", PointResult(()), GroundTruth(boxes=()), "got PointResult for detect"),
        ("query", QueryResult("yes"), GroundTruth(boxes=()), "got QueryResult for query"),
        ("point", ErrorResult(ValueError()), GroundTruth(boxes=()), "got ErrorResult for point"),
    ],
)
def test_rewards_for_rejects_other_skills(skill: str, result: Result, ground_truth: GroundTruth, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rewards_for(RolloutRequest(skill), [result], ground_truth)
