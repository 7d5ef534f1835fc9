"""`moondream-cv finetune`: train, list, merge and export with the tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from moondream_cv import load
from moondream_cv.cli import app
from moondream_cv.finetune.store import FinetuneStore
from tests.helpers.labeled_scenes import arrow_scenes, write_dataset
from tests.helpers.terminal import TerminalProcess

Finetune = Callable[..., Result]


@pytest.fixture(scope="module")
def arrows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a YOLO folder with 12 images to train and 2 held out."""
    folder = tmp_path_factory.mktemp("data") / "arrow scenes"
    write_dataset(folder, arrow_scenes(2, seed=1), "yolo", "valid")
    return write_dataset(folder, arrow_scenes(12), "yolo")


@pytest.fixture
def finetune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Finetune:
    """Return a function that runs `moondream-cv finetune` in an empty folder, with finetunes in `root`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOONDREAM_CV_FINETUNES", str(tmp_path / "root"))

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, ["finetune", *map(str, arguments)])

    return run


def options(steps: int = 2) -> list[str]:
    """Return options of a short run."""
    return f"-c arrow --model tiny --device cpu --steps {steps} --batch 4 --evaluate-every 2".split()


def test_training_writes_a_report_and_an_adapter_that_loads(finetune: Finetune, arrows: Path, tmp_path: Path) -> None:
    result = finetune(arrows, *options(), "--json")
    assert result.exit_code == 0, result.stderr
    assert "YOLO dataset, 12 images to train, 2 held out, classes: arrow" in result.stderr
    assert "Base model: held-out F1" in result.stderr
    document = json.loads(result.stdout)
    assert (document["name"], document["step"]) == ("arrow-scenes", 2)
    assert document["reason"] == "all steps are complete"
    assert document["after"]["f1"] >= document["before"]["f1"]
    assert Path(document["report"]) == Path("arrow-scenes-report/report.md")
    assert {"loss.png", "score.png", "images"} <= {path.name for path in Path("arrow-scenes-report").iterdir()}
    adapter = f"{document['finetune_id']}@2"  # the latest checkpoint is always kept
    assert load("tiny", device="cpu", adapter=adapter).adapter is not None


def test_train_can_be_written_out_and_continues(finetune: Finetune, arrows: Path) -> None:
    first = finetune("train", arrows, *options(2), "--name", "parts", "--output", "report", "--quiet")
    assert (first.exit_code, first.stderr) == (0, "")
    assert "Report: report/report.md" in first.stdout
    second = finetune("train", arrows, *options(3), "--name", "parts", "--output", "report")
    assert "End: all steps are complete (step 3)" in second.stdout
    assert "Step 3: held-out F1" in second.stderr
    assert "Step 2: held-out F1" not in second.stderr  # the score of the first command is kept
    listed = json.loads(finetune("list", "--json").stdout)["finetunes"]
    assert [(one["name"], one["model"], one["rank"], one["step"]) for one in listed] == [("parts", "tiny", 8, 3)]
    assert 3 in listed[0]["checkpoints"]
    assert f"{listed[0]['id']}  parts: tiny, rank 8, step 3, checkpoints: 3" in finetune("list").stdout


def test_adapters_in_another_root_are_merged_and_exported(finetune: Finetune, arrows: Path, tmp_path: Path) -> None:
    root = ("--root", tmp_path / "other")
    result = finetune(arrows, *options(), *root)
    assert result.exit_code == 0, result.stderr
    (found,) = json.loads(finetune("list", *root, "--json").stdout)["finetunes"]
    adapter = f"{found['id']}@2"
    assert finetune("merge", adapter, "merged").exit_code == 1  # not in the default root
    merged = finetune("merge", adapter, "merged", *root)
    assert (merged.exit_code, merged.stdout) == (0, "merged\n")
    assert load("merged", device="cpu").adapter is None
    exported = finetune("export", adapter, "peft", *root, "--json")
    assert json.loads(exported.stdout) == {"schema": 1, "adapter": adapter, "path": "peft"}
    assert load("tiny", device="cpu", adapter="peft").adapter is not None


def test_checkpoints_and_finetunes_are_deleted(finetune: Finetune, tmp_path: Path) -> None:
    with FinetuneStore(tmp_path / "root") as store:
        first, second = (store.create(name, 8, "tiny", seed=0).finetune_id for name in ("first", "second"))
        for step in (1, 2):
            store.commit_step(first, step, {"a": torch.zeros(1)}, "digest", {})
            store.save_checkpoint(first, step, {"a": torch.zeros(1)}, {})
    assert finetune("delete", f"{first}@1").stdout == "Deleted first, step 1\n"
    assert finetune("delete", second).stdout == "Deleted second\n"
    (left,) = json.loads(finetune("list", "--json").stdout)["finetunes"]
    assert (left["id"], left["checkpoints"]) == (first, [2])
    again = finetune("delete", f"{first}@1")
    assert (again.exit_code, again.stdout) == (1, "")
    assert "deleted" in again.stderr


def test_list_of_an_empty_folder_is_empty(finetune: Finetune) -> None:
    result = finetune("list")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "No finetunes in " in result.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nowhere"], 1, "the dataset 'nowhere' does not exist"),
        (["."], 1, "has an unknown layout"),
        (["{arrows}", "-c", "bolt"], 2, "has no boxes of 'bolt'"),
        (["{arrows}", "-c", "arrow,"], 2, "class names must not be empty"),
        (["{arrows}", "--held-out", "2"], 2, "held_out must be above 0 and at most 1"),
        (["{arrows}", "--model", "missing", "--rank", "7"], 2, "rank must be one of 8, 16, 24, 32, got 7"),
        (["{arrows}", "--model", "missing", "--name", "a b"], 2, "name must have 1 to 64 letters"),
        (["{arrows}", "--model", "missing", "--lr", "-1"], 2, "lr must be above 0 and at most 1"),
        (
            ["{arrows}", "--model", "http://127.0.0.1:9"],
            2,
            "--model must be a local model, got the server http://127.0.0.1:9",
        ),
        (["{arrows}", "--output", "{arrows}/data.yaml"], 2, "--output must be a folder, got the file"),
        (["/"], 2, "has no letters or digits; add --name NAME"),
        (["{arrows}", "--steps", "0"], 2, "Invalid value for '--steps'"),
        (["merge", "missing.pt", "merged"], 1, "missing.pt' does not exist"),
        (["merge", "01K5ZJ3W8Q4T7X2M9N6P1R0SVA@5", "merged"], 1, "there is no finetune"),
        (["delete", "01K5ZJ3W8Q4T7X2M9N6P1R0SVA"], 2, "there are no finetunes in"),
        (["delete", "01K5ZJ3W8Q4T7X2M9N6P1R0SVA@last"], 2, "the step must be a number"),
        (["export", "missing.pt", "peft"], 1, "missing.pt' does not exist"),
    ],
)
def test_errors_name_the_problem(
    arguments: list[str], status: int, message: str, finetune: Finetune, arrows: Path
) -> None:
    result = finetune(*(one.format(arrows=arrows) for one in arguments))
    assert result.exit_code == status
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert not list(Path().glob("*-report"))


def test_two_processes_cannot_use_one_root(finetune: Finetune, arrows: Path, tmp_path: Path) -> None:
    code = f"""
import sys
from moondream_cv.finetune.store import FinetuneStore
with FinetuneStore({str(tmp_path / "root")!r}) as store:
    store.create("parts", 8, "tiny", seed=0)
    print("open", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == b"open"
        result = finetune(arrows, *options())
        listed = finetune("list")
        process.communicate()
    assert result.exit_code == 1
    assert "another process" in result.stderr.lower()
    assert (listed.exit_code, listed.stdout.split()[1:2]) == (0, ["parts:"])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudoterminals")
def test_ctrl_c_stops_the_run_and_the_same_command_continues(finetune: Finetune, arrows: Path, tmp_path: Path) -> None:
    arguments = [str(arrows), *options(100000)]
    code = "import sys; from moondream_cv.cli import main\n"
    code += f"sys.argv = ['moondream-cv', 'finetune', *{arguments!r}]; main()"
    process = TerminalProcess(code, tmp_path, {**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        process.wait_for("Step 2: held-out F1")
        process.interrupt()
        assert process.wait() == 130
    finally:
        process.close()
    assert "the same command continues from there" in process.output
    assert "Interrupted" in process.output
    assert "Traceback" not in process.output

    (found,) = json.loads(finetune("list", "--json").stdout)["finetunes"]
    assert found["step"] >= 2
    result = finetune(arrows, *options(found["step"] + 1))
    assert result.exit_code == 0, result.stderr
    assert f"End: all steps are complete (step {found['step'] + 1})" in result.stdout
