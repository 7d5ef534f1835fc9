"""Dequantization of 4-bit weights.

A weight [out, in] is divided into groups of 128 values in row-major order. Two groups share a row of bytes: the first
half of all groups uses the high four bits, the second half the low four bits. A value is (bits − zero point) · scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


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
    """Return the float32 weight.

    Args:
        packed: [groups / 2, group size] uint8 pairs of 4-bit values.
        scale: [groups, 1] scale of each group.
        zero_point: [groups, 1] zero point of each group.
        shape: (out, in) shape of the weight.
    """
    levels = torch.cat((packed >> 4, packed & 0b1111)).float()  # [groups, group size]
    return (levels - zero_point.float()).mul_(scale.float()).reshape(tuple(shape))
