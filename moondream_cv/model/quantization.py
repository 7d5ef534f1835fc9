"""Quantization of weights: 8-bit integers with a scale per output, or 4-bit integers with a scale per group.

`quantized_linear.py` contains the layers that compute with them. Only the linear layers of the vision blocks, the
projection, the text blocks and the language head are quantized. Embeddings, norms, the patch embedding and the region
heads keep full precision.

Files contain an int8 weight as `weight` [out, in] and `weight_scale` [out]; a value is weight · scale.

Files contain a 4-bit weight in the published layout. The weight is divided into groups in row-major order, usually of
128 values. Two groups share a row of bytes: the first half of all groups uses the high four bits, the second half the
low four bits. A value is (bits − zero point) · scale; zero points are real numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

MODES = ("int8", "int4")
INT8_MAX = 127
_SECTIONS = ("vision.blocks.", "vision.proj_mlp.", "text.blocks.", "text.lm_head.")
MAX_GROUP = 128  # values with one scale in a 4-bit weight
INT4_MAX = 15

_CHUNK = 2**22  # values that are converted at a time
_CACHED_CHUNK = 2**18  # values that fit into the cache of most CPUs
# Fractions of a group's range that are tried. Clipping the extremes reduces the squared error of the other values.
_CLIPPING_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8)
_SMALLEST_SCALE = 1e-12  # scale of a row of zeros


def check_mode(quantize: object) -> None:
    """Raise a `ValueError` unless a value is the name of a quantization or None.

    Args:
        quantize: Value to check.
    """
    if quantize is not None and quantize not in MODES:
        raise ValueError(f"quantize must be one of {', '.join(MODES)} or None, got {quantize!r}")


def is_quantizable(name: str, shape: Sequence[int]) -> bool:
    """Return whether a weight belongs to a layer that can be quantized.

    Args:
        name: Name of the weight in the network, such as `text.blocks.0.attn.qkv.weight`.
        shape: Shape of the weight.
    """
    return len(shape) == 2 and name.startswith(_SECTIONS) and name.endswith(".weight")


def group_size(shape: Sequence[int]) -> int | None:
    """Return the group size for the quantization of a weight to 4 bits.

    Args:
        shape: (out, in) shape of the weight.

    Returns:
        The largest power of two up to 128 that divides the input width; None: the weight has an odd number of groups,
        which the published layout cannot represent.
    """
    group = math.gcd(shape[1], MAX_GROUP)
    return group if group > 1 and shape[0] * shape[1] // group % 2 == 0 else None


def row_chunks(shape: Sequence[int], size: int = _CHUNK) -> Iterator[slice]:
    """Divide the first dimension of a tensor into slices, so that temporary copies stay small.

    Args:
        shape: Shape of the tensor.
        size: Maximum number of values in a slice of several rows.
    """
    width = max(1, torch.Size(shape[1:]).numel())
    step = max(1, size // width)
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def quantize_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize rows of a weight to 8-bit integers.

    Args:
        rows: [out, in] weight.

    Returns:
        [out, in] int8 integers in −127..127, and the [out] float32 scales.
    """
    rows = rows.float()
    scale = rows.abs().amax(-1).div_(INT8_MAX).add_(_SMALLEST_SCALE)
    return (rows / scale[:, None]).round_().to(torch.int8), scale


def packed_problem(parts: Mapping[str, Sequence[int]], shape: Sequence[int]) -> str | None:
    """Check the shapes of the parts of a 4-bit weight.

    Args:
        parts: Shapes of "packed", "scale" and "zero_point".
        shape: Expected shape of the weight.

    Returns:
        Description of the problem; None if the shapes fit.
    """
    if len(parts["packed"]) != 2:
        return f"packed must have two dimensions, got the shape {list(parts['packed'])}"
    rows, group = parts["packed"]
    size = shape[0] * shape[1] if len(shape) == 2 else -1
    if 2 * rows * group != size:
        return f"packed has the shape {list(parts['packed'])}, which does not fit the shape {list(shape)} of the weight"
    for part in ("scale", "zero_point"):
        if list(parts[part]) != [2 * rows, 1]:
            return f"{part} must have the shape {[2 * rows, 1]}, got {list(parts[part])}"
    return None


def quantize_int4(rows: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize rows of a weight to 4-bit integers. The clipping of each group minimizes its squared error.

    Args:
        rows: [out, in] weight.
        group: Number of values with one scale; it divides the input width.
        dtype: Data type of scales and zero points.

    Returns:
        [out, in] uint8 levels in 0..15, [out, groups] scales, and [out, groups] zero points.
    """
    out, width = rows.shape
    parts = [_quantize_groups(rows[chunk], group, dtype) for chunk in row_chunks(rows.shape, _CACHED_CHUNK)]
    levels, scale, zero_point = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return levels.view(out, width), scale.view(out, -1), zero_point.view(out, -1)


def _quantize_groups(rows: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    values = rows.float().reshape(-1, group)
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    least, best_scale, best_zero = torch.full_like(low, torch.inf), low, low
    for ratio in _CLIPPING_RATIOS:
        scale = ((high - low) * (ratio / INT4_MAX)).add_(_SMALLEST_SCALE).to(dtype).float()
        zero = (INT4_MAX / 2 - (high + low) / (2 * scale)).to(dtype).float()
        error = _levels(values, scale, zero).sub_(zero).mul_(scale).sub_(values).square_().sum(1, keepdim=True)
        is_better = error < least
        least = torch.where(is_better, error, least)
        best_scale, best_zero = torch.where(is_better, scale, best_scale), torch.where(is_better, zero, best_zero)
    levels = _levels(values, best_scale, best_zero).to(torch.int8).view(torch.uint8)
    return levels, best_scale.to(dtype), best_zero.to(dtype)


def _levels(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (values * scale.reciprocal()).add_(zero).round_().clamp_(0, INT4_MAX)


def pack_int4(levels: Tensor, group: int) -> Tensor:
    """Pack the levels of a weight in the published layout.

    Args:
        levels: [out, in] uint8 levels in 0..15.
        group: Number of values with one scale.

    Returns:
        [groups / 2, group] uint8.
    """
    first, second = levels.reshape(2, -1, group)
    return (first << 4) | second


def unpack_int4(packed: Tensor, shape: Sequence[int], rows: slice | None = None) -> Tensor:
    """Return the levels of a weight in the published layout.

    Args:
        packed: [groups / 2, group size] uint8 pairs of 4-bit values.
        shape: (out, in) shape of the weight; the group size divides the input width if `rows` are given.
        rows: Rows of the weight to return; None: all rows.

    Returns:
        [rows, in] uint8 levels in 0..15.
    """
    per_row = shape[1] // packed.shape[1]
    half = len(packed)
    start, stop = (0, 2 * half) if rows is None else (rows.start * per_row, rows.stop * per_row)
    high = packed[min(start, half) : min(stop, half)] >> 4
    low = packed[max(start - half, 0) : max(stop - half, 0)] & 0b1111
    return torch.cat((high, low)).reshape(-1, shape[1])


def dequantize(packed: Tensor, scale: Tensor, zero_point: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a 4-bit weight in float32.

    Args:
        packed: [groups / 2, group size] uint8 pairs of 4-bit values.
        scale: [groups, 1] scale of each group.
        zero_point: [groups, 1] zero point of each group.
        shape: (out, in) shape of the weight.
    """
    groups = unpack_int4(packed, shape).view(-1, packed.shape[1]).float()
    return groups.sub_(zero_point.float()).mul_(scale.float()).reshape(tuple(shape))
