"""`merge` and `export_peft`: adapters in the weights of their model, and in PEFT's layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from moondream_cv import load
from moondream_cv.engine.local_model import LocalModel
from moondream_cv.engine.prompts import write_prompt
from moondream_cv.errors import CheckpointError
from moondream_cv.finetune.merge import base_model, export_peft, merge
from moondream_cv.loading import quantize
from moondream_cv.model.adapters import Adapter, save_adapter
from moondream_cv.model.checkpoints import save_checkpoint
from moondream_cv.requests import Detect, Settings
from moondream_cv.scenes import render_scene
from moondream_cv.training.fine_tuner import FineTuner
from moondream_cv.training.lora import LoraParameters
from moondream_cv.training.trajectories import region_trajectory


@pytest.fixture(scope="module")
def tiny() -> LocalModel:
    return load("tiny", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def base(tiny: LocalModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the tiny model with float32 weights."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    save_checkpoint(tiny.network, tiny.config, tiny.tokenizer, folder, dtype=torch.float32)
    assert tiny.calibration is not None
    tiny.calibration.write(folder / "calibration.json")
    return folder


@pytest.fixture(scope="module")
def parameters(tiny: LocalModel) -> LoraParameters:
    """Return an adapter that changes all layers."""
    parameters = LoraParameters.initialize(tiny.config, 8, 0, tiny.device)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in parameters.tensors.items():
            if name.endswith(".B"):
                tensor.normal_(0, 0.02, generator=generator)
    return parameters


@pytest.fixture(scope="module")
def adapter_file(tiny: LocalModel, parameters: LoraParameters, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter") / "random.safetensors"
    save_adapter(parameters.detached("random", torch.float32), path)
    return path


def log_probs(model: LocalModel, parameters: LoraParameters) -> torch.Tensor:
    """Return the log-probabilities of the choices of one detection."""
    image = Image.fromarray(render_scene(3, names=["dog", "red circle"]).image)
    prompt = write_prompt(Detect(image, "dog"), model.tokenizer, model.config.tokenizer)
    trajectory = region_trajectory(prompt, [(200, 300, 500, 400), (700, 600, 450, 350)], True, model.config)
    tuner = FineTuner(model.network, parameters)
    return torch.tensor(tuner.log_probs(model.encode_image(image).embedding, [trajectory], 1.0)[0])


def test_merged_model_computes_the_outputs_of_the_adapter(
    tiny: LocalModel, base: Path, parameters: LoraParameters, adapter_file: Path, tmp_path: Path
) -> None:
    merged = load(merge(adapter_file, tmp_path / "merged", base), device="cpu", dtype="float32")
    untouched = LoraParameters.initialize(tiny.config, 8, 0, tiny.device)
    expected = log_probs(tiny, parameters)
    assert (log_probs(merged, untouched) - expected).abs().max() < 1e-4
    assert (log_probs(tiny, untouched) - expected).abs().max() > 0.1

    image = Image.fromarray(render_scene(4, names=["dog", "cat"]).image)
    (with_adapter,) = tiny.run([Detect(image, "dog", Settings(variant=str(adapter_file)))])
    (without,) = merged.run([Detect(image, "dog")])
    boxes = [[(o.x_min, o.y_min, o.x_max, o.y_max) for o in result.objects] for result in (with_adapter, without)]
    assert boxes[0] == boxes[1] != []
    scores = [[o.confidence for o in result.objects] for result in (with_adapter, without)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_merged_folder_keeps_the_other_weights_and_files(base: Path, adapter_file: Path, tmp_path: Path) -> None:
    folder = merge(adapter_file, tmp_path / "merged", base)
    before, after = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    projections = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    expected = {f"model.text.blocks.{i}.{name}.weight" for i in range(4) for name in projections}
    expected |= {f"model.region.{head}_decoder.{fc}.weight" for head in ("coord", "size") for fc in ("fc1", "fc2")}
    assert changed == expected
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_merge_keeps_the_data_type_of_the_weights(tiny: LocalModel, adapter_file: Path, tmp_path: Path) -> None:
    save_checkpoint(tiny.network, tiny.config, tiny.tokenizer, tmp_path / "half", dtype=torch.bfloat16)
    weights = load_file(merge(adapter_file, tmp_path / "merged", tmp_path / "half") / "model.safetensors")
    assert weights["model.text.blocks.0.attn.qkv.weight"].dtype == torch.bfloat16


def test_merge_refuses_pairs_on_the_input_of_the_block(tiny: LocalModel, base: Path, tmp_path: Path) -> None:
    pair = torch.ones(8, tiny.config.text.dim), torch.ones(tiny.config.text.dim, 8)
    layers = [{"attn": {"proj": pair}, "mlp": {}} for _ in range(tiny.config.text.n_layers)]
    save_adapter(Adapter("published", layers), tmp_path / "published.pt")
    with pytest.raises(CheckpointError, match="no weight has the same effect; load it with adapter="):
        merge(tmp_path / "published.pt", tmp_path / "merged", base)
    assert not (tmp_path / "merged").exists()


def test_merge_refuses_quantized_checkpoints(base: Path, adapter_file: Path, tmp_path: Path) -> None:
    quantized = quantize(base, tmp_path / "int8")
    with pytest.raises(CheckpointError, match=r"is quantized to int8.*merge into a checkpoint in full precision"):
        merge(adapter_file, tmp_path / "merged", quantized)


def test_merge_refuses_existing_folders_and_missing_adapters(base: Path, adapter_file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="already exists; give a new folder"):
        merge(adapter_file, tmp_path, base)
    with pytest.raises(CheckpointError, match=r"missing\.pt' does not exist"):
        merge(tmp_path / "missing.pt", tmp_path / "merged", base)
    with pytest.raises(CheckpointError, match="there is no model"):
        merge(adapter_file, tmp_path / "merged", tmp_path / "no-model")


def test_peft_folder_loads_as_the_adapter(
    tiny: LocalModel, base: Path, parameters: LoraParameters, adapter_file: Path, tmp_path: Path
) -> None:
    folder = export_peft(adapter_file, tmp_path / "peft", base)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    loaded = load("tiny", device="cpu", dtype="float32", adapter=folder)
    assert loaded.adapter is not None
    tensors = dict(loaded.adapter.tensors())
    assert tensors.keys() == parameters.tensors.keys()
    assert all(torch.equal(tensor, parameters.tensors[name]) for name, tensor in tensors.items())
    with pytest.raises(CheckpointError, match="already exists"):
        export_peft(adapter_file, folder, base)
    with pytest.raises(ValueError, match=r"must have no suffix, got 'peft\.pt'"):
        export_peft(adapter_file, tmp_path / "peft.pt", base)


def test_checkpoint_of_a_finetune_names_its_base_model(base: Path, adapter_file: Path, tmp_path: Path) -> None:
    assert base_model(adapter_file) == "moondream2"
    tensors = load_file(adapter_file)
    save_file(tensors, tmp_path / "named.safetensors", metadata={"base_model": str(base)})
    assert base_model(tmp_path / "named.safetensors") == str(base)
    assert merge(tmp_path / "named.safetensors", tmp_path / "merged").is_dir()
    (tmp_path / "damaged.safetensors").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=r"damaged\.safetensors is damaged"):
        merge(tmp_path / "damaged.safetensors", tmp_path / "other")
