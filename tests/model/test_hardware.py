"""Choice of data types from facts about the machine, and the facts themselves."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moondream_cv.model import hardware, speed_estimate
from moondream_cv.model.hardware import Cpu, Precision, choose_precision, cpu_dtype, probe_cpu, thread_warning
from tests.helpers.small_checkpoint import small_config, small_network

VALUES = 1_900_000_000


def cpu(
    has_bfloat16: bool = False, free: float | None = 16e9, usable_cores: int = 8, cores: int = 8, threads: int = 8
) -> Cpu:
    return Cpu(has_bfloat16, None if free is None else int(free), usable_cores, cores, threads)


def test_bfloat16_is_chosen_only_if_the_cpu_multiplies_it() -> None:
    assert cpu_dtype(2048, cpu(has_bfloat16=True)) == torch.bfloat16
    assert cpu_dtype(2048, cpu(has_bfloat16=False)) == torch.float32
    assert cpu_dtype(512, cpu(has_bfloat16=True)) == torch.float32


@pytest.mark.parametrize(
    ("has_bfloat16", "free", "expected"),
    [
        pytest.param(False, 16e9, Precision(torch.float32), id="float32 fits"),
        pytest.param(True, 16e9, Precision(torch.bfloat16), id="bfloat16 fits"),
        pytest.param(True, 5e9, Precision(torch.bfloat16), id="bfloat16 fits where float32 would not"),
        pytest.param(False, None, Precision(torch.float32), id="free memory is unknown"),
    ],
)
def test_weights_that_fit_are_not_quantized(has_bfloat16: bool, free: float | None, expected: Precision) -> None:
    assert choose_precision(2048, VALUES, cpu(has_bfloat16, free)) == expected


def test_weights_that_do_not_fit_are_quantized_with_a_warning() -> None:
    precision = choose_precision(2048, VALUES, cpu(free=6e9))
    assert (precision.dtype, precision.quantize) == (torch.float32, "int8")
    assert precision.warning == (
        "the weights are quantized to int8, because loading them in float32 takes 8.7 GB and 6.0 GB are free; "
        "dtype='float32' loads them in full precision"
    )
    assert choose_precision(2048, VALUES, cpu(True, 3e9)).quantize == "int8"
    assert choose_precision(256, VALUES, cpu(free=6e9)) == Precision(torch.float32)


def test_thread_warnings() -> None:
    assert thread_warning(cpu()) is None
    assert thread_warning(cpu(threads=4)) is None  # one per physical core
    assert thread_warning(cpu(usable_cores=1)) == (
        "PyTorch runs 8 threads, but this process may use 1 of 8 cores; set OMP_NUM_THREADS=1"
    )
    assert thread_warning(cpu(threads=1)) == (
        "PyTorch runs only 1 thread, although this process may use 8 of 8 cores; set OMP_NUM_THREADS=8"
    )


def test_facts_of_this_machine() -> None:
    found = probe_cpu()
    assert found.threads == torch.get_num_threads()
    assert 1 <= found.usable_cores <= found.cores == os.cpu_count()
    assert found.free_memory is None or found.free_memory > 0


@pytest.mark.parametrize(
    ("files", "memory", "quota"),
    [
        pytest.param(
            {"memory.max": "4000000000", "memory.current": "1000000000", "cpu.max": "150000 100000",
             "memory.stat": "anon 5\ninactive_file 500000000"},
            3_500_000_000, 2, id="version 2",
        ),
        pytest.param({"memory.max": "max", "memory.current": "1", "cpu.max": "max 100000"}, None, None, id="no limit"),
        pytest.param(
            {"memory.limit_in_bytes": "2000", "memory.usage_in_bytes": "500", "cpu.cfs_quota_us": "50000",
             "cpu.cfs_period_us": "100000"},
            1500, 1, id="version 1",
        ),
        pytest.param({"memory.limit_in_bytes": str(2**63 - 4096), "memory.usage_in_bytes": "500",
                      "cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, None, None, id="version 1, no limit"),
    ],
)  # fmt: skip
def test_limits_of_control_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], memory: int | None, quota: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(hardware, "_control_groups", lambda controller: [tmp_path])
    monkeypatch.setattr(hardware, "_available_memory", lambda: None)
    assert hardware.free_memory() == memory
    assert hardware.cpu_quota() == quota


def test_speed_estimate_multiplies_measured_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(run: Callable[[], torch.Tensor]) -> float:
        run()
        return 1.0

    monkeypatch.setattr(speed_estimate, "_seconds", seconds)
    network = small_network(small_config(dim=256, layers=3))
    estimate = speed_estimate.estimate_speed(network)
    values = {
        name: sum(weight.numel() for weight in module.parameters() if weight.ndim == 2)
        for name, module in network.named_modules()
    }
    measured = values["text.blocks.0.mlp.fc1"] * 3
    steps = values["text.blocks"] + values["region.coord_decoder.fc1"] + values["region.coord_decoder.fc2"]
    assert estimate.class_seconds == pytest.approx(10 * steps / measured, rel=0.02)
    patches = network.config.vision.num_patches
    rows = 9 * values["vision.blocks"] + values["text.blocks"] * (patches + 1) / patches
    assert estimate.encode_seconds == pytest.approx(rows / values["vision.blocks.0.mlp.fc1"] / 0.8, rel=0.02)
