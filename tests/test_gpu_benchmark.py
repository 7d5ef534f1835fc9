"""`benchmarks/gpu.py` on a CPU, with the sizes of the tiny model. Run with `pytest tests/test_gpu_benchmark.py`."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from moondream_cv.engine.local_model import LocalModel
from tests.helpers.models import random_model

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are not part of a source distribution", allow_module_level=True)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Return the module with small sizes."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("gpu")

    def small_model(_vision_layers: int | None, _text_layers: int | None, device: torch.device) -> LocalModel:
        return random_model(device=str(device))

    monkeypatch.setattr(module, "random_model", small_model)
    monkeypatch.setattr(module, "PRODUCT", (64, 64, 64))
    monkeypatch.setattr(module, "COPY_BYTES", 2**20)
    monkeypatch.setattr(module, "RESOLUTIONS", {"640x480": (96, 128), "1080p": (135, 240)})
    monkeypatch.setattr(module, "NUM_CLASSES", 5)
    yield module
    sys.modules.pop("gpu")


def run_main(module: ModuleType, output: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, object]:
    arguments = ["gpu.py", "--device", "cpu", "--repeat", "1", "--images", "2", "--output", str(output), *options]
    monkeypatch.setattr(sys, "argv", arguments)
    module.main()
    report: dict[str, object] = json.loads(output.read_text())
    return report


@pytest.mark.slow
def test_every_section_runs_on_a_cpu(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = run_main(gpu, tmp_path / "results" / "gpu.json", monkeypatch)
    assert report["failed"] == {}
    assert report["torch"] == torch.__version__
    measurements = report["measurements"]
    assert isinstance(measurements, list)
    values = {one["name"]: one["value"] for one in measurements}
    assert len(values) == len(measurements)
    assert all(math.isfinite(value) for value in values.values())
    for part in ("product", "copy", "int8", "1 class with", "5 classes", "decode step, graph, 64", "compile", "memory"):
        assert any(part in name for name in values), part
    assert all(value == 0 for name, value in values.items() if "largest difference" in name)
    assert {one["target"] for one in measurements} == {"", ">= 0.6", ">= 60", ">= 100", "<= 25", "<= 150", "<= 1"}


def test_other_sections_run_after_a_failed_one(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_run: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu.SECTIONS, "decode", fail)
    with pytest.raises(SystemExit, match="Failed: decode"):
        run_main(gpu, tmp_path / "gpu.json", monkeypatch, "--sections", "decode", "preprocess")
    assert "no such kernel" in capsys.readouterr().out
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert "no such kernel" in report["failed"]["decode"]
    assert any("Pillow" in one["name"] for one in report["measurements"])
