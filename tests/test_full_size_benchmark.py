"""`benchmarks/full_size.py` with small networks. Run with `pytest tests/test_full_size_benchmark.py`."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from moondream_cv.model.config import MoondreamConfig

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are not part of a source distribution", allow_module_level=True)


def narrow_config() -> MoondreamConfig:
    """Return the configuration of Moondream 2B with narrow layers."""
    full = MoondreamConfig()
    return dataclasses.replace(
        full,
        text=dataclasses.replace(full.text, dim=128, ff_dim=256, n_heads=4, n_kv_heads=4),
        vision=dataclasses.replace(
            full.vision, enc_dim=64, enc_ff_dim=128, enc_n_heads=4, proj_out_dim=128, proj_inner_dim=256
        ),
        region=dataclasses.replace(full.region, dim=128, inner_dim=256),
    )


@pytest.fixture
def full_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Return the module with narrow layers, and limits of the machine from one call."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("full_size")
    monkeypatch.setattr(importlib.import_module("_common"), "MoondreamConfig", narrow_config)
    monkeypatch.setattr(module, "measure_limits", functools.partial(module.measure_limits, repeat=1))
    yield module
    sys.modules.pop("full_size")


def run_main(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: str | Path) -> None:
    arguments = ["full_size.py", "--layers", "1", "--repeat", "1", *map(str, options)]
    monkeypatch.setattr(sys, "argv", arguments)
    module.main()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the memory is read from /proc")
def test_every_section_runs_with_one_layer(
    full_size: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results" / "full_size.json"
    sections = ("--memory", "--accuracy", "--scenes", "2", "--hub", "--controls", "--profile")
    options = ("--weights", tmp_path / "weights", "--modes", "float32,int8", "--output", output)
    run_main(full_size, monkeypatch, *options, *sections)

    report: dict[str, Any] = json.loads(output.read_text())
    assert report["torch"] == torch.__version__
    measures: dict[str, float] = report["measures"]
    for name in (
        "product rate, float32, F.linear (GFLOP/s)",
        "bandwidth, float32, F.linear (GB/s)",
        "float32: load (s)",
        "float32: encode 640x480 (s)",
        "int8: images/s, 8 classes of 3 objects",
        "int8: tokens/s, batch of 8",
        "encode, best full precision / int8",
        "decode step, float32 / int8",
        "decode step, float32 with F.linear / int8",
        "float32: peak of load / weights",
        "resident memory, int8 (GB)",
        "float32: encode 640x480, max_crops=1 / default",
        "float32: encode 640x480, previous=, no change / default",
        "tiny model, F1 at IoU 0.5, int8",
        "random weights, equal arg-max choices, int8",
        "hub: download (s)",
        "hub: first detection (s)",
    ):
        assert name in measures
    assert all(math.isfinite(value) and value > 0 for name, value in measures.items() if " / " in name or "/s" in name)
    assert 0 <= measures["random weights, equal arg-max choices, int8"] <= 1
    assert set(report["profile"]) == {f"{mode}, {stage}" for mode in ("float32", "int8")
                                      for stage in ("encode", "detect 8 classes")}  # fmt: skip
    assert str(output) in capfd.readouterr().out


def test_a_checkpoint_has_the_layers_of_the_option_and_is_used_again(
    full_size: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_main(full_size, monkeypatch, "--weights", tmp_path, "--no-speed")
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["text"]["n_layers"], config["vision"]["enc_n_layers"]) == (1, 1)
    written = (tmp_path / "model.safetensors").stat().st_mtime_ns
    run_main(full_size, monkeypatch, "--weights", tmp_path, "--no-speed")
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == written


def test_an_unknown_mode_is_rejected(
    full_size: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_main(full_size, monkeypatch, "--modes", "float32,int3")
    assert "int3" in capsys.readouterr().err
