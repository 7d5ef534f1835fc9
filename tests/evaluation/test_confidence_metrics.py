"""Test the confidence of the tiny model on hard scenes that its calibration was not fitted to."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from typer import Typer
from typer.testing import CliRunner

from moondream_cv import load
from moondream_cv.engine.calibration import FILE_NAME, Calibration
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.evaluation import confidence
from moondream_cv.evaluation.confidence import (
    FIRST_SEEDS,
    collect_detections,
    confidence_metrics,
    hard_names,
    hard_scenes,
)
from moondream_cv.evaluation.rescoring import candidate_scores, rescore
from moondream_cv.evaluation.scenes import HELD_OUT
from moondream_cv.requests import Detect, Point
from moondream_cv.scenes.hard import render_hard

SHIPPED = Path(confidence.__file__).parents[1] / "tiny" / FILE_NAME


@pytest.fixture(scope="module")
def tiny() -> LocalModel:
    return load("tiny", device="cpu")


@pytest.mark.slow
def test_confidence_separates_and_calibrates_held_out_detections(tiny: LocalModel) -> None:
    detections = collect_detections(tiny, hard_scenes("held out", 300))
    report = confidence_metrics({"held out": detections}, Calibration.read(SHIPPED))
    for skill, splits in report.items():
        found = splits["held out"]
        assert found["false positives"] >= 200, skill
        assert found["AUC"] >= 0.85, skill
        assert found["mAP over random orders"] >= 0.03, skill
        assert found["calibration error"] <= 0.1, skill
        assert found["calibration error, calibrated"] <= 0.06, skill


@pytest.mark.slow
def test_confidence_beats_the_continue_probability(tiny: LocalModel) -> None:
    skills = collect_detections(tiny, hard_scenes("held out", 20), candidates=True)
    for skill, found in skills.items():
        metrics, baseline = found.metrics(), found.metrics("continue")
        assert metrics["AUC"] >= 0.8, skill
        assert metrics["AUC"] > baseline["AUC"] + 0.1, skill
        assert metrics["mAP over random orders"] > 0.0, skill
    points = skills["point"]
    same = points.scores("continue · masses of x and y, 16, renormalized")
    np.testing.assert_allclose(points.scores(), same, atol=1e-5)


@pytest.mark.parametrize("kind", [Detect, Point])
def test_rescoring_reproduces_boxes_and_confidences(tiny: LocalModel, kind: type[Detect] | type[Point]) -> None:
    calibration, total = Calibration.read(SHIPPED), 0
    for _, scene in hard_scenes("fit", 5):
        image = tiny.encode_image(scene.image[..., ::-1])
        request = kind(image, "object")
        (result,) = tiny.run([request])
        rescored = rescore(tiny, image, request, result)
        items = result.objects if kind is Detect else result.points
        for item, again in zip(items, rescored, strict=True):
            peaks = again.logits[:2].argmax(-1) / again.logits.shape[-1]
            np.testing.assert_allclose(peaks, again.box[:2], atol=0.005)
            assert item.confidence == pytest.approx(calibration.apply(request.skill, again.confidence), abs=1e-3)
        total += len(rescored)
    assert total > 10


def test_rescoring_an_empty_result_returns_nothing(tiny: LocalModel) -> None:
    image = tiny.encode_image(np.full((120, 160, 3), 90, np.uint8))
    for request in (Detect(image, "red circle"), Point(image, "dog")):
        (result,) = tiny.run([request])
        assert rescore(tiny, image, request, result) == []
    assert candidate_scores([]) == {}


def test_hard_names_include_objects_shapes_and_absent_look_alikes() -> None:
    absent = 0
    for seed in range(40):
        scene = render_hard(seed)
        names = hard_names(scene, np.random.default_rng(seed))
        present = {name for name in names if scene.named(name)}
        assert len(set(names)) == len(names)
        assert {o.name for o in scene.objects} <= present
        assert {o.shape for o in scene.objects if o.color} <= present
        absent += len(names) - len(present)
    assert absent >= 2 * 40 - 5  # fewer only if every look-alike is in the scene


def test_seeds_of_splits_and_held_out_scenes_do_not_overlap() -> None:
    starts = sorted((*FIRST_SEEDS.values(), HELD_OUT))
    assert min(b - a for a, b in pairwise(starts)) > 1_000_000


def test_command_prints_json_and_writes_the_calibration(tmp_path: Path) -> None:
    app = Typer()
    app.command()(confidence.main)
    options = ["--device", "cpu", "--scenes", "3", "--json", "--write", str(tmp_path)]
    result = CliRunner().invoke(app, options, catch_exceptions=False)
    report = json.loads(result.stdout)
    assert set(report["figures"]) == {"detect", "point"}
    assert set(report["figures"]["point"]) == set(FIRST_SEEDS)
    written = Calibration.read(tmp_path / FILE_NAME)
    assert set(written.curves) == {"detect", "point"}
    table = CliRunner().invoke(app, ["--device", "cpu", "--scenes", "1", "--candidates"], catch_exceptions=False)
    assert "mean entropy" in table.stdout
