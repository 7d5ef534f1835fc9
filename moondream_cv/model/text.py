"""The text decoder: embeddings in, hidden states and logits out.

The decoder is stateless: positions and attention are arguments of each call, so that sequences of any kind can share a
batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moondream_cv.model.config import TextConfig
from moondream_cv.model.layers import (
    Linear,
    LoraPair,
    Mlp,
    SegmentedPair,
    add_lora,
    full_attention,
    rotary_table,
    rotate,
)

MIN_REDUCED_QUERIES = 8  # queries from which CPU attention is faster in bfloat16 than in float32
LayerLora = Mapping[str, Mapping[str, LoraPair]]
"""Pairs of one layer: {"attn": {"qkv", "proj", "out"}, "mlp": {"fc1", "fc2"}}. Both "proj" and "out" are added to the
output of the attention's projection: "proj" acts on the input of the block, "out" on the output of the attention."""
AppliedLora = Mapping[str, Mapping[str, LoraPair | SegmentedPair]]
"""The same for a batch whose tokens may have several adapters."""


class Attend(Protocol):
    """Attention of one layer, to the tokens of the call and to cached tokens of earlier calls."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Compute attention outputs.

        Args:
            q: [B, T, heads, head_dim] queries.
            k: [B, T, kv_heads, head_dim] keys.
            v: [B, T, kv_heads, head_dim] values.

        Returns:
            [B, T, heads, head_dim] outputs.
        """


class TextAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.qkv = Linear(config.dim, (config.n_heads + 2 * config.n_kv_heads) * config.head_dim)
        self.proj = Linear(config.dim, config.dim)

    def forward(
        self,
        x: Tensor,
        rotary: Tensor,
        mask: Tensor | None,
        attend: Attend | None,
        lora: Mapping[str, LoraPair | SegmentedPair],
    ) -> Tensor:
        batch, length, dim = x.shape
        qkv = add_lora(self.qkv(x), x, lora.get("qkv")).view(batch, length, -1, self.head_dim)
        turned, v = qkv.split((self.n_heads + self.n_kv_heads, self.n_kv_heads), dim=2)
        q, k = rotate(turned, rotary).split((self.n_heads, self.n_kv_heads), dim=2)
        out = attention(q, k, v, mask) if attend is None else attend(q, k, v)
        out = out.reshape(batch, length, dim)
        projected = add_lora(self.proj(out), out, lora.get("out"))
        # Published adapters were trained with this pair on the input of the block, not on the output of the attention.
        return add_lora(projected, x, lora.get("proj"))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention.

    Args:
        q: [B, T, heads, head_dim] queries.
        k: [B, S, kv_heads, head_dim] keys. If there are fewer KV heads than heads, several heads share one.
        v: [B, S, kv_heads, head_dim] values.
        mask: Broadcastable to [B, heads, T, S]; attention is allowed at True, or at 0 in a mask of floats. None: all
            positions attend to one another.

    Returns:
        [B, T, heads, head_dim] outputs.
    """
    grouped = q.shape[2] != k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if mask is None and not grouped and q.shape[2] == k.shape[2]:
        return full_attention(q, k, v).transpose(1, 2)
    dtype = q.dtype
    if q.device.type == "cpu" and dtype != torch.float32 and q.shape[2] < MIN_REDUCED_QUERIES:
        # PyTorch's kernel takes a third of the time in float32, including the conversion.
        q, k, v = q.float(), k.float(), v.float()
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped).transpose(1, 2).to(dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped).transpose(1, 2)


class TextBlock(nn.Module):
    """A parallel block: one layer norm feeds the attention and the MLP, and both are added to the residual."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(config.dim)
        self.attn = TextAttention(config)
        self.mlp = Mlp(config.dim, config.ff_dim, config.dim)

    def forward(
        self, x: Tensor, rotary: Tensor, mask: Tensor | None, attend: Attend | None, lora: AppliedLora | None
    ) -> Tensor:
        lora = lora or {}
        normed = self.ln(x)
        return x + self.attn(normed, rotary, mask, attend, lora.get("attn", {})) + self.mlp(normed, lora.get("mlp"))


class TextDecoder(nn.Module):
    """The decoder's blocks, the token embedding and the language head."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Parameter(torch.empty(config.vocab_size, config.dim))
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.n_layers))
        self.post_ln = nn.LayerNorm(config.dim)
        self.lm_head = Linear(config.dim, config.vocab_size)

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings of tokens: IDs [...] → [..., dim], in the data type of the activations."""
        return F.embedding(ids, self.wte).to(self.post_ln.weight.dtype)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        attends: Sequence[Attend] | None = None,
        adapter: Sequence[AppliedLora] | None = None,
        checkpointing: bool = False,
    ) -> Tensor:
        """Run the blocks.

        Args:
            x: [B, T, dim] input embeddings.
            positions: [B, T] integer positions in the context.
            mask: Boolean, broadcastable to [B, heads, T, T]; attention is allowed at True. None: everywhere.
            attends: Attention of each layer, for example with a KV cache; None: attention within `x` under `mask`.
            adapter: Low-rank updates of each layer; None: no adapter.
            checkpointing: Recompute the activations of each block in the backward pass instead of keeping them.

        Returns:
            [B, T, dim] hidden states before `post_ln`, the inputs of the region heads.
        """
        rotary = rotary_table(positions, self.config.rotary_dim)
        for i, block in enumerate(self.blocks):
            arguments = x, rotary, mask, attends and attends[i], adapter and adapter[i]
            x = checkpoint(block, *arguments, use_reentrant=False) if checkpointing else block(*arguments)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the next-token logits: hidden states [..., dim] → [..., vocab_size]."""
        return self.lm_head(self.post_ln(hidden))


def prefix_mask(length: int, prefix: int, device: torch.device | str | None = None) -> Tensor:
    """Return a causal mask with a bidirectional prefix.

    Args:
        length: Number of positions.
        prefix: Number of positions at the start that attend to one another.
        device: Device of the mask.

    Returns:
        [length, length] booleans, True if attention is allowed.
    """
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    mask[:prefix, :prefix] = True
    return mask
