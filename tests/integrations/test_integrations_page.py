"""The code of `docs/integrations.md` runs with the tiny model.

The Python blocks of a section run in order in one namespace. The command line of CVAT is parsed by cvat-cli.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shlex
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from moondream_cv.scenes import render_scene

pytestmark = [pytest.mark.integrations, pytest.mark.usefixtures("fiftyone_folder")]

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
if not PAGE.exists():
    pytest.skip("the page is not part of a source distribution", allow_module_level=True)
SECTIONS = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
SUBSTITUTES = {"moondream2": "tiny", "delivery van": "bus", "pickup": "cat", "person": "dog", "red car": "red circle"}


def run_section(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the Python blocks of a section in a folder with images of a dog, a bus and a red circle."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    image = Image.fromarray(render_scene(1, names=["dog", "bus", "red circle"], resolution_wh=(320, 240)).image)
    for path in ("street.jpg", "photos/1.jpg", "photos/2.jpg"):
        image.save(path, quality=95)
    namespace: dict[str, Any] = {"__name__": "reader"}
    for code in re.findall(r"^```python\n(.*?)^```$", SECTIONS[name], re.DOTALL | re.MULTILINE):
        with redirect_stdout(io.StringIO()):
            exec(compile(substituted(code), PAGE.name, "exec"), namespace)
    return namespace


def substituted(code: str) -> str:
    for printed, here in SUBSTITUTES.items():
        code = code.replace(printed, here)
    return code


def test_autodistill_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("autodistill", reason="needs autodistill (make test-integrations)")
    reader = run_section("autodistill", tmp_path, monkeypatch)
    assert reader["detections"].data["class_name"].tolist() == ["van", "dog"]
    labels = [path.read_text().splitlines() for path in tmp_path.glob("dataset/*/labels/*.txt")]
    assert [len(lines) for lines in labels] == [2, 2]


def test_cvat_section() -> None:
    pytest.importorskip("cvat_cli", reason="needs cvat-cli (make test-integrations)")
    from cvat_cli._internal.commands_all import COMMANDS
    from cvat_cli._internal.common import FunctionLoader

    (line,) = re.findall(r"^cvat-cli (.*)$", SECTIONS["CVAT"], re.MULTILINE)
    parser = argparse.ArgumentParser()
    COMMANDS.configure_parser(parser)
    arguments = parser.parse_args(shlex.split(line))
    assert arguments.conf_threshold == 0.3
    parameters = {**arguments.function_parameters, "model": "tiny"}
    function = FunctionLoader(arguments.function_module, arguments.function_file, parameters).load()
    assert [label.name for label in function.spec.labels] == ["person", "red car"]


def test_fiftyone_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fiftyone", reason="needs fiftyone (make test-integrations)")
    reader = run_section("FiftyOne", tmp_path, monkeypatch)
    assert sorted(reader["dataset"].distinct("boxes.detections.label")) == ["dog", "red circle"]
    assert reader["dataset"].count("boxes.detections") == 4
    assert reader["model"].detector.model.name.endswith("moondream-cv/tiny")
    reader["dataset"].delete()


def test_label_studio_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_section("Label Studio", tmp_path, monkeypatch)
    tasks = json.loads((tmp_path / "tasks.json").read_text(encoding="utf-8"))
    assert [task["data"]["image"] for task in tasks] == [f"https://images.example.com/{n}.jpg" for n in (1, 2)]
    assert [len(task["predictions"][0]["result"]) for task in tasks] == [2, 2]
    assert {path.name for path in (tmp_path / "dataset").iterdir()} >= {"images", "label_config.xml", "tasks.json"}


def test_huggingface_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets (make test-integrations)")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    reader = run_section("Hugging Face datasets", tmp_path, monkeypatch)
    assert {name: split.num_rows for name, split in reader["dataset"].items()} == {"train": 1, "validation": 1}
    assert [row["objects"]["category"] for split in reader["dataset"].values() for row in split] == [[0, 1], [0, 1]]
    assert sorted(path.name for path in reader["images"]) == ["1.jpg", "2.jpg"]
