"""Merge of an adapter into the weights of its base model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moondream_cv.errors import CheckpointError
from moondream_cv.loading import find_source
from moondream_cv.model.adapters import Adapter, find_adapter, load_adapter, save_adapter
from moondream_cv.model.checkpoint_writer import TensorSpec, write_checkpoint
from moondream_cv.model.checkpoints import weight_shapes
from moondream_cv.model.stored_weights import WeightLoader, mode_of, stored_weights, verify
from moondream_cv.model.tensor_files import open_tensor_files
from moondream_cv.progress import Operation


def merge(adapter: str | Path, to: str | os.PathLike[str], model: str | os.PathLike[str] | None = None) -> Path:
    """Write a checkpoint with an adapter in its weights: W + B A for each layer.

    The sum is computed in float32 and rounded to the data type of the stored weight, one weight at a time. The
    calibration of the model is not written, because scores under an adapter are not calibrated.

    Args:
        adapter: "ID@STEP" of a local finetune, a `.pt` or `.safetensors` file, or a folder in PEFT's layout.
        to: Folder to write; it must not exist. `load(to)` opens it.
        model: Name of the base model as in `load`, in full precision; None: the one that the checkpoint of a finetune
            names, otherwise "moondream2".

    Returns:
        The folder.

    Raises:
        CheckpointError: The adapter does not exist, does not fit the model or has the published layout with pairs that
            no weight can absorb; the model is quantized or cannot be fetched; or the folder exists or cannot be
            written.
    """
    # Check the folder, the model and the adapter
    target = Path(to).expanduser()
    if target.exists():  # before a download
        raise CheckpointError(f"{target} already exists; give a new folder")
    source = find_source(base_model(adapter) if model is None else model)
    stored = stored_weights(open_tensor_files(source.weights))
    shapes = weight_shapes(source.config)
    verify(source.weights, stored, shapes)
    mode = mode_of(stored.values())
    if mode is not None:
        raise CheckpointError(
            f"{source.weights} is quantized to {mode}, and the steps of quantized weights are larger than most "
            "updates of an adapter; merge into a checkpoint in full precision, then run moondream-cv quantize"
        )
    updates = _updates(load_adapter(adapter, source.config, "cpu", torch.float32))

    # Add the updates while the weights are written
    specs = [TensorSpec(f"model.{name}", stored[name].dtype, shape) for name, shape in shapes.items()]
    loader = WeightLoader("cpu")

    def tensors() -> Iterator[Tensor]:
        for name, shape in shapes.items():
            if name not in updates:
                yield loader.load(stored[name], shape, stored[name].dtype)
                continue
            a, b = updates[name]
            yield loader.load(stored[name], shape, torch.float32).addmm_(b, a)

    with Operation(f"merge of {adapter}") as operation:
        dtype = stored["text.wte"].dtype
        return write_checkpoint(source, target, dtype, specs, tensors(), operation, "Merging", keep_calibration=False)


def export_peft(adapter: str | Path, to: str | os.PathLike[str], model: str | os.PathLike[str] | None = None) -> Path:
    """Write an adapter in PEFT's layout: a folder with `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        adapter: "ID@STEP" of a local finetune, or a `.pt` or `.safetensors` file.
        to: Folder to write; it must not exist. Its name must not end in a suffix.
        model: Name of the base model as in `load`; None: as in `merge`.

    Returns:
        The folder.

    Raises:
        CheckpointError: The adapter does not exist or does not fit the model, or the folder exists or cannot be
            written.
        ValueError: The name of the folder has a suffix, or PEFT's layout cannot represent the adapter.
    """
    target = Path(to).expanduser()
    if target.suffix:
        raise ValueError(f"the name of a folder in PEFT's layout must have no suffix, got {target.name!r}")
    if target.exists():
        raise CheckpointError(f"{target} already exists; give a new folder")
    source = find_source(base_model(adapter) if model is None else model)
    loaded = load_adapter(adapter, source.config, "cpu", torch.float32)
    try:
        save_adapter(loaded, target)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error
    return target


def base_model(adapter: str | Path) -> str:
    """Return the name of the base model that the checkpoint of a finetune contains; "moondream2" for other adapters.

    Args:
        adapter: Adapter as in `merge`.

    Raises:
        CheckpointError: The adapter does not exist, or its file is damaged.
    """
    path = find_adapter(adapter)
    if path.suffix != ".safetensors" or not path.is_file():
        return "moondream2"
    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return metadata.get("base_model") or "moondream2"


def _updates(adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the pairs A [rank, in] and B [out, rank] of an adapter by the name of their weight.

    Raises:
        CheckpointError: A pair acts on the input of the block.
    """
    tensors = dict(adapter.tensors())
    if any(".attn.proj." in name for name in tensors):
        raise CheckpointError(
            f"{adapter.name} cannot be merged: its pairs of the attention's projection (published layout) act on the "
            "input of the block, and the input of the projection is the output of the attention, so no weight has the "
            "same effect; load it with adapter="
        )
    stems = {name.rsplit(".", 1)[0] for name in tensors}
    return {
        f"{stem.replace('.attn.out', '.attn.proj')}.weight": (tensors[f"{stem}.A"], tensors[f"{stem}.B"])
        for stem in sorted(stems)
    }
