"""Matching on boxes whose answer is known, and whole reports of a model that knows the truth and of one that lies."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moondream_cv.errors import ImageError
from moondream_cv.evaluation.matching import Counts, match_boxes, match_points
from moondream_cv.evaluation.scenes import RENDERERS, evaluate_scenes, held_out_scenes
from moondream_cv.requests import ErrorResult
from tests.helpers.scene_model import SceneModel


def boxes(*rows: tuple[float, ...]) -> np.ndarray:
    return np.array(rows, np.float32).reshape(-1, 4)


@pytest.mark.parametrize(
    ("predicted", "true", "expected"),
    [
        (boxes(), boxes(), Counts(0, 0, 0)),
        (boxes((0, 0, 1, 1)), boxes(), Counts(0, 1, 0)),
        (boxes(), boxes((0, 0, 1, 1)), Counts(0, 0, 1)),
        (boxes((0, 0, 2, 2)), boxes((0, 0, 2, 2)), Counts(1, 0, 0)),
        (boxes((0, 0, 2, 2), (0, 0, 2, 2)), boxes((0, 0, 2, 2)), Counts(1, 1, 0)),  # a box is matched once
        (boxes((0, 0, 2, 2)), boxes((0, 0, 2, 1)), Counts(1, 0, 0)),  # IoU 0.5 counts
        (boxes((0, 0, 2, 2)), boxes((0, 0, 2, 0.9)), Counts(0, 1, 1)),  # less does not
        (boxes((0, 0, 4, 4), (0, 0, 4, 3)), boxes((0, 0, 4, 3), (0, 0, 4, 4)), Counts(2, 0, 0)),  # best overlaps first
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
        ([(2, 2)], boxes((0, 0, 2, 2)), Counts(1, 0, 0)),  # the edge belongs to the box
        ([(2.1, 1)], boxes((0, 0, 2, 2)), Counts(0, 1, 1)),
        ([(1, 1), (1.2, 1)], boxes((0, 0, 2, 2)), Counts(1, 1, 0)),
    ],
)
def test_match_points(points: list[tuple[float, float]], true: np.ndarray, expected: Counts) -> None:
    assert match_points(np.array(points, np.float32).reshape(-1, 2), true) == expected


def test_f1() -> None:
    assert Counts(3, 1, 2).f1 == pytest.approx(6 / 9)
    assert Counts(0, 0, 0).f1 == 1.0
    assert Counts(0, 2, 0).f1 == 0.0
    assert Counts(1, 2, 3) + Counts(3, 2, 1) == Counts(4, 4, 4)


@pytest.mark.parametrize("renderer", RENDERERS)
def test_the_truth_scores_one_and_lies_score_little(renderer: str) -> None:
    scenes = list(held_out_scenes(renderer, 12))
    truth = evaluate_scenes(SceneModel(scenes), scenes).figures()
    assert all(math.isnan(value) or value == pytest.approx(1.0) for value in truth.values()), truth
    assert sum(math.isnan(value) for value in truth.values()) <= 1
    lies = evaluate_scenes(SceneModel(scenes, lies=True), scenes).figures()
    for name in ("count", "colour", '"What is this?" at a point', "short captions of up to 3 objects", "is there"):
        assert lies[name] == 0.0 or math.isnan(lies[name])
    assert lies["F1 at IoU 0.5"] < 0.2


def test_an_error_of_the_model_is_raised() -> None:
    class Failing(SceneModel):
        def run(self, requests):  # type: ignore[no-untyped-def]
            return [ErrorResult(ImageError("no")) for _ in requests]

    scenes = list(held_out_scenes("own", 1))
    with pytest.raises(ImageError, match="no"):
        evaluate_scenes(Failing(scenes), scenes)


def test_held_out_scenes_are_the_same_every_time() -> None:
    first, second = (next(held_out_scenes("own", 1)) for _ in range(2))
    np.testing.assert_array_equal(first.image, second.image)
