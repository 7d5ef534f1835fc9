"""Checkpoints: load published weights into a network, checking every key, and save a network to a folder.

`key_names.py` maps names of tensors, `tensor_files.py` reads file formats, and `sources.py` finds the files.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from moondream_cv.memory_trimming import LOADING_INTERVAL, MemoryTrimmer, trim_memory
from moondream_cv.model.config import MoondreamConfig
from moondream_cv.model.float8_linear import FLOAT8, Float8Linear, can_use_float8, quantize_float8
from moondream_cv.model.key_names import parse_key
from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.model.quantization import check_mode, group_size, is_quantizable
from moondream_cv.model.quantized_linear import Int4Linear, Int8Linear, QuantizedLinear
from moondream_cv.model.stored_weights import StoredWeight, WeightLoader, mode_of, stored_weights, verify
from moondream_cv.model.tensor_files import TensorFile, open_tensor_files
from moondream_cv.progress import Operation, byte_unit

MODEL_TYPE = "moondream1"  # in published config files of every Moondream 2
MAX_SHARD_SIZE = 5 * 10**9  # bytes


def load_network(
    source: Path,
    config: MoondreamConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    quantize: str | None = None,
    operation: Operation | None = None,
) -> MoondreamNetwork:
    """Load a checkpoint.

    Weights are read, converted and quantized in parts, so that the peak memory is little more than that of the loaded
    weights. Layers with quantized weights in the file become quantized layers.

    Args:
        source: A file, or a folder with `model.safetensors`, shards and their index, or a `.pt` file.
        config: Expected sizes.
        device: Device for the weights.
        dtype: Data type of the activations and of weights in full precision.
        quantize: "int8" or "int4" quantizes the linear layers; None: as in the file.
        operation: Receives the progress.

    Returns:
        The network in evaluation mode; its weights require no gradients.

    Raises:
        CheckpointError: Files are missing or damaged, or a weight is missing, unexpected, not finite or of a wrong
            shape; the message names files and keys.
        ValueError: `quantize` is unknown, or the file contains weights of the other mode.
    """
    # Check the files
    stored = stored_weights(open_tensor_files(Path(source)))
    with torch.device("meta"):
        network = MoondreamNetwork(config)
    expected = weight_shapes(config)
    verify(Path(source), stored, expected)
    modes = quantization_plan(source, stored, expected, quantize)

    # Load the weights
    trimmer = MemoryTrimmer(LOADING_INTERVAL)
    loader = WeightLoader(device, None if operation is None else _reporter(operation, expected.values(), dtype))
    state = {}
    for name, shape in expected.items():
        if name not in modes:
            state[name] = loader.load(stored[name], shape, _dtype(stored[name], dtype, bool(modes)))
            trimmer.trim()
    network.load_state_dict(state, assign=True, strict=False)

    # Replace layers by quantized layers, the largest first, because that takes the most temporary memory
    for name, (mode, group) in sorted(modes.items(), key=lambda item: -math.prod(expected[item[0]])):
        layer = name.removesuffix(".weight")
        shape, bias = expected[name], state[f"{layer}.bias"]
        quantized: QuantizedLinear
        if mode == "int8" and stored[name].mode is None and can_use_float8(device, shape):
            quantized = Float8Linear(*loader.load_rows(stored[name], shape, FLOAT8, quantize_float8), bias)
        elif mode == "int8":
            quantized = Int8Linear(*loader.load_int8(stored[name], shape), bias)
        else:
            quantized = Int4Linear(*loader.load_int4(stored[name], shape, group), bias)
        network.set_submodule(layer, quantized)
        trimmer.trim()
    trim_memory()
    return network.eval().requires_grad_(False)


def _dtype(stored: StoredWeight, dtype: torch.dtype, is_quantized: bool) -> torch.dtype:
    """Return the data type of a weight in full precision in memory.

    The lookup of token embeddings converts them, so in a quantized network they keep a smaller data type of the file.
    """
    if not is_quantized or stored.name != "text.wte" or stored.mode is not None:
        return dtype
    return min(stored.dtype, dtype, key=lambda candidate: candidate.itemsize)


def quantization_plan(
    source: Path, stored: Mapping[str, StoredWeight], expected: Mapping[str, tuple[int, ...]], quantize: str | None
) -> dict[str, tuple[str, int]]:
    """Return the weights of quantized layers.

    Args:
        source: Checkpoint, for messages.
        stored: Stored weights by name.
        expected: Shapes of the weights of the network by name.
        quantize: "int8" or "int4"; None: as in the file.

    Returns:
        Mode and group size by the name of the weight. The group size of int8 is the width of the input.

    Raises:
        ValueError: `quantize` is unknown, or the file contains weights of the other mode.
    """
    check_mode(quantize)
    plan = {}
    for name, shape in expected.items():
        if not is_quantizable(name, shape):
            continue
        mode = stored[name].mode
        if mode is not None and quantize not in (None, mode):
            raise ValueError(f"{source} contains {mode} weights; quantize must be None or {mode!r}, got {quantize!r}")
        chosen = mode or quantize
        group = _group_size(stored[name], shape) if chosen == "int4" else shape[1]
        if chosen is not None and group is not None:
            plan[name] = chosen, group
    return plan


def _group_size(stored: StoredWeight, shape: tuple[int, ...]) -> int | None:
    """Return the group size of a 4-bit layer; None: its weight is in full precision."""
    if stored.mode != "int4":
        return group_size(shape)
    group = stored.shape("packed")[1]
    return group if shape[1] % group == 0 and shape[1] % 2 == 0 else None


def stored_shapes(source: Path | Iterable[TensorFile]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a checkpoint's unquantized weights, without reading the weights.

    Args:
        source: A file or folder, or open files.

    Returns:
        Shapes by the names of the weights in the network.

    Raises:
        CheckpointError: Files are missing or damaged.
    """
    files = open_tensor_files(source) if isinstance(source, Path) else source
    return {name: weight.shape() for name, weight in stored_weights(files).items() if "" in weight.parts}


def stored_quantization(source: Path) -> str | None:
    """Return the quantization of a checkpoint, without reading the weights.

    Args:
        source: A file or folder.

    Returns:
        "int8" or "int4"; None: all weights are in full precision.

    Raises:
        CheckpointError: Files are missing or damaged.
    """
    return mode_of(stored_weights(open_tensor_files(source)).values())


def check_shapes(where: Path | str, files: Iterable[TensorFile], config: MoondreamConfig) -> None:
    """Check that files contain exactly the weights of a network, without reading the weights.

    Args:
        where: Name of the checkpoint in error messages.
        files: All of its files.
        config: Expected sizes.

    Raises:
        CheckpointError: A weight is missing, unexpected or of a wrong shape.
    """
    verify(where, stored_weights(files), weight_shapes(config))


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
        dtype: Data type of the saved weights in full precision; None: that of the network.
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
        tensors = {
            key: state[key].detach().to("cpu", _saved_dtype(key, state[key], dtype)).contiguous() for key in keys
        }
        part = folder / f"{name}.part"
        save_file(tensors, part, metadata={"format": "pt"})
        os.replace(part, folder / name)

    # Write the index and remove files of an earlier checkpoint
    index = folder / "model.safetensors.index.json"
    if len(shards) > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        total = sum(_nbytes(key, tensor, dtype) for key, tensor in state.items())
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


def weight_shapes(config: MoondreamConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights of a network by name.

    Args:
        config: Configuration of the network.
    """
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in MoondreamNetwork(config).state_dict().items()}


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


def _split(state: Mapping[str, Tensor], dtype: torch.dtype | None, max_size: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for key, tensor in state.items():
        nbytes = _nbytes(key, tensor, dtype)
        if shards[-1] and size + nbytes > max_size:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += nbytes
    return shards


def _nbytes(key: str, tensor: Tensor, dtype: torch.dtype | None) -> int:
    return tensor.numel() * _saved_dtype(key, tensor, dtype).itemsize


def _saved_dtype(key: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Return the data type of a tensor in a file. The parts of quantized weights keep theirs."""
    parsed = parse_key(key)
    is_part = not tensor.is_floating_point() or (parsed is not None and parsed.part is not None)
    return tensor.dtype if is_part or dtype is None else dtype


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, path)
