"""Writer of a new checkpoint folder, tensor by tensor."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from moondream_cv.errors import CheckpointError
from moondream_cv.model.checkpoints import config_json
from moondream_cv.model.sources import Source
from moondream_cv.progress import Operation, byte_unit

# Names of data types in safetensors files
_DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
}


class TensorSpec(NamedTuple):
    """A tensor in a file.

    Attributes:
        key: Name of the tensor.
        dtype: Data type.
        shape: Shape.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def write_checkpoint(
    source: Source,
    to: Path,
    dtype: torch.dtype,
    specs: Sequence[TensorSpec],
    tensors: Iterable[Tensor],
    operation: Operation | None = None,
    stage: str = "Writing",
    keep_calibration: bool = True,
) -> Path:
    """Write new weights with the config and the tokenizer of a source to a new folder.

    The folder appears complete or not at all. Memory is needed for one tensor at a time.

    Args:
        source: Checkpoint that the weights were made from.
        to: Folder to write; it must not exist.
        dtype: Data type of the weights in `config.json`.
        specs: Tensors of the file.
        tensors: Values of `specs`, in the same order.
        operation: Receives the progress.
        stage: Name of the stage for the progress.
        keep_calibration: Whether the calibration of the source is written as well.

    Returns:
        The folder.

    Raises:
        CheckpointError: The folder exists or cannot be written, or the tokenizer is missing.
    """
    if to.exists():
        raise CheckpointError(f"{to} already exists; give a new folder")
    tokenizer, _ = source.find_tokenizer()

    # Write the files to a temporary folder with a new name, so that no folder of the user is replaced
    temporary = None
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".checkpoint-", dir=to.parent))
        part = temporary / "part"  # unlike the temporary folder, it has the usual permissions
        part.mkdir()
        shutil.copyfile(tokenizer, part / "tokenizer.json")
        if keep_calibration and (source.folder / "calibration.json").is_file():
            shutil.copyfile(source.folder / "calibration.json", part / "calibration.json")
        config = config_json(source.config, dtype)
        (part / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        with (part / "model.safetensors").open("wb") as file:
            _write_tensors(file, specs, tensors, operation, stage)
        os.replace(part, to)
    except OSError as error:
        raise CheckpointError(f"{to} cannot be written: {error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return to


def _write_tensors(
    file: BinaryIO, specs: Sequence[TensorSpec], tensors: Iterable[Tensor], operation: Operation | None, stage: str
) -> None:
    """Write a safetensors file: the length of the header, the header, and the tensors in its order."""
    # Write the header
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, dtype, shape in specs:
        stop = offset + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned to 8 bytes
    file.write(len(text).to_bytes(8, "little") + text)

    # Write the tensors
    divisor, unit = byte_unit(offset)
    written = 0
    for tensor, (_, dtype, shape) in zip(tensors, specs, strict=True):
        data = tensor.to(dtype).reshape(shape).contiguous()
        file.write(data.view(torch.uint8).numpy().data)
        written += data.nbytes
        if operation is not None:
            operation.update(stage, written / divisor, offset / divisor, unit)
