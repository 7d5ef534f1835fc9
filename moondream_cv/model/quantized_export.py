"""Export of a quantized checkpoint to a folder that loads without the weights in full precision."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from moondream_cv.errors import CheckpointError
from moondream_cv.model.checkpoints import config_json, quantization_plan, weight_shapes
from moondream_cv.model.key_names import INT8_SCALE, PACKED_PARTS
from moondream_cv.model.quantization import pack_int4
from moondream_cv.model.sources import Source
from moondream_cv.model.stored_weights import SCALE_DTYPE, StoredWeight, WeightLoader, stored_weights, verify
from moondream_cv.model.tensor_files import open_tensor_files
from moondream_cv.progress import Operation, byte_unit

# Names of data types in safetensors files
_DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_Part = tuple[str, torch.dtype, tuple[int, ...]]  # key, data type, shape


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
    tokenizer, _ = source.find_tokenizer()
    stored = stored_weights(open_tensor_files(source.weights))
    shapes = weight_shapes(source.config)
    verify(source.weights, stored, shapes)
    found = sorted({weight.mode for weight in stored.values() if weight.mode is not None})
    if found:
        raise CheckpointError(
            f"{source.weights} is already quantized to {found[0]}; give a checkpoint in full precision"
        )
    modes = quantization_plan(source.weights, stored, shapes, mode)

    # Write the files to a temporary folder with a new name, so that no folder of the user is replaced
    temporary = None
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".quantized-", dir=to.parent))
        part = temporary / "part"  # unlike the temporary folder, it has the usual permissions
        part.mkdir()
        shutil.copyfile(tokenizer, part / "tokenizer.json")
        if (source.folder / "calibration.json").is_file():
            shutil.copyfile(source.folder / "calibration.json", part / "calibration.json")
        config = config_json(source.config, stored["text.wte"].dtype)
        (part / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        with (part / "model.safetensors").open("wb") as file:
            _write_weights(file, stored, shapes, modes, operation)
        os.replace(part, to)
    except OSError as error:
        raise CheckpointError(f"{to} cannot be written: {error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return to


def _write_weights(
    file: BinaryIO,
    stored: dict[str, StoredWeight],
    shapes: dict[str, tuple[int, ...]],
    modes: dict[str, tuple[str, int]],
    operation: Operation | None,
) -> None:
    """Write a safetensors file: the length of the header, the header, and the tensors in its order."""
    # Write the header
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        for key, dtype, part_shape in _parts(stored[name], shape, modes.get(name)):
            stop = offset + math.prod(part_shape) * dtype.itemsize
            header[key] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(part_shape), "data_offsets": [offset, stop]}
            offset = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned to 8 bytes
    file.write(len(text).to_bytes(8, "little") + text)

    # Write the tensors
    loader = WeightLoader("cpu")
    divisor, unit = byte_unit(offset)
    written = 0
    for name, shape in shapes.items():
        expected = _parts(stored[name], shape, modes.get(name))
        for tensor, (_, dtype, part_shape) in zip(
            _tensors(loader, stored[name], shape, modes.get(name)), expected, strict=True
        ):
            data = tensor.to(dtype).reshape(part_shape).contiguous()
            file.write(data.view(torch.uint8).numpy().data)
            written += data.nbytes
        if operation is not None:
            operation.update("Quantizing", written / divisor, offset / divisor, unit)


def _parts(weight: StoredWeight, shape: tuple[int, ...], mode: tuple[str, int] | None) -> list[_Part]:
    """Return the tensors of a weight in the file."""
    key = f"model.{weight.name}"
    if mode is None:
        return [(key, weight.dtype, shape)]
    name, group = mode
    if name == "int8":
        scale_key = f"{key.removesuffix('weight')}{INT8_SCALE}"
        return [(key, torch.int8, shape), (scale_key, torch.float32, shape[:1])]
    groups = math.prod(shape) // group
    dtypes = torch.uint8, SCALE_DTYPE, SCALE_DTYPE
    part_shapes = (groups // 2, group), (groups, 1), (groups, 1)
    return [(f"{key}.{PACKED_PARTS[i]}", dtypes[i], part_shapes[i]) for i in range(3)]


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
