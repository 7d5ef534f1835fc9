"""Adapters (LoRA): read published files as low-rank pairs per layer, and write them.

`variants.py` resolves the IDs of published variants to files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from moondream_cv.errors import CheckpointError
from moondream_cv.model.config import MoondreamConfig
from moondream_cv.model.layers import LoraPair
from moondream_cv.model.tensor_files import open_tensor_file, some
from moondream_cv.model.text import LayerLora
from moondream_cv.model.variants import fetch_variant

PROJECTIONS = (("attn", "qkv"), ("attn", "proj"), ("mlp", "fc1"), ("mlp", "fc2"))
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
_KEY = re.compile(r"text\.blocks\.(\d+)\.(attn|mlp)\.(qkv|proj|fc1|fc2)\.([AB])$")

_Slot = tuple[int, str, str, str]  # layer, "attn" or "mlp", projection, "A" or "B"


@dataclass(frozen=True)
class Adapter:
    """Low-rank updates of the text decoder.

    Attributes:
        name: File or ID that the adapter was loaded from.
        layers: For each layer {"attn": {"qkv", "proj"}, "mlp": {"fc1", "fc2"}} → (A [rank, in], B [out, rank]).
    """

    name: str
    layers: list[LayerLora]


def load_adapter(
    source: str | Path, config: MoondreamConfig, device: torch.device | str, dtype: torch.dtype
) -> Adapter:
    """Load an adapter.

    Args:
        source: A `.pt` or `.safetensors` file, or an ID.
        config: Configuration of the checkpoint to apply the adapter to.
        device: Device for its tensors.
        dtype: Data type for its tensors.

    Raises:
        CheckpointError: The adapter is missing or damaged, does not fit the checkpoint (the message names the keys), or
            cannot be fetched.
    """
    path = find_adapter(source)
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
    tensors = {slot: file.read(key).to(device, dtype, copy=True) for slot, key in slots.items()}
    layers = [_layer(tensors, i) for i in range(config.text.n_layers)]
    return Adapter(str(source), layers)


def find_adapter(source: str | Path) -> Path:
    """Return the file of an adapter; an ID is fetched if it is not cached.

    Args:
        source: A file or an ID.

    Raises:
        CheckpointError: The file does not exist, or the ID cannot be fetched.
    """
    try:
        path = Path(source).expanduser()
        if path.is_file():
            return path
        is_folder = path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long, unknown user, ...
        raise CheckpointError(f"the adapter {str(source)[:200]!r} is not a valid path: {error}") from error
    if isinstance(source, Path) or path.suffix in _SUFFIXES or len(path.parts) != 1 or is_folder:
        problem = "is a folder" if is_folder else "does not exist"
        raise CheckpointError(f"the adapter {str(source)!r} {problem}; give a .pt or .safetensors file, or an ID")
    return fetch_variant(source)


def save_adapter(adapter: Adapter, path: str | Path) -> None:
    """Write an adapter with the published key names.

    Args:
        adapter: Adapter to write.
        path: File that ends in `.pt` or `.safetensors`.

    Raises:
        ValueError: The file has another suffix.
    """
    path = Path(path)
    if path.suffix not in (".pt", ".safetensors"):
        raise ValueError(f"the file of an adapter must end in .pt or .safetensors, got {path.name!r}")
    tensors = dict(_named(adapter.layers))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    if path.suffix == ".pt":
        torch.save(tensors, part)
    else:
        save_file(tensors, part, metadata={"format": "pt"})
    os.replace(part, path)


def _named(layers: Sequence[LayerLora]) -> Iterator[tuple[str, Tensor]]:
    for i, layer in enumerate(layers):
        for block, projections in layer.items():
            for projection, pair in projections.items():
                stem = f"text_model.transformer.h.{i}.{_PUBLISHED[block, projection]}.parametrizations.weight.0"
                for side, tensor in zip("AB", pair, strict=True):
                    yield f"{stem}.{side}", tensor.detach().cpu().contiguous()


def _slot(key: str) -> _Slot | None:
    name = key.replace("._orig_mod", "").removeprefix("model.")
    for old, new in _RENAMED:
        name = name.replace(old, new)
    match = _KEY.match(name)
    if match is None or (match[2], match[3]) not in PROJECTIONS:
        return None
    return int(match[1]), match[2], match[3], match[4]


def _verify(path: Path, shapes: Mapping[_Slot, tuple[int, ...]], config: MoondreamConfig) -> None:
    """Check that each projection is adapted in all layers or in none, by a pair of the right shapes."""
    if not shapes:
        raise CheckpointError(f"{path} contains no tensors")
    adapted = {slot[1:3] for slot in shapes}
    missing, wrong = [], []
    for projection in PROJECTIONS:
        size_in, size_out = _sizes(config, projection)
        for i in range(config.text.n_layers if projection in adapted else 0):
            stem = f"text.blocks.{i}.{'.'.join(projection)}"
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
    text = config.text
    return {
        ("attn", "qkv"): (text.dim, (text.n_heads + 2 * text.n_kv_heads) * text.head_dim),
        ("attn", "proj"): (text.dim, text.dim),
        ("mlp", "fc1"): (text.dim, text.ff_dim),
        ("mlp", "fc2"): (text.ff_dim, text.dim),
    }[projection]


def _layer(tensors: Mapping[_Slot, Tensor], layer: int) -> LayerLora:
    found: dict[str, dict[str, LoraPair]] = {"attn": {}, "mlp": {}}
    for block, projection in PROJECTIONS:
        if (layer, block, projection, "A") in tensors:
            found[block][projection] = (
                tensors[layer, block, projection, "A"],
                tensors[layer, block, projection, "B"],
            )
    return found
