"""Whether the tiny model's confidence is worth something, on hard scenes that its calibration was not fitted to."""

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
from moondream_cv.engine.local import LocalModel
from moondream_cv.evaluation import confidence
from moondream_cv.evaluation.confidence import FIRST_SEEDS, figures, hard_names, hard_scenes, study
from moondream_cv.evaluation.rereading import formulas, read_again
from moondream_cv.evaluation.scenes import HELD_OUT
from moondream_cv.requests import Detect, Point
from moondream_cv.scenes.hard import render_hard

SHIPPED = Path(confidence.__file__).parents[1] / "tiny" / FILE_NAME


@pytest.fixture(scope="module")
def tiny() -> LocalModel:
    return load("tiny", device="cpu")


@pytest.mark.slow
def test_held_out_figures(tiny: LocalModel) -> None:
    """The promised figures, on a third of the scenes that the module's docstring quotes."""
    report = figures({"held out": study(tiny, hard_scenes("held out", 300))}, Calibration.read(SHIPPED))
    for skill, halves in report.items():
        found = halves["held out"]
        assert found["false positives"] >= 200, skill
        assert found["AUC"] >= 0.85, skill
        assert found["mAP over random orders"] >= 0.03, skill
        assert found["calibration error"] <= 0.1, skill
        assert found["calibration error, calibrated"] <= 0.06, skill


def test_a_few_scenes(tiny: LocalModel) -> None:
    studies = study(tiny, hard_scenes("held out", 20), others=True)
    for skill, found in studies.items():
        of_formula, of_going_on = found.figures(), found.figures("going on")
        assert of_formula["AUC"] >= 0.8, skill
        assert of_formula["AUC"] > of_going_on["AUC"] + 0.1, skill
        assert of_formula["mAP over random orders"] > 0.0, skill
    same = studies["point"]
    np.testing.assert_allclose(same.scores(), same.scores("the same among what is left, 16"), atol=1e-5)


@pytest.mark.parametrize("kind", [Detect, Point])
def test_a_reply_read_again_has_its_own_numbers(tiny: LocalModel, kind: type[Detect] | type[Point]) -> None:
    """The distributions that are read again peak where the reply was placed, and give its confidence."""
    calibration, seen = Calibration.read(SHIPPED), 0
    for _, scene in hard_scenes("fit", 5):
        image = tiny.encode_image(scene.image[..., ::-1])
        request = kind(image, "object")
        (result,) = tiny.run([request])
        readings = read_again(tiny, image, request, result)
        items = result.objects if kind is Detect else result.points
        for item, reading in zip(items, readings, strict=True):
            peaks = reading.logits[:2].argmax(-1) / reading.logits.shape[-1]
            np.testing.assert_allclose(peaks, reading.box[:2], atol=0.005)
            assert item.confidence == pytest.approx(calibration.apply(request.skill, reading.confidence), abs=1e-3)
        seen += len(readings)
    assert seen > 10


def test_no_reply_has_no_readings(tiny: LocalModel) -> None:
    image = tiny.encode_image(np.full((120, 160, 3), 90, np.uint8))
    for request in (Detect(image, "red circle"), Point(image, "dog")):
        (result,) = tiny.run([request])
        assert read_again(tiny, image, request, result) == []
    assert formulas([]) == {}


def test_names_asked_for() -> None:
    absent = 0
    for seed in range(40):
        scene = render_hard(seed)
        names = hard_names(scene, np.random.default_rng(seed))
        there = {name for name in names if scene.named(name)}
        assert len(set(names)) == len(names)
        assert {o.name for o in scene.objects} <= there
        assert {o.shape for o in scene.objects if o.color} <= there
        absent += len(names) - len(there)
    assert absent >= 2 * 40 - 5  # less only where every look-alike is there


def test_halves_are_far_apart_and_from_other_scenes() -> None:
    starts = sorted((*FIRST_SEEDS.values(), HELD_OUT))
    assert min(b - a for a, b in pairwise(starts)) > 1_000_000


def test_the_command_prints_json_and_writes_the_file(tmp_path: Path) -> None:
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
