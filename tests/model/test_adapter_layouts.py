"""Adapters of fine-tuning and of PEFT: pairs on the output of the attention and in the region heads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from moondream_cv.engine.local_model import LocalModel
from moondream_cv.errors import CheckpointError
from moondream_cv.model.adapters import Adapter, adapter_shapes, load_adapter, save_adapter
from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.requests import Detect, Query, Settings
from moondream_cv.training.lora import LoraParameters
from tests.helpers.models import random_model

FRAME = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model() -> LocalModel:
    return random_model()


def changed_adapter(model: LocalModel) -> Adapter:
    parameters = LoraParameters.initialize(model.config, 8, 0, model.device)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in parameters.tensors.items():
            if name.endswith(".B"):
                tensor.normal_(0, 0.05, generator=generator)
    return parameters.detached("changed", model.dtype)


def outputs(network: MoondreamNetwork, adapter: Adapter | None) -> list[torch.Tensor]:
    """Hidden states and the logits of the region heads for a fixed input."""
    x = torch.randn(2, 6, network.config.text.dim, generator=torch.Generator().manual_seed(3))
    hidden = network.text(x, torch.arange(6)[None].expand(2, -1), adapter=adapter and adapter.layers)
    region = adapter and adapter.region
    return [hidden, network.region.decode_coordinate(hidden, region), network.region.decode_size(hidden, region)]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_pairs_equal_changed_weights(model: LocalModel) -> None:
    """Each pair but that of the published projection equals a change of the weight of its layer."""
    adapter, merged = changed_adapter(model), random_model().network
    pairs = dict(adapter.tensors())
    assert set(pairs) == set(adapter_shapes(model.config, 8))
    for name in pairs:
        if name.endswith(".A"):
            stem = name.removesuffix(".A")
            layer = merged.get_submodule(stem.replace("attn.out", "attn.proj"))
            layer.weight.add_(pairs[f"{stem}.B"] @ pairs[name])  # type: ignore[operator, union-attr]
    assert_close(outputs(model.network, adapter), outputs(merged, None))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ""])
def test_files_keep_the_adapter(model: LocalModel, tmp_path: Path, suffix: str) -> None:
    adapter = changed_adapter(model)
    path = tmp_path / f"adapter{suffix}"
    save_adapter(adapter, path)
    loaded = load_adapter(path, model.config, model.device, model.dtype)
    for (name, tensor), (other, expected) in zip(loaded.tensors(), adapter.tensors(), strict=True):
        assert name == other
        assert torch.equal(tensor, expected)


def test_new_adapter_leaves_every_output_as_it_is(model: LocalModel, tmp_path: Path) -> None:
    parameters = LoraParameters.initialize(model.config, 16, 0, model.device)
    save_file({name: tensor.detach() for name, tensor in parameters.tensors.items()}, tmp_path / "new.safetensors")
    settings = Settings(temperature=0.0, max_tokens=8)
    requests = [Detect(FRAME, "dog", settings), Query(FRAME, "what is this?", settings=settings)]
    adapted = LocalModel(
        model.network,
        model.tokenizer,
        adapter=load_adapter(tmp_path / "new.safetensors", model.config, model.device, model.dtype),
    )
    assert adapted.run(requests) == model.run(requests)


@torch.no_grad()
def test_peft_reads_what_is_exported(model: LocalModel, tmp_path: Path) -> None:
    adapter = changed_adapter(model)
    save_adapter(adapter, tmp_path / "peft")
    wrapped = peft.PeftModel.from_pretrained(random_model().network, str(tmp_path / "peft"))
    assert_close(outputs(wrapped.base_model.model, None), outputs(model.network, adapter))


@torch.no_grad()
@pytest.mark.parametrize("use_rslora", [False, True])
def test_adapters_of_peft_are_read(model: LocalModel, tmp_path: Path, use_rslora: bool) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=32,
        use_rslora=use_rslora,
        init_lora_weights=False,  # random instead of zero
        target_modules=r"text\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc1)",
    )
    wrapped = peft.get_peft_model(random_model().network, config)
    wrapped.save_pretrained(str(tmp_path))
    loaded = load_adapter(tmp_path, model.config, model.device, model.dtype)
    assert_close(outputs(model.network, loaded), outputs(wrapped.base_model.model, None))


@pytest.mark.parametrize("change", [{"use_dora": True}, {"bias": "all"}, {"peft_type": "IA3"}])
def test_other_adapters_of_peft_are_refused(model: LocalModel, tmp_path: Path, change: dict[str, object]) -> None:
    save_adapter(changed_adapter(model), tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match="must describe plain LoRA"):
        load_adapter(path.parent, model.config, model.device, model.dtype)
    path.write_text("{}")
    with pytest.raises(CheckpointError, match="is not a configuration of PEFT"):
        load_adapter(path.parent, model.config, model.device, model.dtype)


def test_published_projection_has_no_place_in_peft(model: LocalModel, tmp_path: Path) -> None:
    dim, layers = model.config.text.dim, range(model.config.text.n_layers)
    pairs = [{"attn": {"proj": (torch.randn(4, dim), torch.randn(dim, 4))}, "mlp": {}} for _ in layers]
    adapter = Adapter("published", pairs)
    with pytest.raises(ValueError, match="acts on the input of the block"):
        save_adapter(adapter, tmp_path / "peft")
    save_adapter(adapter, tmp_path / "a.safetensors")
    assert all("mixer.out_proj" in name for name in load_file(tmp_path / "a.safetensors"))


def test_pair_that_is_missing_in_the_region_heads_is_named(model: LocalModel, tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in changed_adapter(model).tensors()}
    del tensors["region.size_decoder.fc2.B"]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"1 keys missing: region\.size_decoder\.fc2\.B"):
        load_adapter(tmp_path / "a.safetensors", model.config, model.device, model.dtype)


def test_folder_that_is_no_adapter_is_named(model: LocalModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a folder without adapter_config\.json"):
        load_adapter(str(tmp_path), model.config, model.device, model.dtype)


def test_unknown_checkpoint_of_a_finetune_is_named(
    model: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOONDREAM_CV_FINETUNES", str(tmp_path))
    name = "0" * 25 + "A"
    with pytest.raises(CheckpointError, match="there is no finetune"):
        load_adapter(f"moondream2/{name}@3", model.config, model.device, model.dtype)
    folder = tmp_path / name / "checkpoints"
    folder.mkdir(parents=True)
    save_file(dict(changed_adapter(model).tensors()), folder / "12.safetensors")
    with pytest.raises(CheckpointError, match=r"has no saved checkpoint of step 3; saved steps: \[12\]"):
        load_adapter(f"{name}@3", model.config, model.device, model.dtype)
    with pytest.raises(CheckpointError, match=rf"is a finetune; give {name}@STEP .* steps: \[12\]"):
        load_adapter(name, model.config, model.device, model.dtype)
    for known in (f"{name}@12", f"moondream2/{name}@12", f"moondream3-preview/{name}@12"):
        assert load_adapter(known, model.config, model.device, model.dtype).region


def test_adapters_that_were_not_used_for_longest_are_freed(model: LocalModel, tmp_path: Path) -> None:
    model.add_adapter(changed_adapter(model))  # has no file, so it stays
    names = [str(tmp_path / f"{i}.safetensors") for i in range(20)]
    for name in names:
        save_adapter(changed_adapter(model), name)
        assert model.get_adapter(name) is not None
        assert model.get_adapter(names[0]) is model.get_adapter(names[0])
    assert set(model._adapters) == {"changed", names[0], *names[-15:]}
    fingerprint = model.fingerprint(names[1])  # loads it again
    assert fingerprint == model.fingerprint(names[2]) != model.fingerprint()
