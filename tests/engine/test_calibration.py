"""Calibration curves: values, order of scores, and invalid files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moondream_cv.engine.calibration import Calibration, Curve
from moondream_cv.errors import CheckpointError

CURVE = Curve((0.0, 0.5, 1.0), (0.1, 0.8, 0.9))
UNIT = st.floats(0, 1)


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    inner = sorted(draw(st.sets(st.floats(0.001, 0.999), max_size=8)))
    heights = st.sets(UNIT, min_size=len(inner) + 2, max_size=len(inner) + 2)
    return Curve((0.0, *inner, 1.0), tuple(sorted(draw(heights))))


@pytest.mark.parametrize(("score", "expected"), [(0.0, 0.1), (0.25, 0.45), (0.5, 0.8), (0.75, 0.85), (1.0, 0.9)])
def test_curve_is_linear_between_knots(score: float, expected: float) -> None:
    assert CURVE(score) == pytest.approx(expected)
    assert Calibration({"point": CURVE}).apply("point", score) == pytest.approx(expected)


@given(curves(), UNIT, UNIT)
def test_calibration_keeps_the_order_of_scores(curve: Curve, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert 0.0 <= curve(low) <= curve(high) <= 1.0


def test_distinct_scores_stay_distinct() -> None:
    values = [CURVE(i / 10_000) for i in range(10_001)]
    assert len(set(values)) == len(values)


def test_skill_without_curve_keeps_scores() -> None:
    assert Calibration({"detect": CURVE}).apply("point", 0.3) == 0.3


def test_nan_score_stays_nan() -> None:
    assert math.isnan(CURVE(math.nan))
    assert math.isnan(Calibration().apply("detect", math.nan))


@pytest.mark.parametrize("score", [-0.001, 1.001, math.inf])
def test_out_of_range_score_raises(score: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        CURVE(score)


@given(st.dictionaries(st.sampled_from(["detect", "point"]), curves()))
def test_calibration_round_trips_through_a_file(
    tmp_path_factory: pytest.TempPathFactory, found: dict[str, Curve]
) -> None:
    path = tmp_path_factory.mktemp("calibration") / "calibration.json"
    Calibration(found).write(path)
    assert Calibration.read(path) == Calibration.read(str(path)) == Calibration(found)


def content(**changes: Any) -> dict[str, Any]:
    return Calibration({"detect": CURVE}).to_dict() | changes


def skill(**changes: Any) -> dict[str, Any]:
    return content(skills={"detect": {"scores": [0, 0.5, 1], "probabilities": [0, 0.1, 1]} | changes})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "schema must be 1"),
        (content(schema=2), "schema must be 1, got 2"),
        (content(schema=True), "schema must be 1, got True"),
        ({"skills": {}}, "schema must be 1, got None"),
        (content(skills=None), "skills must be an object"),
        (content(skills={"query": {}}), "detect and point"),
        (content(skills={"detect": [1]}), "detect must be an object"),
        (skill(scores=None), "detect: scores must be a list of numbers"),
        (skill(scores=[0, "a", 1]), "scores must be a list of numbers"),
        (skill(scores=[0, True, 1]), "scores must be a list of numbers"),
        (skill(scores=[0, 1]), "same length, got 2 and 3"),
        (skill(scores=[0, 0.5, 0.9]), "start at 0 and end at 1"),
        (skill(scores=[], probabilities=[]), "start at 0 and end at 1"),
        (skill(scores=[0, 0, 1]), "scores must increase strictly"),
        (skill(probabilities=[0, 0.5, 0.5]), "probabilities must increase strictly"),
        (skill(probabilities=[0, 0.5, 1.5]), "probabilities must increase strictly within"),
        (skill(probabilities=[0, math.nan, 1]), "probabilities must increase strictly within"),
    ],
)
def test_invalid_calibration_file_raises(tmp_path: Path, wrong: Any, message: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(wrong))
    with pytest.raises(CheckpointError, match=message) as caught:
        Calibration.read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("data", [None, b"", b"{", b"\xff\xfe\x00", b"[" * 100_000])
def test_calibration_file_that_is_not_json_raises(tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "calibration.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"calibration\.json cannot be read"):
        Calibration.read(path)
