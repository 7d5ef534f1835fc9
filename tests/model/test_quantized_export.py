"""`quantize`: folders with quantized weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from moondream_cv.cli import app
from moondream_cv.engine.calibration import Calibration, Curve
from moondream_cv.errors import CheckpointError
from moondream_cv.loading import load, quantize
from moondream_cv.model.checkpoints import save_checkpoint
from moondream_cv.model.quantized_linear import Int4Linear, Int8Linear
from tests.helpers.small_checkpoint import byte_tokenizer, small_config, write_small


@pytest.fixture
def full(tmp_path: Path) -> Path:
    network = write_small(tmp_path / "full")
    save_checkpoint(network, small_config(), byte_tokenizer(), tmp_path / "full", dtype=torch.bfloat16)
    return tmp_path / "full"


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_folder_loads_as_the_quantized_model(full: Path, tmp_path: Path, mode: str) -> None:
    calibration = Calibration({"detect": Curve((0.0, 1.0), (0.1, 0.9))})
    calibration.write(full / "calibration.json")
    folder = quantize(full, tmp_path / "quantized", mode)
    written, expected = load(folder, device="cpu"), load(full, device="cpu", quantize=mode)
    assert isinstance(written.network.text.lm_head, Int8Linear if mode == "int8" else Int4Linear)
    assert written.fingerprint() == expected.fingerprint()
    state = written.network.state_dict()
    for name, tensor in expected.network.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert written.calibration == calibration
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "quantized"]


def test_quantized_files_are_small_and_keep_the_data_type_of_other_weights(full: Path, tmp_path: Path) -> None:
    saved = load_file(quantize(full, tmp_path / "int8") / "model.safetensors")
    assert saved["model.text.lm_head.weight"].dtype == torch.int8
    assert saved["model.text.lm_head.weight_scale"].shape == (272,)
    assert saved["model.text.wte"].dtype == saved["model.region.coord_decoder.fc1.weight"].dtype == torch.bfloat16
    packed = load_file(quantize(full, tmp_path / "int4", "int4") / "model.safetensors")
    assert packed["model.text.lm_head.weight.packed"].nbytes == 272 * 64 // 2
    assert packed["model.text.lm_head.weight.scale"].shape == (272, 1)


def test_wrong_arguments_raise(full: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mode must be one of int8, int4, got 'int2'"):
        quantize(full, tmp_path / "new", "int2")
    (tmp_path / "existing").mkdir()
    with pytest.raises(CheckpointError, match="existing already exists; give a new folder"):
        quantize(full, tmp_path / "existing")
    with pytest.raises(CheckpointError, match=r"there is no model '\./missing'"):
        quantize("./missing", tmp_path / "new")
    folder = quantize(full, tmp_path / "int4", "int4")
    with pytest.raises(CheckpointError, match="is already quantized to int4; give a checkpoint in full"):
        quantize(folder, tmp_path / "again")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        quantize(full, tmp_path / "file" / "folder")


def test_quantization_that_fails_leaves_no_folder(full: Path, tmp_path: Path) -> None:
    network = load(full, device="cpu").network
    network.text.lm_head.weight[3, 3] = torch.nan
    save_checkpoint(network, small_config(), None, full)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight contains infinite values or NaN"):
        quantize(full, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_quantization_keeps_other_folders_of_the_user(full: Path, tmp_path: Path) -> None:
    other = tmp_path / "new.part" / "notes.txt"
    other.parent.mkdir()
    other.write_text("keep")
    assert quantize(full, tmp_path / "new").stat().st_mode == other.parent.stat().st_mode
    assert other.read_text() == "keep"
    assert {path.name for path in tmp_path.iterdir()} == {"full", "new", "new.part"}


@pytest.mark.parametrize(
    ("mode", "part"), [("int8", "weight_scale"), ("int4", "weight.scale"), ("int4", "weight.zero_point")]
)
def test_scales_that_are_integers_raise(full: Path, tmp_path: Path, mode: str, part: str) -> None:
    file = quantize(full, tmp_path / "new", mode) / "model.safetensors"
    weights = load_file(file)
    key = f"model.text.lm_head.{part}"
    weights[key] = torch.ones_like(weights[key], dtype=torch.int32)
    save_file(weights, file)
    with pytest.raises(CheckpointError, match=r"lm_head.* must contain floating-point numbers, got torch\.int32"):
        load(tmp_path / "new", device="cpu")


def test_another_mode_than_that_of_the_folder_raises(full: Path, tmp_path: Path) -> None:
    folder = quantize(full, tmp_path / "int8")
    with pytest.raises(ValueError, match="contains int8 weights; quantize must be None or 'int8', got 'int4'"):
        load(folder, device="cpu", quantize="int4")


def test_command_prints_the_folder(full: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["quantize", str(full), str(tmp_path / "int4"), "--mode", "int4"])
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'int4'}\n")
    result = CliRunner().invoke(app, ["quantize", str(full), str(tmp_path / "int8"), "--json"])
    document = json.loads(result.stdout)
    assert (document["mode"], document["path"]) == ("int8", str(tmp_path / "int8"))
    result = CliRunner().invoke(app, ["quantize", str(full), str(tmp_path / "int8")])
    assert result.exit_code == 1
    assert "already exists; give a new folder" in result.stderr


def test_option_quantizes_the_model_of_a_command(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    arguments = [
        "detect",
        str(tmp_path / "image.png"),
        "-c",
        "dog",
        "--model",
        "http://127.0.0.1:9",
        "--quantize",
        "int8",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "--quantize applies to a local model only" in result.stderr
