"""Checkpoints: load published weights into a network, checking every key, and save a network to a folder.

`key_names.py` maps names of tensors, `tensor_files.py` reads file formats, and `sources.py` finds the files.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
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
from moondream_cv.progress import Operation, byte_unit

MODEL_TYPE = "moondream1"  # in published config files of every Moondream 2
MAX_SHARD_SIZE = 5 * 10**9  # bytes
_CHUNK = 8 * 2**20  # numbers copied at once; Python handles Ctrl-C only between two copies


@dataclass
class _Stored:
    """A weight in checkpoint files.

    Attributes:
        transposed: Whether the file contains the transpose.
        parts: File and key of each part; a plain weight has the single part "".
    """

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
    source: Path,
    config: MoondreamConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    operation: Operation | None = None,
) -> MoondreamNetwork:
    """Load a checkpoint.

    Tensors are copied one by one from the memory-mapped file to the target device and dtype, so the weights are never
    in memory twice. 4-bit weights are dequantized.

    Args:
        source: A file, or a folder with `model.safetensors`, shards and their index, or a `.pt` file.
        config: Expected sizes.
        device: Device for the weights.
        dtype: Data type for the weights.
        operation: Receives the progress.

    Returns:
        The network in evaluation mode; its weights require no gradients.

    Raises:
        CheckpointError: Files are missing or damaged, or a weight is missing, unexpected, not finite or of a wrong
            shape; the message names files and keys.
    """
    stored = _stored_weights(_open_files(Path(source)))
    with torch.device("meta"):
        network = MoondreamNetwork(config)
    expected = _expected_shapes(config)
    _verify(Path(source), stored, expected)
    on_copy = None if operation is None else _reporter(operation, expected.values(), dtype)
    state = {name: _weight(stored[name], expected[name], device, dtype, on_copy) for name in expected}
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def stored_shapes(source: Path | Iterable[TensorFile]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a checkpoint's unquantized weights, without reading the weights.

    Args:
        source: A file or folder, or open files.

    Returns:
        Shapes by the names of the weights in the network.

    Raises:
        CheckpointError: Files are missing or damaged.
    """
    files = _open_files(source) if isinstance(source, Path) else source
    return {name: weight.shape() for name, weight in _stored_weights(files).items() if "" in weight.parts}


def check_shapes(where: Path | str, files: Iterable[TensorFile], config: MoondreamConfig) -> None:
    """Check that files contain exactly the weights of a network, without reading the weights.

    Args:
        where: Name of the checkpoint in error messages.
        files: All of its files.
        config: Expected sizes.

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
    """Write a folder that `load` can read, and transformers after `moondream_cv.hf.register()`.

    Each file is written completely before it replaces an older one.

    Args:
        network: Network to save.
        config: Configuration of the network.
        tokenizer: Tokenizer to save; None: an existing `tokenizer.json` is kept.
        folder: Folder to write; it is created if it does not exist.
        dtype: Data type of the saved weights; None: that of the network.
        max_shard_size: Maximum size of a file in bytes; a larger checkpoint is written as shards with an index.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    # Write the weights
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

    # Write the index and remove files of an earlier checkpoint
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

    # Write the config and the tokenizer
    _write_text(folder / "config.json", json.dumps(config_json(config, dtype or network.dtype), indent=1))
    if tokenizer is not None:
        _write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))


def config_json(config: MoondreamConfig, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Return the content of a `config.json`: the sections of the config, and the model type for transformers.

    Args:
        config: Configuration to write.
        dtype: Data type of the weights; None: it is not written.
    """
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
    """Compare the stored weights with the expected ones and report all problems in one error."""
    wrong = {}
    for name in sorted(expected.keys() & stored.keys()):
        problem = _shape_problem(stored[name], expected[name])
        if problem is not None:
            wrong[name] = problem
    problems = [
        _listed("missing", (name for name in expected if name not in stored)),
        _listed("unexpected", (name for name in stored if name not in expected)),
        _listed("with a wrong shape", (f"{name} ({problem})" for name, problem in wrong.items())),
    ]
    found = [problem for problem in problems if problem]
    if found:
        raise CheckpointError(
            f"{source} does not fit its config: {'; '.join(found)}. The checkpoint is incomplete, or belongs to "
            "another model or release"
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


def _reporter(operation: Operation, shapes: Iterable[tuple[int, ...]], dtype: torch.dtype) -> Callable[[int], None]:
    """Return a function that adds a number of loaded weights to the progress of an operation."""
    total = sum(math.prod(shape) for shape in shapes) * dtype.itemsize
    divisor, unit = byte_unit(total)
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count * dtype.itemsize
        operation.update("Loading weights", done / divisor, total / divisor, unit)

    report(0)
    return report


def _weight(
    weight: _Stored,
    shape: tuple[int, ...],
    device: torch.device | str,
    dtype: torch.dtype,
    on_copy: Callable[[int], None] | None,
) -> Tensor:
    file, key = next(iter(weight.parts.values()))
    if "" in weight.parts:
        tensor = weight.read()
        if not tensor.is_floating_point():
            raise CheckpointError(f"{file.path}: {key} must contain floating-point numbers, got {tensor.dtype}")
        # A copy, because the file may be modified while it is mapped.
        tensor = _copy(tensor, device, dtype, on_copy)
    else:
        packed, scale, zero_point = (weight.read(part).to(device) for part in PACKED_PARTS)
        if packed.dtype != torch.uint8:
            raise CheckpointError(f"{file.path}: {key} must contain torch.uint8, got {packed.dtype}")
        tensor = dequantize(packed, scale, zero_point, shape).to(dtype)
        if on_copy is not None:
            on_copy(tensor.numel())
    if not all(bool(torch.isfinite(torch.stack(torch.aminmax(part))).all()) for part in tensor.split(_rows(tensor))):
        reason = (
            "float16 cannot represent them; use bfloat16 or float32"
            if dtype == torch.float16
            else "the file is damaged"
        )
        raise CheckpointError(f"{file.path}: {key} contains infinite values or NaN; {reason}")
    return tensor


def _copy(
    tensor: Tensor, device: torch.device | str, dtype: torch.dtype, on_copy: Callable[[int], None] | None
) -> Tensor:
    """Return a contiguous copy of a tensor. Chunks of it are copied one by one."""
    copied = torch.empty(tensor.shape, device=device, dtype=dtype)
    for target, part in zip(copied.split(_rows(tensor)), tensor.split(_rows(tensor)), strict=True):
        target.copy_(part)
        if on_copy is not None:
            on_copy(part.numel())
    return copied


def _rows(tensor: Tensor) -> int:
    """Return the number of rows in a chunk."""
    return max(1, _CHUNK * len(tensor) // max(1, tensor.numel()))


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
