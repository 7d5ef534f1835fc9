"""`moondream-cv demo`, with a model that knows the truth and with one that lies. Run with `pytest tests/cli`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from moondream_cv.cli import app, models
from moondream_cv.cli.demo_scenes import PLANS, RESOLUTION_WH
from moondream_cv.scenes import Scene, render_scene
from tests.scene_model import SceneModel


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [render_scene(plan.seed, resolution_wh=RESOLUTION_WH, names=plan.names) for plan in PLANS]


def run(monkeypatch: pytest.MonkeyPatch, scenes: list[Scene], *arguments: str, lies: bool = False) -> Any:
    monkeypatch.setattr(models, "load_model", lambda *_: SceneModel(scenes, lies))
    return CliRunner().invoke(app, ["demo", *arguments])


def test_what_is_right_counts_as_right(scenes: list[Scene], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, scenes, "-o", str(tmp_path / "demo"))
    assert result.exit_code == 0, result.stderr
    objects = sum(len(plan.names) for plan in PLANS)
    assert f"Found {objects} of {objects} objects, 0 wrong; 18 of 18 other answers right" in result.stdout
    assert "wrong" not in result.stdout.replace("0 wrong", "")
    assert "moondream-cv detect" in result.stdout
    saved = {path.name for path in (tmp_path / "demo").iterdir()}
    assert {"overview.png", "1-toys.png", "1-toys-boxes.png", "1-toys-points.png"} <= saved
    for path in (tmp_path / "demo").iterdir():
        Image.open(path).load()


def test_mistakes_are_shown(scenes: list[Scene], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, scenes, "-o", str(tmp_path), "--json", lies=True)
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["score"]["found"] == 0
    assert document["score"]["wrong"] > 0
    assert document["score"]["right"] == 0
    checks = [check for image in document["images"] for check in image["checks"]]
    assert not any(check["right"] for check in checks)
    assert all(Path(image["image"]).is_file() for image in document["images"])


def test_a_file_in_the_place_of_the_folder(
    scenes: list[Scene], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").touch()
    result = run(monkeypatch, scenes, "-o", str(tmp_path / "demo"))
    assert result.exit_code == 2
    assert "is a file; the demo needs a folder" in result.stderr
