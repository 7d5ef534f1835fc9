"""Building blocks that the vision encoder, the text decoder and the region heads share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LoraPair = tuple[Tensor, Tensor]  # A [rank, in], B [out, rank]
ROTARY_BASE = 10000.0


def add_lora(y: Tensor, x: Tensor, pair: LoraPair | None) -> Tensor:
    """Add the low-rank update of the input `x` to the output `y` of a linear layer; without a pair, return `y`."""
    return y if pair is None else y + F.linear(F.linear(x, pair[0]), pair[1])


class Mlp(nn.Module):
    """Two linear layers with the tanh form of GELU between them."""

    def __init__(self, dim: int, inner_dim: int, out_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, inner_dim)
        self.fc2 = nn.Linear(inner_dim, out_dim)

    def forward(self, x: Tensor, lora: Mapping[str, LoraPair] | None = None) -> Tensor:
        lora = lora or {}
        x = F.gelu(add_lora(self.fc1(x), x, lora.get("fc1")), approximate="tanh")
        return add_lora(self.fc2(x), x, lora.get("fc2"))


def rotary_table(positions: Tensor, rotary_dim: int) -> Tensor:
    """Compute the cosines and sines of the rotary embedding.

    They are computed for each call, because `from_pretrained` of transformers leaves non-persistent buffers
    uninitialized.

    Args:
        positions: [B, T] integer positions.
        rotary_dim: Number of rotated dimensions of a head; even.

    Returns:
        [2, B, T, 1, rotary_dim / 2] float32: cosines, then sines.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions.device) / rotary_dim
    angles = positions.float()[..., None, None] * (1.0 / ROTARY_BASE**exponents)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Apply the rotary embedding to the first dimensions of each head.

    The input has the real parts in the first half of the rotated dimensions and the imaginary parts in the second half;
    the output interleaves them, as the published weights require.

    Args:
        x: [B, T, heads, head_dim] queries or keys.
        table: Result of `rotary_table`.
    """
    half = table.shape[-1]
    real, imaginary, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    cos, sin = table[0], table[1]
    turned = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1).flatten(-2)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)
