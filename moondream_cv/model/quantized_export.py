"""Export of a quantized checkpoint to a folder that loads without the weights in full precision."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from moondream_cv.errors import CheckpointError
from moondream_cv.model.checkpoint_writer import TensorSpec, write_checkpoint
from moondream_cv.model.checkpoints import quantization_plan, weight_shapes
from moondream_cv.model.key_names import INT8_SCALE, PACKED_PARTS
from moondream_cv.model.quantization import pack_int4
from moondream_cv.model.sources import Source
from moondream_cv.model.stored_weights import SCALE_DTYPE, StoredWeight, WeightLoader, mode_of, stored_weights, verify
from moondream_cv.model.tensor_files import open_tensor_files
from moondream_cv.progress import Operation


def export_quantized(source: Source, to: Path, mode: str, operation: Operation | None = None) -> Path:
    """Write the quantized weights, the config, the tokenizer and the calibration of a source to a new folder.

    Weights are quantized and written one by one, so that memory is needed for the largest of them only.

    Args:
        source: Checkpoint in full precision.
        to: Folder to write; it must not exist.
        mode: "int8" or "int4".
        operation: Receives the progress.

    Returns:
        The folder.

    Raises:
        CheckpointError: The folder exists or cannot be written, the checkpoint is already quantized, or its files are
            missing or damaged.
        ValueError: The mode is unknown.
    """
    # Check the source and the folder
    if to.exists():
        raise CheckpointError(f"{to} already exists; give a new folder")
    stored = stored_weights(open_tensor_files(source.weights))
    shapes = weight_shapes(source.config)
    verify(source.weights, stored, shapes)
    found = mode_of(stored.values())
    if found is not None:
        raise CheckpointError(f"{source.weights} is already quantized to {found}; give a checkpoint in full precision")
    modes = quantization_plan(source.weights, stored, shapes, mode)

    # Quantize the weights while they are written
    loader = WeightLoader("cpu")
    specs = [spec for name, shape in shapes.items() for spec in _parts(stored[name], shape, modes.get(name))]
    tensors = (
        tensor for name, shape in shapes.items() for tensor in _tensors(loader, stored[name], shape, modes.get(name))
    )
    return write_checkpoint(source, to, stored["text.wte"].dtype, specs, tensors, operation, "Quantizing")


def _parts(weight: StoredWeight, shape: tuple[int, ...], mode: tuple[str, int] | None) -> list[TensorSpec]:
    """Return the tensors of a weight in the file."""
    key = f"model.{weight.name}"
    if mode is None:
        return [TensorSpec(key, weight.dtype, shape)]
    name, group = mode
    if name == "int8":
        scale_key = f"{key.removesuffix('weight')}{INT8_SCALE}"
        return [TensorSpec(key, torch.int8, shape), TensorSpec(scale_key, torch.float32, shape[:1])]
    groups = math.prod(shape) // group
    dtypes = torch.uint8, SCALE_DTYPE, SCALE_DTYPE
    part_shapes = (groups // 2, group), (groups, 1), (groups, 1)
    return [TensorSpec(f"{key}.{PACKED_PARTS[i]}", dtypes[i], part_shapes[i]) for i in range(3)]


def _tensors(
    loader: WeightLoader, weight: StoredWeight, shape: tuple[int, ...], mode: tuple[str, int] | None
) -> Iterator[Tensor]:
    if mode is None:
        yield loader.load(weight, shape, weight.dtype)
    elif mode[0] == "int8":
        yield from loader.load_int8(weight, shape)
    else:
        levels, scale, zero_point = loader.load_int4(weight, shape, mode[1])
        yield from (pack_int4(levels, mode[1]), scale, zero_point)
