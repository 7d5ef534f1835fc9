"""Quantization of weights: 8-bit integers with a scale per output, or 4-bit integers with a scale per group.

`quantized_linear.py` contains the layers that compute with them. Only the linear layers of the vision blocks, the
projection, the text blocks and the language head are quantized. Embeddings, norms, the patch embedding and the region
heads keep full precision.

Files contain an int8 weight as `weight` [out, in] and `weight_scale` [out]; a value is weight · scale.

Files contain a 4-bit weight in the published layout. The weight is divided into groups of 128 values in row-major
order. Two groups share a row of bytes: the first half of all groups uses the high four bits, the second half the low
four bits. A value is (bits − zero point) · scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

MODES = ("int8", "int4")
INT8_MAX = 127

_SECTIONS = ("vision.blocks.", "vision.proj_mlp.", "text.blocks.", "text.lm_head.")
_CHUNK = 2**22  # values that are converted at a time
_SMALLEST_SCALE = 1e-12  # scale of a row of zeros


def is_quantizable(name: str, shape: Sequence[int]) -> bool:
    """Return whether a weight belongs to a layer that can be quantized.

    Args:
        name: Name of the weight in the network, such as `text.blocks.0.attn.qkv.weight`.
        shape: Shape of the weight.
    """
    return len(shape) == 2 and name.startswith(_SECTIONS) and name.endswith(".weight")


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


def dequantize(packed: Tensor, scale: Tensor, zero_point: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a 4-bit weight in float32.

    Args:
        packed: [groups / 2, group size] uint8 pairs of 4-bit values.
        scale: [groups, 1] scale of each group.
        zero_point: [groups, 1] zero point of each group.
        shape: (out, in) shape of the weight.
    """
    levels = torch.cat((packed >> 4, packed & 0b1111)).float()  # [groups, group size]
    return (levels - zero_point.float()).mul_(scale.float()).reshape(tuple(shape))
