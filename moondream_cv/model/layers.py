"""Building blocks that the vision encoder, the text decoder and the region heads share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moondream_cv.model.hardware import has_onednn_kernels, supports_bfloat16
from moondream_cv.model.quantized_linear import Int8Linear

LoraPair = tuple[Tensor, Tensor]  # A [rank, in], B [out, rank]
ROTARY_BASE = 10000.0
MIN_BLOCKED_LENGTH = 256  # sequences from which `_blocked_attention` is faster than PyTorch's kernel
HEADS_PER_BLOCK = 4  # their scores for 729 patches take 4 MB in bfloat16, which fits into the cache of most CPUs
_HAS_ONEDNN = has_onednn_kernels()


class SegmentedPair(NamedTuple):
    """Low-rank pairs of several adapters, each for a part of the tokens of a batch.

    Attributes:
        lengths: Number of consecutive tokens of each part.
        pairs: A [rank, in] and B [out, rank] of each part; None: no update.
    """

    lengths: tuple[int, ...]
    pairs: tuple[LoraPair | None, ...]


class Linear(nn.Linear):
    """A linear layer that uses oneDNN's kernels on x86 CPUs during inference.

    For a few input rows they take less than half of the time of `F.linear`, and `gelu` takes no extra pass over the
    output.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: [..., in] → [..., out]."""
        return onednn_linear(x, self.weight, self.bias) if can_use_onednn(x) else super().forward(x)

    def gelu(self, x: Tensor) -> Tensor:
        """Apply the layer and then the tanh form of GELU: [..., in] → [..., out]."""
        if can_use_onednn(x):
            return onednn_linear(x, self.weight, self.bias, "gelu", "tanh")
        return F.gelu(super().forward(x), approximate="tanh")


def onednn_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", algorithm: str = ""
) -> Tensor:
    """Compute a linear layer and an activation with oneDNN. `can_use_onednn` must be true for the input.

    Args:
        x: [..., in] input.
        weight: [out, in] weight, plain or packed.
        bias: [out] bias; None: no bias.
        activation: "none" or "gelu".
        algorithm: "tanh" for GELU.

    Returns:
        [..., out] output.
    """
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)
    return result


def can_use_onednn(x: Tensor, is_training: bool | None = None) -> bool:
    """Return whether oneDNN has a fast kernel for the input of a linear layer. It has no backward pass.

    Args:
        x: Input, or another tensor of the same device and data type.
        is_training: Whether gradients are computed; None: whether PyTorch records them.
    """
    if not _HAS_ONEDNN or x.device.type != "cpu" or not x.numel():
        return False
    if torch.is_grad_enabled() if is_training is None else is_training:
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and supports_bfloat16())


def add_lora(y: Tensor, x: Tensor, pair: LoraPair | SegmentedPair | None) -> Tensor:
    """Add the low-rank update of the input `x` to the output `y` of a linear layer; without a pair, return `y`.

    Args:
        y: [B, T, out] output.
        x: [B, T, in] input.
        pair: Update; a `SegmentedPair` divides the T tokens.
    """
    if pair is None:
        return y
    if not isinstance(pair, SegmentedPair):
        return y + F.linear(F.linear(x, pair[0]), pair[1])
    parts = zip(y.split(pair.lengths, dim=1), x.split(pair.lengths, dim=1), pair.pairs, strict=True)
    return torch.cat([add_lora(*part) for part in parts], dim=1)


def full_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention without a mask.

    Args:
        q: [N, heads, P, head_dim] queries.
        k: [N, heads, P, head_dim] keys.
        v: [N, heads, P, head_dim] values.

    Returns:
        [N, heads, P, head_dim] outputs.
    """
    if q.device.type == "cpu" and q.shape[2] >= MIN_BLOCKED_LENGTH and not torch.is_grad_enabled():
        return _blocked_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def _blocked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute the attention of a few heads at a time, as separate matrix products.

    On a CPU, PyTorch's fused kernel reaches less than a third of the product rate. Here the scores are rounded to the
    data type of the inputs. The result has the strides of a [N, P, heads, head_dim] tensor.
    """
    batch, heads, length, head_dim = q.shape
    out = q.new_empty(batch, length, heads, head_dim).transpose(1, 2)
    ignored = q.new_empty(1, 1, 1)
    step = max(HEADS_PER_BLOCK, torch.get_num_threads())
    for n in range(batch):
        for start in range(0, heads, step):
            block = n, slice(start, start + step)
            scores = torch.baddbmm(ignored, q[block], k[block].transpose(1, 2), beta=0, alpha=head_dim**-0.5)
            out[block] = torch.bmm(torch.softmax(scores, dim=-1), v[block])
    return out


class Mlp(nn.Module):
    """Two linear layers with the tanh form of GELU between them."""

    def __init__(self, dim: int, inner_dim: int, out_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, inner_dim)
        self.fc2 = Linear(inner_dim, out_dim)

    def forward(self, x: Tensor, lora: Mapping[str, LoraPair | SegmentedPair] | None = None) -> Tensor:
        lora = lora or {}
        if not lora and isinstance(self.fc1, Int8Linear) and isinstance(self.fc2, Int8Linear):
            return self.fc1.gelu_then(x, self.fc2)
        pair = lora.get("fc1")
        if pair is None and hasattr(self.fc1, "gelu"):  # a layer that PEFT has wrapped has no `gelu`
            x = self.fc1.gelu(x)
        else:
            x = F.gelu(add_lora(self.fc1(x), x, pair), approximate="tanh")
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
