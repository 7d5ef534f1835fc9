"""Checkpoint files: every layout gives the same weights, and errors name the problem."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moondream_cv.errors import CheckpointError
from moondream_cv.model.checkpoints import load_network, save_checkpoint, stored_shapes
from moondream_cv.model.config import MoondreamConfig
from moondream_cv.model.key_names import parse_key
from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.model.quantized_linear import Int4Linear
from tests.helpers.small_checkpoint import byte_tokenizer, small_config, small_network

State = dict[str, Tensor]
CONFIG = small_config()
OLDER_NAMES = {
    "vision.patch_emb.": "vision_encoder.encoder.model.visual.patch_embed.linear.",
    "vision.pos_emb": "vision_encoder.encoder.model.visual.pos_embed",
    "vision.post_ln.": "vision_encoder.encoder.model.visual.norm.",
    "vision.blocks.": "vision_encoder.encoder.model.visual.blocks.",
    "vision.proj_mlp.": "vision_encoder.projection.mlp.",
    "text.wte": "text_model.transformer.embd.wte.weight",
    "text.blocks.": "text_model.transformer.h.",
    "text.post_ln.": "text_model.lm_head.ln.",
    "text.lm_head.": "text_model.lm_head.linear.",
    "region.coord_encoder.": "region_model.coordinate_encoder.",
    "region.coord_decoder.": "region_model.coordinate_decoder.",
    "region.size_encoder.": "region_model.size_encoder.",
    "region.size_decoder.": "region_model.size_decoder.",
}


@pytest.fixture(scope="module")
def network() -> MoondreamNetwork:
    return small_network(CONFIG)


@pytest.fixture
def state(network: MoondreamNetwork) -> State:
    return {f"model.{k}": v.clone() for k, v in network.state_dict().items()}


def load(source: Path, config: MoondreamConfig = CONFIG, dtype: torch.dtype = torch.float32) -> MoondreamNetwork:
    return load_network(source, config, "cpu", dtype)


def assert_same(loaded: MoondreamNetwork, network: MoondreamNetwork) -> None:
    expected = network.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def older_layout(state: State) -> State:
    """Return weights in the previous key layout, from a compiled model."""
    renamed = {}
    for key, tensor in state.items():
        name = key.removeprefix("model.")
        if name.startswith("vision."):
            name = name.replace(".ln1.", ".norm1.").replace(".ln2.", ".norm2.")
        else:
            name = name.replace(".attn.qkv.", ".mixer.Wqkv.").replace(".attn.proj.", ".mixer.out_proj.")
        if name == "region.coord_features":
            renamed["region_model.coordinate_features.weight"] = tensor.T.contiguous()
        elif name == "region.size_features":
            renamed["region_model.size_features.weight"] = tensor.T.contiguous()
        else:
            new, old = next((n, o) for n, o in OLDER_NAMES.items() if name.startswith(n))
            renamed[(old + name.removeprefix(new)).replace("text_model.", "text_model._orig_mod.")] = tensor
    return renamed


def write_single(folder: Path, state: State) -> None:
    save_file(state, folder / "model.safetensors")


def write_bare_names(folder: Path, state: State) -> None:
    save_file({k.removeprefix("model."): v for k, v in state.items()}, folder / "model.safetensors")


def write_older(folder: Path, state: State) -> None:
    save_file(older_layout(state), folder / "model.safetensors")


def write_shards(folder: Path, state: State) -> None:
    keys = sorted(state)
    halves = {"model-00001-of-00002.safetensors": keys[::2], "model-00002-of-00002.safetensors": keys[1::2]}
    for name, half in halves.items():
        save_file({k: state[k] for k in half}, folder / name)
    index = {"weight_map": {k: name for name, half in halves.items() for k in half}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_shards_without_index(folder: Path, state: State) -> None:
    write_shards(folder, state)
    (folder / "model.safetensors.index.json").unlink()


def write_pt(folder: Path, state: State) -> None:
    torch.save(state, folder / "moondream.pt")


def write_pt_of_before_zip(folder: Path, state: State) -> None:
    torch.save(state, folder / "model.pt", _use_new_zipfile_serialization=False)


def write_wrapped_older_bin(folder: Path, state: State) -> None:
    torch.save({"state_dict": older_layout(state)}, folder / "pytorch_model.bin")


WRITERS = [
    write_single,
    write_bare_names,
    write_older,
    write_shards,
    write_shards_without_index,
    write_pt,
    write_pt_of_before_zip,
    write_wrapped_older_bin,
]


@pytest.mark.parametrize("write", WRITERS, ids=lambda w: w.__name__)
def test_every_layout_gives_the_same_weights(
    tmp_path: Path, state: State, network: MoondreamNetwork, write: Callable[[Path, State], None]
) -> None:
    write(tmp_path, state)
    loaded = load(tmp_path)
    assert_same(loaded, network)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert all(p.is_contiguous() for p in loaded.parameters())


def test_single_file_loads_without_a_folder(tmp_path: Path, state: State, network: MoondreamNetwork) -> None:
    save_file(state, tmp_path / "anything.safetensors")
    assert_same(load(tmp_path / "anything.safetensors"), network)


def test_weights_have_the_requested_dtype_and_are_copies(tmp_path: Path, state: State) -> None:
    write_single(tmp_path, state)
    before = (tmp_path / "model.safetensors").read_bytes()
    loaded = load(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        loaded.text.wte.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_caches_and_tables_in_a_file_are_ignored(tmp_path: Path, state: State, network: MoondreamNetwork) -> None:
    for key in ("text.freqs_cis", "attn_mask", "text.blocks.0.kv_cache.k_cache", "text.blocks.1.kv_cache.v_cache"):
        state[f"model.{key}"] = torch.zeros(4)
    write_single(tmp_path, state)
    assert_same(load(tmp_path), network)


def test_network_computes_all_ignored_tables(network: MoondreamNetwork) -> None:
    # transformers' from_pretrained leaves non-persistent buffers uninitialized.
    assert not list(network.named_buffers())


@pytest.mark.parametrize(
    ("key", "name", "part"),
    [
        ("model.text.blocks.3.attn.qkv.weight", "text.blocks.3.attn.qkv.weight", None),
        ("text_model._orig_mod.transformer.h.3.mixer.out_proj.bias", "text.blocks.3.attn.proj.bias", None),
        ("_orig_mod.model.region.size_features", "region.size_features", None),
        ("vision_encoder.encoder.model.visual.blocks.26.norm2.weight", "vision.blocks.26.ln2.weight", None),
        ("model.text.blocks.0.mlp.fc1.weight.scale", "text.blocks.0.mlp.fc1.weight", "scale"),
        ("optimizer.step", "optimizer.step", None),
    ],
)
def test_parse_key_maps_every_layout(key: str, name: str, part: str | None) -> None:
    parsed = parse_key(key)
    assert parsed is not None
    assert (parsed.name, parsed.part) == (name, part)


def quantize(weight: Tensor) -> State:
    """Return a weight in the published 4-bit layout, with a zero point and a scale per group of 128."""
    groups = weight.reshape(-1, 128)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = (high - low) / 15
    levels = ((groups - low) / scale).round().to(torch.uint8)
    half = len(levels) // 2
    return {"packed": (levels[:half] << 4) | levels[half:], "scale": scale, "zero_point": -low / scale}


def quantized_state(state: State) -> State:
    written = {}
    for key, tensor in state.items():
        if ".text.blocks." in key and key.endswith(".weight") and tensor.ndim == 2:
            written |= {f"{key}.{part}": t.contiguous() for part, t in quantize(tensor).items()}
        else:
            written[key] = tensor
    return written


def dequantized(weight: Tensor) -> Tensor:
    """Return the values of a weight in the published 4-bit layout."""
    parts = quantize(weight)
    levels = torch.cat((parts["packed"] >> 4, parts["packed"] & 15)).float()
    return ((levels - parts["zero_point"]) * parts["scale"]).view(weight.shape)


@pytest.mark.parametrize("dim", [128, 256])
def test_4_bit_weights_keep_their_values(tmp_path: Path, dim: int) -> None:
    values = small_config(dim).to_dict()
    values["text"]["ff_dim"] = 2 * dim
    config = MoondreamConfig.from_dict(values)
    network = small_network(config)
    write_single(tmp_path, quantized_state({f"model.{k}": v for k, v in network.state_dict().items()}))
    loaded = load(tmp_path, config)
    for name, module in network.text.blocks.named_modules():
        if isinstance(module, torch.nn.Linear):
            layer = loaded.text.blocks.get_submodule(name)
            assert isinstance(layer, Int4Linear)
            assert torch.equal(layer.dequantize(torch.float32), dequantized(module.weight)), name
    assert torch.equal(loaded.text.wte, network.text.wte)
    assert torch.equal(loaded.region.coord_decoder.fc1.weight, network.region.coord_decoder.fc1.weight)


def test_4_bit_groups_of_several_rows_are_dequantized(tmp_path: Path, state: State, network: MoondreamNetwork) -> None:
    write_single(tmp_path, quantized_state(state))
    loaded = load(tmp_path).text.blocks[0].mlp.fc1  # 64 inputs, groups of 128 values
    assert isinstance(loaded, torch.nn.Linear)
    assert torch.equal(loaded.weight, dequantized(network.text.blocks[0].mlp.fc1.weight))


def test_4_bit_weight_without_scale_raises(tmp_path: Path, state: State) -> None:
    written = quantized_state(state)
    del written["model.text.blocks.1.mlp.fc2.weight.scale"]
    write_single(tmp_path, written)
    with pytest.raises(CheckpointError, match=r"text\.blocks\.1\.mlp\.fc2\.weight \(its scale is missing\)"):
        load(tmp_path)


def test_4_bit_weight_of_another_size_raises(tmp_path: Path, state: State) -> None:
    written = quantized_state(state)
    written["model.text.blocks.1.mlp.fc2.weight.packed"] = torch.zeros(3, 128, dtype=torch.uint8)
    write_single(tmp_path, written)
    with pytest.raises(CheckpointError, match=r"fc2\.weight \(packed has the shape \[3, 128\]"):
        load(tmp_path)


def test_saved_checkpoint_loads_again(tmp_path: Path, network: MoondreamNetwork) -> None:
    save_checkpoint(network, CONFIG, byte_tokenizer(), tmp_path, max_shard_size=20_000)
    shards = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert all(p.stat().st_size < 80_000 for p in tmp_path.glob("*.safetensors"))
    assert_same(load(tmp_path), network)
    # Saving a smaller checkpoint removes the shards of the larger one.
    save_checkpoint(network, CONFIG, None, tmp_path, dtype=torch.float16)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert all(k.startswith("model.") for k in load_file(tmp_path / "model.safetensors"))
    assert next(iter(load_file(tmp_path / "model.safetensors").values())).dtype == torch.float16
    assert load(tmp_path).text.wte.shape == network.text.wte.shape
    saved = json.loads((tmp_path / "config.json").read_text())
    assert MoondreamConfig.from_dict(saved) == CONFIG
    assert saved["model_type"] == "moondream1"


def test_stored_shapes_reads_no_weights(tmp_path: Path, state: State) -> None:
    write_older(tmp_path, state)
    shapes = stored_shapes(tmp_path)
    assert shapes["region.size_features"] == (2, 6)
    assert shapes["text.wte"] == (272, 64)


def test_all_key_problems_are_in_one_error(tmp_path: Path, state: State) -> None:
    for i in range(6):
        state[f"model.text.blocks.7.strange_{i}"] = torch.zeros(1)
    del state["model.text.wte"]
    state["model.vision.pos_emb"] = torch.zeros(1, 4, 16)
    write_single(tmp_path, state)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "1 key missing: text.wte" in message
    assert "6 keys unexpected: text.blocks.7.strange_0" in message
    assert "and 2 more" in message
    assert "vision.pos_emb ([1, 4, 16] and should be [1, 9, 16])" in message


def test_checkpoint_of_another_depth_raises(tmp_path: Path, state: State) -> None:
    write_single(tmp_path, state)
    with pytest.raises(CheckpointError, match=r"keys missing: text\.blocks\.2\.ln\.weight"):
        load(tmp_path, small_config(layers=3))


def test_weight_in_two_shards_raises(tmp_path: Path, state: State) -> None:
    write_shards_without_index(tmp_path, state)
    second = load_file(tmp_path / "model-00002-of-00002.safetensors")
    key = next(iter(load_file(tmp_path / "model-00001-of-00002.safetensors")))
    save_file(second | {key.removeprefix("model."): state[key]}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"is stored twice: as model\..* in .*00001-of"):
        load(tmp_path)


def test_missing_shard_raises(tmp_path: Path, state: State) -> None:
    write_shards(tmp_path, state)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of its 2 shards: model-00002-of-00002\.safetensors"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model-00003-of-00003.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="several files with weights"):
        load(tmp_path)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": {"a": "../../secret.safetensors"}}'])
def test_broken_index_raises(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        load(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_truncated_files_raise(tmp_path: Path, state: State, name: str, share: float) -> None:
    path = tmp_path / name
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=name):
        load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
@pytest.mark.parametrize("content", [b"\0" * 100, b"<html>not found</html>", bytes(range(256)) * 8, b"PK\x03\x04junk"])
def test_files_of_another_format_raise(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        load(tmp_path)


def test_git_lfs_pointer_raises(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        load(tmp_path)


class _Evil:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return Path.touch, (Path(self.marker),)  # type: ignore[return-value]

    def __init__(self, marker: str) -> None:
        self.marker = marker


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_file_is_not_run(tmp_path: Path, zipped: bool) -> None:
    marker = tmp_path / "executed"
    path = tmp_path / "model.pt"
    torch.save({"a": _Evil(str(marker))}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        load(tmp_path)
    path.write_bytes(pickle.dumps(_Evil(str(marker)), protocol=2))
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        load(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("content", [[1, 2], {}, {"a": 1}, {"state_dict": {"model.text.wte": "x"}}])
def test_pt_files_with_other_content_than_tensors_raise(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        load(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_raise(tmp_path: Path, state: State, bad: float) -> None:
    state["model.text.wte"][100, 3] = bad
    write_single(tmp_path, state)
    with pytest.raises(CheckpointError, match=r"model\.text\.wte contains infinite values or NaN"):
        load(tmp_path)


def test_float16_overflow_of_weights_raises(tmp_path: Path, state: State) -> None:
    state["model.text.wte"][0, 0] = 1e5
    write_single(tmp_path, state)
    load(tmp_path, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match="bfloat16 or float32"):
        load(tmp_path, dtype=torch.float16)


def test_integer_weights_raise(tmp_path: Path, state: State) -> None:
    state["model.text.wte"] = state["model.text.wte"].to(torch.int8)
    write_single(tmp_path, state)
    with pytest.raises(CheckpointError, match=r"model\.text\.wte must contain floating-point numbers, got torch\.int8"):
        load(tmp_path)


def test_folders_without_weights_raise(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is empty"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="contains no weights"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="must end in"):
        load(tmp_path / "config.json")
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"several files with weights: a\.safetensors, b\.safetensors"):
        load(tmp_path)
