"""Weights in checkpoint files: find their tensors, check their shapes, and load them one by one.

A weight is in full precision, or quantized: integers with scales (int8), or packed 4-bit integers (int4). Large weights
are read and converted in parts, so that loading takes little more memory than the loaded weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from moondream_cv.errors import CheckpointError
from moondream_cv.model.key_names import INT8_SCALE, PACKED_PARTS, StoredKey, parse_key
from moondream_cv.model.quantization import (
    dequantize,
    packed_problem,
    quantize_int4,
    quantize_int8,
    row_chunks,
    unpack_int4,
)
from moondream_cv.model.tensor_files import TensorFile, some

SCALE_DTYPE = torch.bfloat16  # scales and zero points of weights that are quantized to 4 bits


@dataclass
class StoredWeight:
    """A weight in checkpoint files.

    Attributes:
        name: Name of the weight in the network.
        transposed: Whether the file contains the transpose.
        parts: File and key of each part; a weight in full precision has the single part "".
    """

    name: str
    transposed: bool = False
    parts: dict[str, tuple[TensorFile, str]] = field(default_factory=dict)

    @property
    def mode(self) -> str | None:
        """Quantization of the stored weight: "int8" or "int4"; None: full precision."""
        if "" in self.parts:
            return "int8" if INT8_SCALE in self.parts else None
        return "int4"

    @property
    def place(self) -> str:
        """File and key, for messages."""
        file, key = next(iter(self.parts.values()))
        return f"{file.path}: {key}"

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the first part."""
        part = next(iter(self.parts))
        return self.read(part, slice(0, 1)).dtype

    def shape(self, part: str = "") -> tuple[int, ...]:
        """Return the shape of a part as in the network."""
        file, key = self.parts[part]
        shape = file.shapes[key]
        return shape[::-1] if self.transposed else shape

    def read(self, part: str = "", rows: slice | None = None) -> Tensor:
        """Return a part, or rows of it, on the CPU. It may be a view of a mapped file."""
        file, key = self.parts[part]
        if self.transposed:
            return file.read(key).T[rows or slice(None)]
        return file.read(key, rows)


class WeightLoader:
    """Loads weights to a device, with checks of their values."""

    def __init__(self, device: torch.device | str, on_load: Callable[[int], None] | None = None) -> None:
        """Create a loader.

        Args:
            device: Device of the loaded weights.
            on_load: Function that receives the number of values after each part.
        """
        self._device = device
        self._on_load = on_load

    def load(self, stored: StoredWeight, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a weight in full precision.

        Args:
            stored: Weight to load.
            shape: Shape of the weight.
            dtype: Data type of the result.

        Raises:
            CheckpointError: The weight is of an unexpected data type, or contains infinite values or NaN.
        """
        weight = torch.empty(shape, dtype=dtype, device=self._device)
        for rows, values in self._values(stored, shape):
            weight[rows] = values
            _check_finite(stored, weight[rows], dtype)
        return weight

    def load_int8(self, stored: StoredWeight, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return the integers and the scales of a weight, which is quantized unless it is stored as int8.

        Args:
            stored: Weight to load.
            shape: (out, in) shape of the weight.

        Returns:
            [out, in] int8 integers and [out] float32 scales.

        Raises:
            CheckpointError: The weight is of an unexpected data type, or contains infinite values or NaN.
        """
        if stored.mode != "int8":
            return self.load_rows(stored, shape, torch.int8, quantize_int8)
        weight = torch.empty(shape, dtype=torch.int8, device=self._device)
        scale = _checked(stored, stored.read(INT8_SCALE), None).to(self._device, torch.float32, copy=True)
        for rows in row_chunks(shape):
            weight[rows] = _checked(stored, stored.read(rows=rows), torch.int8)
            self._report(weight[rows])
        _check_finite(stored, scale, torch.float32)
        return weight, scale

    def load_rows(
        self,
        stored: StoredWeight,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        quantize: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Return a weight whose rows are quantized by a function.

        Args:
            stored: Weight to load.
            shape: (out, in) shape of the weight.
            dtype: Data type of the quantized weight.
            quantize: Function of rows that returns quantized rows and their scales.

        Returns:
            [out, in] quantized weight and [out] float32 scales.

        Raises:
            CheckpointError: The weight is of an unexpected data type, or contains infinite values or NaN.
        """
        weight = torch.empty(shape, dtype=dtype, device=self._device)
        scale = torch.empty(shape[:1], dtype=torch.float32, device=self._device)
        for rows, values in self._values(stored, shape):
            weight[rows], scale[rows] = quantize(values)
        _check_finite(stored, scale, torch.float32)
        return weight, scale

    def load_int4(self, stored: StoredWeight, shape: tuple[int, ...], group: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the levels, scales and zero points of a weight, which is quantized unless it is stored as int4.

        Args:
            stored: Weight to load.
            shape: (out, in) shape of the weight.
            group: Number of values with one scale; that of the file if the weight is stored as int4.

        Returns:
            [out, in] uint8 levels in 0..15, [out, groups] scales, and [out, groups] zero points.

        Raises:
            CheckpointError: The weight is of an unexpected data type, or contains infinite values or NaN.
        """
        levels = torch.empty(shape, dtype=torch.uint8, device=self._device)
        groups = shape[0], shape[1] // group
        if stored.mode == "int4":
            packed = _checked(stored, stored.read("packed"), torch.uint8).to(self._device)
            scale, zero_point = (
                _checked(stored, stored.read(part), None).to(self._device, copy=True).view(groups)
                for part in ("scale", "zero_point")
            )
            for rows in row_chunks(shape):
                levels[rows] = unpack_int4(packed, shape, rows)
                self._report(levels[rows])
        else:
            scale = torch.empty(groups, dtype=SCALE_DTYPE, device=self._device)
            zero_point = torch.empty_like(scale)
            for rows, values in self._values(stored, shape):
                levels[rows], scale[rows], zero_point[rows] = quantize_int4(values, group, SCALE_DTYPE)
        _check_finite(stored, scale, scale.dtype)
        _check_finite(stored, zero_point, zero_point.dtype)
        return levels, scale, zero_point

    def _values(self, stored: StoredWeight, shape: tuple[int, ...]) -> Iterator[tuple[slice, Tensor]]:
        """Yield the values of a weight row by row, on the device."""
        if stored.mode == "int4":
            packed, scale, zero_point = (stored.read(part).to(self._device) for part in PACKED_PARTS)
            whole = dequantize(_checked(stored, packed, torch.uint8), scale, zero_point, shape)
        for rows in row_chunks(shape):
            if stored.mode == "int4":
                values = whole[rows]
            elif stored.mode == "int8":
                integers = _checked(stored, stored.read(rows=rows), torch.int8).to(self._device)
                values = integers.float().mul_(stored.read(INT8_SCALE, rows).to(self._device).float()[:, None])
            else:
                values = _checked(stored, stored.read(rows=rows), None).to(self._device)
            yield rows, values
            self._report(values)

    def _report(self, values: Tensor) -> None:
        if self._on_load is not None:
            self._on_load(values.numel())


def stored_weights(files: Iterable[TensorFile]) -> dict[str, StoredWeight]:
    """Return the weights in files by their names in the network.

    Args:
        files: Open files.

    Raises:
        CheckpointError: A weight is stored twice.
    """
    weights: dict[str, StoredWeight] = {}
    for file in files:
        for key in file.shapes:
            parsed = parse_key(key)
            if parsed is not None:
                _add(weights, parsed, file, key)
    return weights


def mode_of(stored: Iterable[StoredWeight]) -> str | None:
    """Return the quantization of weights: "int8" or "int4"; None: all are in full precision.

    Args:
        stored: Weights of a checkpoint.
    """
    return min((weight.mode for weight in stored if weight.mode is not None), default=None)


def _add(weights: dict[str, StoredWeight], parsed: StoredKey, file: TensorFile, key: str) -> None:
    weight = weights.setdefault(parsed.name, StoredWeight(parsed.name, parsed.transposed))
    part = parsed.part or ""
    is_packed = part in PACKED_PARTS
    if part in weight.parts or any(is_packed != (other in PACKED_PARTS) for other in weight.parts):
        other_file, other_key = next(iter(weight.parts.values()))
        raise CheckpointError(
            f"{parsed.name} is stored twice: as {other_key} in {other_file.path} and as {key} in {file.path.name}"
        )
    weight.parts[part] = (file, key)


def verify(source: Path | str, stored: Mapping[str, StoredWeight], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare stored weights with the weights of a network and report all problems in one error.

    Args:
        source: Name of the checkpoint in the message.
        stored: Stored weights by name.
        expected: Shapes of the weights of the network by name.

    Raises:
        CheckpointError: A weight is missing, unexpected or of a wrong shape.
    """
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


def _shape_problem(weight: StoredWeight, shape: tuple[int, ...]) -> str | None:
    if "" in weight.parts:
        found = weight.shape()
        if found != shape:
            return f"{list(found)} and should be {list(shape)}"
        if weight.mode == "int8" and weight.shape(INT8_SCALE) != shape[:1]:
            return f"{INT8_SCALE} is {list(weight.shape(INT8_SCALE))} and should be {list(shape[:1])}"
        return None
    if INT8_SCALE in weight.parts:
        return f"it has only a {INT8_SCALE}"
    missing = [part for part in PACKED_PARTS if part not in weight.parts]
    if missing:
        return f"its {', '.join(missing)} is missing"
    return packed_problem({part: weight.shape(part) for part in PACKED_PARTS}, shape)


def _checked(stored: StoredWeight, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor that was read; raise a `CheckpointError` unless it has a data type, or any floating-point one."""
    if tensor.dtype != dtype if dtype is not None else not tensor.is_floating_point():
        expected = "floating-point numbers" if dtype is None else dtype
        raise CheckpointError(f"{stored.place} must contain {expected}, got {tensor.dtype}")
    return tensor


def _check_finite(stored: StoredWeight, values: Tensor, dtype: torch.dtype) -> None:
    if bool(torch.isfinite(torch.stack(torch.aminmax(values))).all()):
        return
    is_too_narrow = dtype == torch.float16
    reason = "float16 cannot represent them; use bfloat16 or float32" if is_too_narrow else "the file is damaged"
    raise CheckpointError(f"{stored.place} contains infinite values or NaN; {reason}")
