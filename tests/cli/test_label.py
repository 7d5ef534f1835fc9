"""`moondream-cv label`: output, JSON, merging and wrong input, with the tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from moondream_cv.cli import app
from moondream_cv.labeling.records import read_records
from moondream_cv.scenes import render_scene
from tests.helpers.terminal import TerminalProcess
from tests.helpers.waiting import until

Label = Callable[..., Result]
OPTIONS = ("-m", "tiny", "--device", "cpu")


@pytest.fixture
def label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Label:
    """Return a function that runs `moondream-cv label` in a folder with 6 scenes in `photos`."""
    monkeypatch.chdir(tmp_path)
    write_scenes(tmp_path / "photos", 6)

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, ["label", *map(str, arguments)])

    return run


def write_scenes(folder: Path, count: int) -> None:
    folder.mkdir()
    for index in range(count):
        scene = render_scene(np.random.default_rng([5, index]), names=["dog", "red circle", "cat"])
        cv2.imwrite(str(folder / f"{index}.jpg"), scene.image[..., ::-1])


def test_folder_becomes_a_dataset(label: Label, tmp_path: Path) -> None:
    result = label("photos", "dog,red circle", "cat", "-o", "dataset", *OPTIONS)
    assert result.exit_code == 0, result.stderr
    assert "6 images in dataset: train 4, valid 1, test 1" in result.stdout
    records = list(read_records(tmp_path / "dataset" / "labels.jsonl"))
    counts = {
        name: sum(one.class_name == name for record in records for one in record.objects) for name in ("dog", "cat")
    }
    assert ["dog", str(counts["dog"])] in [line.split() for line in result.stdout.splitlines()]
    assert counts["cat"] > 2
    assert (tmp_path / "dataset" / "report.html").is_file()


def test_json_describes_the_dataset_and_its_merged_review(label: Label, tmp_path: Path) -> None:
    first = json.loads(
        label("photos", "dog", "-o", "dataset", "--format", "coco", "--split", "1", *OPTIONS, "--json").stdout
    )
    assert (first["images"], first["failed"], first["splits"]) == (6, 0, {"train": 6})
    annotations = tmp_path / "dataset" / "train" / "_annotations.coco.json"
    content = json.loads(annotations.read_text())
    removed = content["annotations"].pop()
    (tmp_path / "reviewed.json").write_text(json.dumps(content))
    merged = json.loads(label("--merge", "reviewed.json", "-o", "dataset", "--json").stdout)
    assert (merged["reviewed"], merged["changed"]) == (6, 1)
    assert merged["objects"] == {"dog": first["objects"]["dog"] - 1}
    assert removed["id"] not in [one["id"] for one in json.loads(annotations.read_text())["annotations"]]


def test_quiet_run_prints_no_progress(label: Label) -> None:
    result = label("photos", "dog", "-o", "dataset", *OPTIONS, "--quiet")
    assert (result.exit_code, result.stderr) == (0, "")


def test_dataset_without_validation_images_is_reported(label: Label, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("photos/0.jpg\n")
    arguments = ("list.txt", "dog", "-o", "dataset", *OPTIONS)
    assert "no images for validation" in label(*arguments).stderr
    assert "validation" not in label(*arguments, "--split", "1").stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["photos", "dog"], "add -o DATASET, for example: -o photos-dataset"),
        (["-o", "dataset"], "the input is missing"),
        (["photos", "-o", "dataset"], "class names are missing"),
        (["photos", "dog", "dog", "-o", "dataset"], "duplicates"),
        (["photos/0.jpg", "photos/1.jpg", "dog", "-o", "dataset"], "quote globs"),
        (["photo", "dog", "-o", "dataset"], "photos"),
        (["photos", "dog", "-o", "photos"], "contains other files"),
        (["photos", "dog", "-o", "dataset", "--split", "a,b"], "--split must be one to three shares"),
        (["photos", "dog", "-o", "dataset", "-m", "tinny"], "tinny"),
        (["photos", "dog", "-o", "dataset", "--merge", "reviewed.json"], "--merge takes no INPUT"),
        (["--merge", "reviewed.json"], "add -o DATASET, the dataset of the reviewed labels"),
        (["--merge", "reviewed.json", "-o", "missing"], "missing is not a labeled dataset"),
        (["photos", "--prompts", "missing.yaml", "-o", "dataset"], "missing.yaml cannot be read"),
    ],
)
def test_wrong_arguments_are_rejected_before_any_work(
    label: Label, tmp_path: Path, arguments: list[str], message: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    model = [] if "--merge" in arguments or "-m" in arguments else OPTIONS
    result = label(*arguments, *model)
    assert result.exit_code in (1, 2)
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to a single process")
def test_ctrl_c_names_the_way_to_continue(label: Label, tmp_path: Path) -> None:
    write_scenes(tmp_path / "many", 200)
    command = [sys.executable, "-m", "moondream_cv", "label", "many", "dog", "-o", "dataset", "--batch", "2", *OPTIONS]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    labels = tmp_path / "dataset" / "labels.jsonl"
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    until(lambda: process.poll() is not None or (labels.exists() and labels.stat().st_size > 0))
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 130
    assert "images are labeled; the same command continues" in error
    assert error.splitlines()[-1] == "Interrupted"
    assert "Traceback" not in error
    lines = labels.read_bytes()
    result = label("many", "dog", "-o", "dataset", "--batch", "2", *OPTIONS)
    assert result.exit_code == 0, result.stderr
    assert labels.read_bytes().startswith(lines)
    assert sum(1 for _ in read_records(labels)) == 200


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudoterminals")
def test_ctrl_c_removes_the_progress_bar(label: Label, tmp_path: Path) -> None:
    write_scenes(tmp_path / "many", 100)
    arguments = ["moondream-cv", "label", "many", "dog", "-o", "dataset", "--batch", "2", *OPTIONS]
    code = f"import sys\nfrom moondream_cv.__main__ import main\nsys.argv = {arguments}\nmain()\n"
    root = Path(__file__).parents[2]
    process = TerminalProcess(code, tmp_path, {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)})
    process.wait_for("images/s")
    assert any(line.startswith("Labeling") for line in process.screen)
    process.interrupt()
    assert process.wait() == 130
    notice, last = process.screen[-2:]
    assert notice.endswith("images are labeled; the same command continues")
    assert last == "Interrupted"
    assert not any("Labeling" in line for line in process.screen)
    process.close()
