"""Test matching on known cases, and the report of a perfect model and of a model that is always wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moondream_cv.errors import ImageError
from moondream_cv.evaluation.matching import Counts, match_boxes, match_points
from moondream_cv.evaluation.scenes import RENDERERS, evaluate_scenes, held_out_scenes
from moondream_cv.requests import ErrorResult
from tests.helpers.scene_model import SceneModel


def boxes(*corners: tuple[float, ...]) -> np.ndarray:
    return np.array(corners, np.float32).reshape(-1, 4)


@pytest.mark.parametrize(
    ("predicted", "true", "expected"),
    [
        (boxes(), boxes(), Counts(0, 0, 0)),
        (boxes((0, 0, 1, 1)), boxes(), Counts(0, 1, 0)),
        (boxes(), boxes((0, 0, 1, 1)), Counts(0, 0, 1)),
        (boxes((0, 0, 2, 2)), boxes((0, 0, 2, 2)), Counts(1, 0, 0)),
        (boxes((0, 0, 2, 2), (0, 0, 2, 2)), boxes((0, 0, 2, 2)), Counts(1, 1, 0)),  # a ground-truth box has one match
        (boxes((0, 0, 2, 2)), boxes((0, 0, 2, 1)), Counts(1, 0, 0)),  # IoU 0.5 is a match
        (boxes((0, 0, 2, 2)), boxes((0, 0, 2, 0.9)), Counts(0, 1, 1)),  # less is not
        (boxes((0, 0, 4, 4), (0, 0, 4, 3)), boxes((0, 0, 4, 3), (0, 0, 4, 4)), Counts(2, 0, 0)),  # highest IoU first
    ],
)
def test_match_boxes(predicted: np.ndarray, true: np.ndarray, expected: Counts) -> None:
    counts, overlaps = match_boxes(predicted, true)
    assert counts == expected
    assert len(overlaps) == expected.true_positives


@pytest.mark.parametrize(
    ("points", "true", "expected"),
    [
        ([], boxes(), Counts(0, 0, 0)),
        ([(1, 1)], boxes((0, 0, 2, 2)), Counts(1, 0, 0)),
        ([(2, 2)], boxes((0, 0, 2, 2)), Counts(1, 0, 0)),  # the edge is inside
        ([(2.1, 1)], boxes((0, 0, 2, 2)), Counts(0, 1, 1)),
        ([(1, 1), (1.2, 1)], boxes((0, 0, 2, 2)), Counts(1, 1, 0)),
    ],
)
def test_match_points(points: list[tuple[float, float]], true: np.ndarray, expected: Counts) -> None:
    assert match_points(np.array(points, np.float32).reshape(-1, 2), true) == expected


def test_counts_add_up_and_give_f1() -> None:
    assert Counts(3, 1, 2).f1 == pytest.approx(6 / 9)
    assert Counts(0, 0, 0).f1 == 1.0
    assert Counts(0, 2, 0).f1 == 0.0
    assert Counts(1, 2, 3) + Counts(3, 2, 1) == Counts(4, 4, 4)


@pytest.mark.parametrize("renderer", RENDERERS)
def test_perfect_model_scores_one_and_wrong_model_scores_little(renderer: str) -> None:
    scenes = list(held_out_scenes(renderer, 12))
    perfect = evaluate_scenes(SceneModel(scenes), scenes).metrics()
    assert all(math.isnan(value) or value == pytest.approx(1.0) for value in perfect.values()), perfect
    assert sum(math.isnan(value) for value in perfect.values()) <= 1
    wrong = evaluate_scenes(SceneModel(scenes, wrong=True), scenes).metrics()
    for name in ("count", "colour", '"What is this?" at a point', "short captions of up to 3 objects", "is there"):
        assert wrong[name] == 0.0 or math.isnan(wrong[name])
    assert wrong["F1 at IoU 0.5"] < 0.2


def test_failed_request_raises_its_error() -> None:
    class Failing(SceneModel):
        def run(self, requests):  # type: ignore[no-untyped-def]
            return [ErrorResult(ImageError("no")) for _ in requests]

    scenes = list(held_out_scenes("own", 1))
    with pytest.raises(ImageError, match="no"):
        evaluate_scenes(Failing(scenes), scenes)


def test_held_out_scenes_are_the_same_every_time() -> None:
    first, second = (next(held_out_scenes("own", 1)) for _ in range(2))
    np.testing.assert_array_equal(first.image, second.image)
