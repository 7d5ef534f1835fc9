"""`moondream-cv demo`, with a model that returns the ground truth and with one that is wrong."""

from __future__ import annotations

import itertools
import json
import shlex
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from moondream_cv.cli import app, demo_clip, models
from moondream_cv.cli.demo_scenes import PLANS, RESOLUTION_WH
from moondream_cv.images import to_rgb
from moondream_cv.requests import Detect, DetectedObject, DetectResult, Request, Result
from moondream_cv.scenes import Scene, render_scene
from tests.helpers.scene_model import SceneModel

STEP = 16  # distance in pixels of the samples by which a frame of the clip is identified


class DemoModel(SceneModel):
    """Returns the ground truth of the scenes, and of the most similar frame of the clip, which was compressed."""

    def __init__(self, scenes: list[Scene], wrong: bool) -> None:
        super().__init__(scenes, wrong)
        frames = list(demo_clip.render())
        self.truth = [objects for _, objects in frames]
        self.samples = np.stack([image[::STEP, ::STEP].astype(np.int16) for image, _ in frames])

    def _run_one(self, request: Request) -> Result:
        rgb = to_rgb(request.image)
        width, height = demo_clip.RESOLUTION_WH
        if rgb.shape[:2] != (height, width):
            return super()._run_one(request)
        assert isinstance(request, Detect)
        nearest = np.abs(self.samples - rgb[::STEP, ::STEP]).mean((1, 2, 3)).argmin()
        shrink = 0.5 if self.wrong else 1.0
        boxes = [
            np.array(o.xyxy) * shrink for o in self.truth[nearest] if o.name == request.object and o.visible > 0.25
        ]
        return DetectResult(
            tuple(DetectedObject(*(box / [width, height, width, height]).tolist(), 0.9) for box in boxes)
        )


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [render_scene(plan.seed, resolution_wh=RESOLUTION_WH, names=plan.names) for plan in PLANS]


def run(monkeypatch: pytest.MonkeyPatch, scenes: list[Scene], *arguments: str, wrong: bool = False) -> Any:
    monkeypatch.setattr(models, "load_model", lambda *_: DemoModel(scenes, wrong))
    return CliRunner().invoke(app, ["demo", *arguments])


@pytest.mark.slow
def test_ground_truth_is_counted_as_correct(
    scenes: list[Scene], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(monkeypatch, scenes, "-o", str(tmp_path / "demo"))
    assert result.exit_code == 0, result.stderr
    objects = sum(len(plan.names) for plan in PLANS)
    assert f"Found {objects} of {objects} objects, 0 wrong; 18 of 18 other answers correct" in result.stdout
    assert not any(line.split()[-1:] == ["wrong"] for line in result.stdout.splitlines())
    assert "Tracked through the clip: 5 of 5 counts correct; " in result.stdout
    assert "moondream-cv detect" in result.stdout
    saved = {path.name for path in (tmp_path / "demo").iterdir()}
    assert {"overview.png", "1-toys.png", "1-toys-boxes.png", "1-toys-points.png"} <= saved
    assert {"clip.mp4", "tracked.mp4", "tracked.png"} <= saved
    for path in (tmp_path / "demo").glob("*.png"):
        Image.open(path).load()


@pytest.mark.slow
def test_suggested_commands_succeed_with_the_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    demo = CliRunner().invoke(app, ["demo", "--device", "cpu"])
    assert demo.exit_code == 0, demo.stderr
    lines = [line.strip() for line in demo.stdout.partition("then try:\n")[2].splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.endswith(("-m tiny", ".png", ".mp4"))]
    assert [command[0] for command in commands] == ["detect", "query", "video"]

    detect, query, video = (CliRunner().invoke(app, command) for command in commands)
    assert (detect.exit_code, query.exit_code, video.exit_code) == (0, 0, 0)
    names = [word for option, word in itertools.pairwise(commands[0]) if option == "-c"]
    assert len(names) == 2
    for name in names:
        assert f" {name} " in detect.stdout
    question = commands[1][commands[1].index("-q") + 1]
    row = next(line for line in demo.stdout.splitlines() if question in line).removeprefix(f" {question}").split()
    assert (query.stdout.strip(), row[2]) == (row[0], "correct")
    assert video.stdout.startswith(commands[2][2])
    namespace: dict[str, Any] = {}
    exec("\n".join(lines[lines.index("In Python:") + 1 :]), namespace)
    assert {*namespace["detections"].data["class_name"]} == {*names}


@pytest.mark.slow
def test_mistakes_are_counted(scenes: list[Scene], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, scenes, "-o", str(tmp_path), "--json", wrong=True)
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["score"]["found"] == 0
    assert document["score"]["wrong"] > 0
    assert document["score"]["right"] == 0
    checks = [check for image in document["images"] for check in image["checks"]]
    assert not any(check["right"] for check in checks)
    assert document["clip"]["boxes"]["found"] < document["clip"]["boxes"]["wrong"]
    assert all(Path(image["image"]).is_file() for image in document["images"])


@pytest.mark.slow
def test_clip_is_tracked_and_saved(scenes: list[Scene], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, scenes, "-o", str(tmp_path), "--json")
    assert result.exit_code == 0, result.stderr
    clip = json.loads(result.stdout)["clip"]
    for key in ("source", "tracked"):
        with av.open(clip[key]) as container:
            sizes = [(frame.width, frame.height) for frame in container.decode(video=0)]
        assert len(sizes) == demo_clip.FRAMES
    assert Path(clip["tracked"]) == tmp_path / "tracked.mp4"
    assert Path(clip["contact_sheet"]) == tmp_path / "tracked.png"
    assert Image.open(clip["contact_sheet"]).width > 2 * sizes[0][0]
    assert [check["asked"] for check in clip["checks"]] == [
        f"Track and count {n!r}" for n in dict.fromkeys(demo_clip.NAMES)
    ]
    assert all(check["right"] for check in clip["checks"])
    assert 0.9 * clip["boxes"]["true"] < clip["boxes"]["found"] <= clip["boxes"]["true"]


def test_output_that_is_a_file_is_rejected(
    scenes: list[Scene], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").touch()
    result = run(monkeypatch, scenes, "-o", str(tmp_path / "demo"))
    assert result.exit_code == 2
    assert "must be a folder, got a file" in result.stderr
    result = run(monkeypatch, scenes, "-o", str(tmp_path / "demo" / "images"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "demo is not a folder; choose another folder" in result.stderr
