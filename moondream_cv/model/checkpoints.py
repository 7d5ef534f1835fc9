"""Checkpoints: published weights → a network on its device, every key accounted for; and a network → a folder.

Names are the business of `key_names.py`, file formats of `tensor_files.py`. Where a checkpoint comes from is decided in
`loading.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from moondream_cv.errors import CheckpointError
from moondream_cv.model.config import MoondreamConfig
from moondream_cv.model.key_names import PACKED_PARTS, StoredKey, parse_key
from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.model.quantized import dequantize, packed_problem
from moondream_cv.model.tensor_files import TensorFile, find_tensor_files, open_tensor_file, some

MODEL_TYPE = "moondream1"  # what published config files call every Moondream 2
MAX_SHARD_SIZE = 5 * 10**9  # bytes


@dataclass
class _Stored:
    """One weight as files hold it: its parts (just "" for a plain weight), where each stands."""

    transposed: bool = False
    parts: dict[str, tuple[TensorFile, str]] = field(default_factory=dict)

    def shape(self, part: str = "") -> tuple[int, ...]:
        file, key = self.parts[part]
        shape = file.shapes[key]
        return shape[::-1] if self.transposed else shape

    def read(self, part: str = "") -> Tensor:
        file, key = self.parts[part]
        tensor = file.read(key)
        return tensor.T if self.transposed else tensor


def load_network(
    source: Path, config: MoondreamConfig, device: torch.device | str, dtype: torch.dtype
) -> MoondreamNetwork:
    """Load a checkpoint.

    Each tensor goes from the mapped file to the target device and dtype by itself, so memory never holds the weights
    twice. 4-bit weights become full ones.

    Args:
        source: A file, or a folder with `model.safetensors`, shards and their index, or a `.pt` file.
        config: The sizes to expect.
        device: Where the weights go.
        dtype: What they become.

    Returns:
        The network in evaluation mode; its weights take no gradients.

    Raises:
        CheckpointError: Files are missing or damaged, or a weight is missing, unexpected, of a wrong shape or not
            finite; the message names files and keys.
    """
    stored = _stored_weights(_open_files(Path(source)))
    with torch.device("meta"):
        network = MoondreamNetwork(config)
    expected = _expected_shapes(config)
    _verify(Path(source), stored, expected)
    state = {name: _weight(stored[name], expected[name], device, dtype) for name in expected}
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def stored_shapes(source: Path | Iterable[TensorFile]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a checkpoint's plain weights by their names in the network, without reading the weights.

    Args:
        source: A file or folder, or open files.

    Raises:
        CheckpointError: Files are missing or damaged.
    """
    files = _open_files(source) if isinstance(source, Path) else source
    return {name: weight.shape() for name, weight in _stored_weights(files).items() if "" in weight.parts}


def check_shapes(where: Path | str, files: Iterable[TensorFile], config: MoondreamConfig) -> None:
    """Check that files hold exactly the weights of a network, without reading the weights.

    Args:
        where: The name of the checkpoint in errors.
        files: All of its files.
        config: The sizes to expect.

    Raises:
        CheckpointError: A weight is missing, unexpected or of a wrong shape.
    """
    _verify(where, _stored_weights(files), _expected_shapes(config))


def save_checkpoint(
    network: MoondreamNetwork,
    config: MoondreamConfig,
    tokenizer: Tokenizer | None,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """Write a folder that `load` and, after `moondream_cv.hf.register()`, transformers read.

    Files are complete before they take the place of older ones.

    Args:
        tokenizer: None leaves a `tokenizer.json` that is there as it is.
        dtype: What the weights become; None: as they are.
        max_shard_size: Bytes of a file; a checkpoint that is larger is written as shards with an index.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
    shards = _split(state, dtype, max_shard_size)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, keys in zip(names, shards, strict=True):
        tensors = {key: state[key].detach().to("cpu", dtype or state[key].dtype).contiguous() for key in keys}
        part = folder / f"{name}.part"
        save_file(tensors, part, metadata={"format": "pt"})
        os.replace(part, folder / name)
    index = folder / "model.safetensors.index.json"
    if len(shards) > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        total = sum(_nbytes(tensor, dtype) for tensor in state.values())
        _write_text(index, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1))
    else:
        index.unlink(missing_ok=True)
    for stale in (*folder.glob("model-*-of-*.safetensors"), folder / "model.safetensors"):
        if stale.name not in names:
            stale.unlink(missing_ok=True)
    _write_text(folder / "config.json", json.dumps(config_json(config, dtype or network.dtype), indent=1))
    if tokenizer is not None:
        _write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))


def config_json(config: MoondreamConfig, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """What a `config.json` says: the sections of the config, and what transformers finds the implementation by."""
    head: dict[str, Any] = {"model_type": MODEL_TYPE, "architectures": ["MoondreamForCausalLM"]}
    if dtype is not None:
        head["torch_dtype"] = str(dtype).removeprefix("torch.")
    return head | config.to_dict()


def _expected_shapes(config: MoondreamConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in MoondreamNetwork(config).state_dict().items()}


def _open_files(source: Path) -> list[TensorFile]:
    return [open_tensor_file(path) for path in find_tensor_files(source)]


def _stored_weights(files: Iterable[TensorFile]) -> dict[str, _Stored]:
    weights: dict[str, _Stored] = {}
    for file in files:
        for key in file.shapes:
            parsed = parse_key(key)
            if parsed is not None:
                _add(weights, parsed, file, key)
    return weights


def _add(weights: dict[str, _Stored], parsed: StoredKey, file: TensorFile, key: str) -> None:
    weight = weights.setdefault(parsed.name, _Stored(parsed.transposed))
    part = parsed.part or ""
    plain_and_packed = bool(weight.parts) and (part == "") != ("" in weight.parts)
    if part in weight.parts or plain_and_packed:
        other, other_key = next(iter(weight.parts.values()))
        raise CheckpointError(
            f"{parsed.name} is stored twice: as {other_key} in {other.path} and as {key} in {file.path.name}"
        )
    weight.parts[part] = (file, key)


def _verify(source: Path | str, stored: Mapping[str, _Stored], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare what files hold with what the network needs, and say all that is wrong at once."""
    wrong = {}
    for name in sorted(expected.keys() & stored.keys()):
        problem = _shape_problem(stored[name], expected[name])
        if problem is not None:
            wrong[name] = problem
    problems = [
        _listed("missing", (name for name in expected if name not in stored)),
        _listed("unexpected", (name for name in stored if name not in expected)),
        _listed("of a wrong shape", (f"{name} ({problem})" for name, problem in wrong.items())),
    ]
    found = [problem for problem in problems if problem]
    if found:
        raise CheckpointError(
            f"{source} does not fit its config: {'; '.join(found)}. It is incomplete, or of another model or release"
        )


def _listed(what: str, names: Iterable[str]) -> str:
    listed = list(names)
    return f"{len(listed)} {'key' if len(listed) == 1 else 'keys'} {what}: {some(listed)}" if listed else ""


def _shape_problem(weight: _Stored, shape: tuple[int, ...]) -> str | None:
    if "" in weight.parts:
        found = weight.shape()
        return None if found == shape else f"{list(found)} and should be {list(shape)}"
    missing = [part for part in PACKED_PARTS if part not in weight.parts]
    if missing:
        return f"its {', '.join(missing)} is missing"
    return packed_problem({part: weight.shape(part) for part in PACKED_PARTS}, shape)


def _weight(weight: _Stored, shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype) -> Tensor:
    file, key = next(iter(weight.parts.values()))
    if "" in weight.parts:
        tensor = weight.read()
        if not tensor.is_floating_point():
            raise CheckpointError(f"{file.path}: {key} holds {tensor.dtype} and should hold floating-point numbers")
        # A copy, so that the network keeps no file mapped that somebody may write to.
        tensor = tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
    else:
        packed, scale, zero_point = (weight.read(part).to(device) for part in PACKED_PARTS)
        if packed.dtype != torch.uint8:
            raise CheckpointError(f"{file.path}: {key} holds {packed.dtype} and should hold torch.uint8")
        tensor = dequantize(packed, scale, zero_point, shape).to(dtype)
    if not bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
        reason = (
            "float16 cannot hold them: use bfloat16 or float32" if dtype == torch.float16 else "the file is damaged"
        )
        raise CheckpointError(f"{file.path}: {key} holds numbers that are infinite or not numbers; {reason}")
    return tensor


def _split(state: Mapping[str, Tensor], dtype: torch.dtype | None, max_size: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for key, tensor in state.items():
        nbytes = _nbytes(tensor, dtype)
        if shards[-1] and size + nbytes > max_size:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += nbytes
    return shards


def _nbytes(tensor: Tensor, dtype: torch.dtype | None) -> int:
    return tensor.numel() * (dtype or tensor.dtype).itemsize


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, path)
