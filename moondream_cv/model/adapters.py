"""Adapters (LoRA): read files as low-rank pairs per layer, and write them.

There are three layouts:

- published: pairs of the text decoder only; that of the attention's projection acts on the input of the block;
- this package: the names of the network's layers, also of the region heads. The pair `attn.out` acts on the output of
  the attention, `attn.proj` on the input of the block;
- PEFT: a folder with `adapter_config.json`. The pair of the attention's projection acts on the output of the attention.

`variants.py` resolves the IDs of published variants and of local finetunes to files.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moondream_cv.errors import CheckpointError
from moondream_cv.model.config import MoondreamConfig
from moondream_cv.model.layers import LoraPair
from moondream_cv.model.region import RegionLora
from moondream_cv.model.tensor_files import open_tensor_file, some
from moondream_cv.model.text import LayerLora
from moondream_cv.model.variants import fetch_variant, finetune_checkpoint

PROJECTIONS = (("attn", "qkv"), ("attn", "proj"), ("attn", "out"), ("mlp", "fc1"), ("mlp", "fc2"))
REGION_PROJECTIONS = tuple((head, layer) for head in ("coord_decoder", "size_decoder") for layer in ("fc1", "fc2"))
TRAINED_PROJECTIONS = tuple(one for one in PROJECTIONS if one != ("attn", "proj"))
_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
_RENAMED = (
    ("text_model.transformer.h.", "text.blocks."),
    (".mixer.", ".attn."),
    (".Wqkv.", ".qkv."),
    (".out_proj.", ".proj."),
    (".parametrizations.weight.0.", "."),
)
_PUBLISHED = {
    ("attn", "qkv"): "mixer.Wqkv",
    ("attn", "proj"): "mixer.out_proj",
    ("mlp", "fc1"): "mlp.fc1",
    ("mlp", "fc2"): "mlp.fc2",
}
_KEY = re.compile(r"(?:text\.blocks\.(\d+)|region)\.(\w+)\.(\w+)\.([AB])$")
_PEFT_CONFIG, _PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."
_REGION = -1  # number of the region heads in place of a layer

_Slot = tuple[int, str, str, str]  # layer, block or head, projection, "A" or "B"


@dataclass(frozen=True)
class Adapter:
    """Low-rank updates of the text decoder and the region heads.

    Attributes:
        name: File or ID that the adapter was loaded from.
        layers: Pairs (A [rank, in], B [out, rank]) of each layer of the text decoder.
        region: Pairs of the region heads.
    """

    name: str
    layers: Sequence[LayerLora]
    region: RegionLora = field(default_factory=dict)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the tensor of each side of each pair."""
        for i, layer in enumerate(self.layers):
            yield from _named(f"text.blocks.{i}", layer)
        yield from _named("region", self.region)

    @property
    def is_empty(self) -> bool:
        """Whether there are no pairs, so that the adapter changes nothing."""
        return next(self.tensors(), None) is None

    def without_zeros(self) -> Adapter:
        """Return the adapter without pairs that change nothing, so that a new adapter costs no time and no rounding."""
        layers = [_without_zeros(layer) for layer in self.layers]
        return Adapter(self.name, layers, _without_zeros(self.region))


def load_adapter(
    source: str | Path, config: MoondreamConfig, device: torch.device | str, dtype: torch.dtype
) -> Adapter:
    """Load an adapter.

    Args:
        source: A `.pt` or `.safetensors` file, a folder in PEFT's layout, the ID of a published variant, or
            "ID@STEP" of a local finetune.
        config: Configuration of the checkpoint to apply the adapter to.
        device: Device for its tensors.
        dtype: Data type for its tensors.

    Raises:
        CheckpointError: The adapter is missing or damaged, does not fit the checkpoint (the message names the keys), or
            cannot be fetched.
    """
    path = find_adapter(source)
    scale = 1.0
    if path.is_dir():
        scale, path = _peft_scale(path), path / _PEFT_WEIGHTS
    file = open_tensor_file(path)
    slots: dict[_Slot, str] = {}
    unexpected = []
    for key in file.shapes:
        slot = _slot(key)
        if slot is None or slot[0] >= config.text.n_layers:
            unexpected.append(key)
        elif slot in slots:
            raise CheckpointError(f"{path}: {slots[slot]} and {key} are the same tensor")
        else:
            slots[slot] = key
    if unexpected:
        raise CheckpointError(
            f"{path} is not an adapter for a model with {config.text.n_layers} layers; "
            f"{len(unexpected)} unexpected keys: {some(unexpected)}"
        )
    _verify(path, {slot: file.shapes[key] for slot, key in slots.items()}, config)
    tensors = {}
    for slot, key in slots.items():
        tensor = file.read(key)
        scaled = tensor.float() * scale if slot[3] == "B" and scale != 1.0 else tensor
        tensors[slot] = scaled.to(device, dtype, copy=True)
    return _adapter(str(source), tensors, config).without_zeros()


def find_adapter(source: str | Path) -> Path:
    """Return the file of an adapter, or its folder in PEFT's layout; a published ID is fetched if it is not cached.

    Args:
        source: A file, a folder or an ID.

    Raises:
        CheckpointError: The file does not exist, or the ID cannot be fetched.
    """
    try:
        path = Path(source).expanduser()
        if path.is_file() or (path / _PEFT_CONFIG).is_file():
            return path
        is_folder = path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long, unknown user, ...
        raise CheckpointError(f"the adapter {str(source)[:200]!r} is not a valid path: {error}") from error
    if not isinstance(source, Path) and (finetuned := finetune_checkpoint(source)) is not None:
        return finetuned
    if isinstance(source, Path) or path.suffix in _SUFFIXES or len(path.parts) != 1 or is_folder:
        problem = f"is a folder without {_PEFT_CONFIG}" if is_folder else "does not exist"
        raise CheckpointError(
            f"the adapter {str(source)!r} {problem}; give a .pt or .safetensors file, a folder in PEFT's layout, or an "
            "ID"
        )
    return fetch_variant(source)


def save_adapter(adapter: Adapter, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write an adapter, with the published key names if its pairs allow it.

    Args:
        adapter: Adapter to write.
        path: File that ends in `.pt` or `.safetensors`, or a folder, which is written in PEFT's layout.
        metadata: Further metadata of a `.safetensors` file.

    Raises:
        ValueError: The file has another suffix, or PEFT's layout cannot represent the adapter.
    """
    path = Path(path)
    if not path.suffix:
        _save_peft(adapter, path)
        return
    if path.suffix not in (".pt", ".safetensors"):
        raise ValueError(f"the file of an adapter must end in .pt or .safetensors, got {path.name!r}")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.tensors()}
    if all(_published_name(name) is not None for name in tensors):
        tensors = {_published_name(name) or name: tensor for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    if path.suffix == ".pt":
        torch.save(tensors, part)
    else:
        save_file(tensors, part, metadata={"format": "pt", **(metadata or {})})
    os.replace(part, path)


def adapter_shapes(config: MoondreamConfig, rank: int) -> dict[str, tuple[int, int]]:
    """Return the names and shapes of the tensors that fine-tuning trains.

    Args:
        config: Configuration of the checkpoint.
        rank: Rank of all pairs.
    """
    stems = [(f"text.blocks.{i}", one) for i in range(config.text.n_layers) for one in TRAINED_PROJECTIONS]
    stems += [("region", one) for one in REGION_PROJECTIONS]
    shapes = {}
    for stem, projection in stems:
        size_in, size_out = _sizes(config, projection)
        shapes[f"{stem}.{'.'.join(projection)}.A"] = (rank, size_in)
        shapes[f"{stem}.{'.'.join(projection)}.B"] = (size_out, rank)
    return shapes


def adapter_from_tensors(name: str, tensors: Mapping[str, Tensor], config: MoondreamConfig) -> Adapter:
    """Return an adapter that uses named tensors.

    Args:
        name: Name of the adapter.
        tensors: Tensors by name, as `adapter_shapes` and `Adapter.tensors` name them.
        config: Configuration of the checkpoint.

    Raises:
        ValueError: A name is unknown.
    """
    slots = {}
    for key, tensor in tensors.items():
        slot = _slot(key)
        if slot is None:
            raise ValueError(f"{key!r} is not the name of a tensor of an adapter")
        slots[slot] = tensor
    return _adapter(name, slots, config)


def _without_zeros(pairs: Mapping[str, Mapping[str, LoraPair]]) -> dict[str, dict[str, LoraPair]]:
    return {
        block: {name: pair for name, pair in projections.items() if pair[1].any()}
        for block, projections in pairs.items()
    }


def _named(stem: str, pairs: Mapping[str, Mapping[str, LoraPair]]) -> Iterator[tuple[str, Tensor]]:
    for block, projections in pairs.items():
        for projection, pair in projections.items():
            for side, tensor in zip("AB", pair, strict=True):
                yield f"{stem}.{block}.{projection}.{side}", tensor


def _published_name(name: str) -> str | None:
    """Return the published name of a tensor; None if the published layout has no such tensor."""
    slot = _slot(name)
    if slot is None or slot[1:3] not in _PUBLISHED:
        return None
    layer, block, projection, side = slot
    return f"text_model.transformer.h.{layer}.{_PUBLISHED[block, projection]}.parametrizations.weight.0.{side}"


def _slot(key: str) -> _Slot | None:
    """Return the pair and the side that a key of any layout refers to; None if it refers to none."""
    name = key.replace("._orig_mod", "")
    if name.startswith(_PEFT_PREFIX):
        name = name.removeprefix(_PEFT_PREFIX).replace(".attn.proj.", ".attn.out.")
        name = name.replace(".lora_A.weight", ".A").replace(".lora_B.weight", ".B")
    name = name.removeprefix("model.")
    for old, new in _RENAMED:
        name = name.replace(old, new)
    match = _KEY.match(name)
    if match is None or (match[2], match[3]) not in (REGION_PROJECTIONS if match[1] is None else PROJECTIONS):
        return None
    return _REGION if match[1] is None else int(match[1]), match[2], match[3], match[4]


def _verify(path: Path, shapes: Mapping[_Slot, tuple[int, ...]], config: MoondreamConfig) -> None:
    """Check that each projection is adapted in all layers or in none, by a pair of the right shapes."""
    if not shapes:
        raise CheckpointError(f"{path} contains no tensors")
    adapted = {slot[1:3] for slot in shapes}
    missing, wrong = [], []
    for projection in (*PROJECTIONS, *REGION_PROJECTIONS):
        size_in, size_out = _sizes(config, projection)
        layers = [_REGION] if projection in REGION_PROJECTIONS else range(config.text.n_layers)
        for i in layers if projection in adapted else ():
            stem = f"{'region' if i == _REGION else f'text.blocks.{i}'}.{'.'.join(projection)}"
            pair = [shapes.get((i, *projection, side)) for side in "AB"]
            missing += [f"{stem}.{side}" for side, shape in zip("AB", pair, strict=True) if shape is None]
            if None in pair:
                continue
            rank = pair[0][0] if pair[0] else 0
            if rank < 1 or pair != [(rank, size_in), (size_out, rank)]:
                a, b = (list(shape or ()) for shape in pair)
                wrong.append(f"{stem} (A {a}, B {b}; should be [rank, {size_in}] and [{size_out}, rank])")
    problems = [
        f"{len(names)} keys {what}: {some(names)}"
        for what, names in (("missing", missing), ("with a wrong shape", wrong))
        if names
    ]
    if problems:
        raise CheckpointError(f"{path} does not fit the checkpoint: {'; '.join(problems)}")


def _sizes(config: MoondreamConfig, projection: tuple[str, str]) -> tuple[int, int]:
    """Return the (in, out) dimensions of a projection."""
    text, region = config.text, config.region
    return {
        ("attn", "qkv"): (text.dim, (text.n_heads + 2 * text.n_kv_heads) * text.head_dim),
        ("attn", "proj"): (text.dim, text.dim),
        ("attn", "out"): (text.dim, text.dim),
        ("mlp", "fc1"): (text.dim, text.ff_dim),
        ("mlp", "fc2"): (text.ff_dim, text.dim),
        ("coord_decoder", "fc1"): (region.dim, region.inner_dim),
        ("coord_decoder", "fc2"): (region.inner_dim, region.coord_out_dim),
        ("size_decoder", "fc1"): (region.dim, region.inner_dim),
        ("size_decoder", "fc2"): (region.inner_dim, region.size_out_dim),
    }[projection]


def _adapter(name: str, tensors: Mapping[_Slot, Tensor], config: MoondreamConfig) -> Adapter:
    layers = [_pairs(tensors, i, PROJECTIONS, ("attn", "mlp")) for i in range(config.text.n_layers)]
    return Adapter(name, layers, _pairs(tensors, _REGION, REGION_PROJECTIONS))


def _pairs(
    tensors: Mapping[_Slot, Tensor], layer: int, projections: Sequence[tuple[str, str]], blocks: Sequence[str] = ()
) -> dict[str, dict[str, LoraPair]]:
    found: dict[str, dict[str, LoraPair]] = {block: {} for block in blocks}
    for block, projection in projections:
        if (layer, block, projection, "A") in tensors:
            pair = tensors[layer, block, projection, "A"], tensors[layer, block, projection, "B"]
            found.setdefault(block, {})[projection] = pair
    return found


# --- PEFT -------------------------------------------------------------------------------------------------------------


def _peft_scale(folder: Path) -> float:
    """Return the factor of B A in a folder in PEFT's layout.

    Raises:
        CheckpointError: The configuration is damaged, or has options that change more than the linear layers.
    """
    path = folder / _PEFT_CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha = int(config["r"]), float(config.get("lora_alpha") or config["r"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a configuration of PEFT ({error!r})") from error
    options = "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"
    unsupported = [name for name in options if config.get(name)]
    if config.get("peft_type", "LORA") != "LORA" or unsupported or config.get("bias", "none") != "none":
        raise CheckpointError(
            f"{path} must describe plain LoRA, got peft_type {config.get('peft_type')!r}, bias {config.get('bias')!r} "
            f"and {', '.join(unsupported) or 'no other options'}; merge or convert the adapter with PEFT"
        )
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _save_peft(adapter: Adapter, folder: Path) -> None:
    """Write a folder in PEFT's layout."""
    tensors, targets, ranks = {}, set(), set()
    for name, tensor in adapter.tensors():
        if ".attn.proj." in name:
            raise ValueError(
                "PEFT's layout has no pair that acts on the input of the block, as attn.proj of the published layout "
                "does; save a .pt or .safetensors file"
            )
        stem, side = name.replace(".attn.out.", ".attn.proj.").rsplit(".", 1)
        tensors[f"{_PEFT_PREFIX}{stem}.lora_{side}.weight"] = tensor.detach().cpu().contiguous()
        targets.add(stem)
        ranks.add(min(tensor.shape))
    if len(ranks) != 1:
        raise ValueError(f"PEFT's layout needs pairs of one rank, got ranks {sorted(ranks)}")
    (rank,) = ranks
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(targets),
        "base_model_name_or_path": None,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / _PEFT_WEIGHTS, metadata={"format": "pt"})
    (folder / _PEFT_CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
