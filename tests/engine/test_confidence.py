"""The confidence formula on simple distributions and on the golden checkpoints."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moondream_cv import load
from moondream_cv.engine.confidence import (
    COORDINATE_REACH,
    SIZE_REACH,
    AxisFeatures,
    axis_features,
    confidence,
    continue_probability,
)
from moondream_cv.evaluation.rescoring import rescore
from moondream_cv.requests import Detect, Point

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
SHARP = (1.0, 1.0, 0.0)
PROBABILITY = st.floats(0, 1)
# Consistent near, wide and before masses of one distribution
FEATURES = st.tuples(PROBABILITY, PROBABILITY, PROBABILITY).map(lambda p: ((1 - p[2]) * p[0], p[1], p[2]))


def test_continue_probability_excludes_eos() -> None:
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3], [0.9, 0.05, 0.05]]))
    torch.testing.assert_close(continue_probability(logits, 0), torch.tensor([0.8, 0.1]))


def test_sharp_peak_has_full_mass() -> None:
    logits = torch.full((1024,), -30.0)
    logits[300] = 10.0
    torch.testing.assert_close(axis_features(logits), torch.tensor(SHARP))


@pytest.mark.parametrize("peak", [0, 5, 20, 512, 1000, 1023])
def test_flat_distribution_has_the_mass_of_its_windows(peak: int) -> None:
    logits = torch.zeros(1024)
    logits[peak] = 1e-5  # center of the windows
    near, wide = (
        sum(0 <= at < 1024 for at in range(peak - reach, peak + reach + 1)) for reach in (COORDINATE_REACH, SIZE_REACH)
    )
    expected = torch.tensor([near, wide, max(0, peak - COORDINATE_REACH)]) / 1024
    torch.testing.assert_close(axis_features(logits), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_axis_features_of_batches_are_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 2, 1024, generator=torch.Generator().manual_seed(0)).to(dtype)
    features = axis_features(logits)
    assert features.dtype == torch.float32
    assert features.shape == (3, 2, len(AxisFeatures._fields))
    expected = torch.stack([torch.stack([axis_features(row) for row in rows]) for rows in logits])
    torch.testing.assert_close(features, expected)


def test_fewer_bins_than_the_reach_have_full_mass() -> None:
    torch.testing.assert_close(axis_features(torch.randn(8)), torch.tensor(SHARP))


def test_confidence_of_a_point_and_an_object() -> None:
    x, y, w, h = (0.5, 0.9, 0.25), (0.8, 0.9, 0.1), (0.3, 0.7, 0.2), (0.2, 0.6, 0.0)
    point = 0.8 * 0.5 * 0.8 / (1 - 0.8 * 0.25)
    assert confidence(0.8, (0.1, 0.2), (x, y)) == pytest.approx(point)
    assert confidence(0.8, (0.1, 0.2, 0.3, 0.4), (x, y, w, h)) == pytest.approx(point * 0.7 * 0.6)


def test_sharp_distributions_give_the_continue_probability() -> None:
    assert confidence(0.7, (0.5, 0.5), (SHARP, SHARP)) == pytest.approx(0.7)


def test_mass_of_earlier_objects_does_not_lower_confidence() -> None:
    """Two certain objects whose order is undecided: both have full confidence."""
    assert confidence(1.0, (0.6, 0.5), ((0.5, 0.5, 0.5), SHARP)) == pytest.approx(1.0)
    assert confidence(1.0, (0.2, 0.5), ((0.5, 0.5, 0.0), SHARP)) == pytest.approx(0.5)


@given(PROBABILITY, st.lists(FEATURES, min_size=4, max_size=4), st.sampled_from([2, 4]))
def test_confidence_is_in_range_and_increases_with_continue_probability(
    continue_prob: float, features: list, count: int
) -> None:
    box = (0.5,) * count
    value = confidence(continue_prob, box, features[:count])
    assert 0.0 <= value <= 1.0
    assert value <= confidence(min(1.0, continue_prob + 0.1), box, features[:count]) + 1e-9


@pytest.mark.parametrize("axis", range(-1, 4))
def test_nan_input_gives_nan_confidence(axis: int) -> None:
    features = [SHARP] * 4
    if axis >= 0:
        features[axis] = (math.nan,) * 3
    assert math.isnan(confidence(math.nan if axis < 0 else 0.5, (0.5,) * 4, features))
    assert axis_features(torch.full((2, 1024), math.nan))[:, :2].isnan().all()


def test_box_and_features_must_have_the_same_length() -> None:
    with pytest.raises(ValueError, match="must have the same length, got 4 and 2"):
        confidence(0.5, (0.5,) * 4, (SHARP, SHARP))


PINNED = {
    ("mha", Detect): [0.2501, 0.3406, 0.33675],
    ("mha", Point): [0.43711, 0.63726, 0.63341],
    ("gqa", Detect): [0.003599, 0.0036894, 0.0034007],
    ("gqa", Point): [0.13384, 0.2282, 0.26159],
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), PINNED)
def test_golden_checkpoints_keep_their_confidences(name: str, kind: type[Detect] | type[Point]) -> None:
    with load(str(GOLDEN / name), device="cpu", dtype="float32") as model:
        image = model.encode_image(str(GOLDEN / name / "images" / "1_640x480.png"))
        request = kind(image, "dog", {"max_objects": 3})
        (result,) = model.run([request])
        again = [reading.confidence for reading in rescore(model, image, request, result)]
    found = [item.confidence for item in (result.objects if kind is Detect else result.points)]
    assert found == pytest.approx(PINNED[name, kind], rel=1e-3)
    assert again == pytest.approx(PINNED[name, kind], rel=1e-3)
