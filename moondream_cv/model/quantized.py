"""Weights of 4-bit files, as full numbers.

A weight [out, in] is cut into groups of 128 numbers in row-major order. Two groups share a row of bytes: the first half
of all groups stands in the high four bits, the second half in the low ones. A number is (bits − zero point) · scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def packed_problem(parts: Mapping[str, Sequence[int]], shape: Sequence[int]) -> str | None:
    """Say why the shapes of a 4-bit weight's parts do not make a weight of this shape; None if they do."""
    if len(parts["packed"]) != 2:
        return f"packed has the shape {list(parts['packed'])} and should have two dimensions"
    rows, group = parts["packed"]
    size = shape[0] * shape[1] if len(shape) == 2 else -1
    if 2 * rows * group != size:
        return f"packed has the shape {list(parts['packed'])}, which does not hold the {list(shape)} of this weight"
    for part in ("scale", "zero_point"):
        if list(parts[part]) != [2 * rows, 1]:
            return f"{part} has the shape {list(parts[part])} and should have {[2 * rows, 1]}"
    return None


def dequantize(packed: Tensor, scale: Tensor, zero_point: Tensor, shape: Sequence[int]) -> Tensor:
    """Give the float32 weight of this shape.

    Args:
        packed: [groups / 2, group size] uint8.
        scale: [groups, 1].
        zero_point: [groups, 1].
        shape: (out, in).
    """
    levels = torch.cat((packed >> 4, packed & 0b1111)).float()  # [groups, group size]
    return (levels - zero_point.float()).mul_(scale.float()).reshape(tuple(shape))
