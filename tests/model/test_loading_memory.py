"""The peak memory of `load` is little more than the memory of the loaded weights."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moondream_cv.loading import quantize
from moondream_cv.model.checkpoints import save_checkpoint
from moondream_cv.model.config import MoondreamConfig
from moondream_cv.model.moondream import MoondreamNetwork
from tests.helpers.small_checkpoint import byte_tokenizer, small_config

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")

# Loads a first model, so that the peak contains no imports, and prints the growth of the peak and the weights in bytes.
LOAD = """
import re, sys
from pathlib import Path
from moondream_cv import load
from moondream_cv.model.quantized_linear import weight_bytes

def memory(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

folder, dtype, quantize = sys.argv[1:]
options = {"device": "cpu", "dtype": dtype, "quantize": None if quantize == "None" else quantize}
load("tiny", **options).close()
before = memory("VmRSS")
model = load(folder, **options)
print(memory("VmHWM") - before, weight_bytes(model.network))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Write a checkpoint with the widths of Moondream 2 and few layers, also in other data types and quantized."""
    values = MoondreamConfig().to_dict()
    values["text"] |= {"n_layers": 4, "vocab_size": 8192}
    values["vision"]["enc_n_layers"] = 2
    values["tokenizer"] = small_config().to_dict()["tokenizer"]
    config = MoondreamConfig.from_dict(values)
    folder = tmp_path_factory.mktemp("checkpoints")
    network = MoondreamNetwork(config).to(torch.bfloat16)
    network.initialize(torch.Generator().manual_seed(0))
    save_checkpoint(network, config, byte_tokenizer(), folder / "bfloat16")
    save_checkpoint(network, config, byte_tokenizer(), folder / "float32", dtype=torch.float32)
    del network
    for mode in ("int8", "int4"):
        quantize(folder / "bfloat16", folder / mode, mode)
    yield folder
    for file in folder.rglob("*.safetensors"):
        file.unlink()


@pytest.mark.parametrize(
    ("stored", "dtype", "mode"),
    [
        ("bfloat16", "bfloat16", None),
        ("bfloat16", "float32", None),
        ("bfloat16", "float32", "int8"),
        ("bfloat16", "bfloat16", "int4"),
        ("float32", "bfloat16", None),
        ("float32", "float32", "int8"),
        ("int8", "float32", None),
        ("int4", "bfloat16", None),
    ],
)
def test_peak_memory_of_load(checkpoints: Path, stored: str, dtype: str, mode: str | None) -> None:
    command = [sys.executable, "-c", LOAD, str(checkpoints / stored), dtype, str(mode)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, weights = map(int, done.stdout.split())
    assert weights > 2e8
    temporary = 64e6  # copies of one layer
    assert peak < 1.15 * weights + temporary, f"{peak / 1e6:.0f} MB for {weights / 1e6:.0f} MB"
