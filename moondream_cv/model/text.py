"""The text decoder: embeddings in, hidden states and logits out.

It keeps no state: positions, mask and cache come with each call, so that rows of any kind can share a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moondream_cv.model.config import TextConfig
from moondream_cv.model.layers import LoraPair, Mlp, add_lora, rotary_table, rotate

LayerLora = Mapping[str, Mapping[str, LoraPair]]  # {"attn": {"qkv", "proj"}, "mlp": {"fc1", "fc2"}}


class LayerCache(Protocol):
    """Where one layer keeps its keys and values between calls."""

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values [B, kv_heads, T, head_dim]; give back all that the new positions may see."""


class TextAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.qkv = nn.Linear(config.dim, (config.n_heads + 2 * config.n_kv_heads) * config.head_dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(
        self,
        x: Tensor,
        rotary: Tensor,
        mask: Tensor | None,
        cache: LayerCache | None,
        lora: Mapping[str, LoraPair],
    ) -> Tensor:
        batch, length, dim = x.shape
        qkv = add_lora(self.qkv(x), x, lora.get("qkv")).view(batch, length, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split((self.n_heads, self.n_kv_heads, self.n_kv_heads), dim=1)  # [B, heads, T, head_dim]
        q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            k, v = cache.update(k, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.n_heads != self.n_kv_heads)
        out = self.proj(out.transpose(1, 2).reshape(batch, length, dim))
        # The published adapters were trained with this one on the block's input, not on the attention's output.
        return add_lora(out, x, lora.get("proj"))


class TextBlock(nn.Module):
    """A parallel block: one layer norm feeds the attention and the MLP, and both are added to the residual."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(config.dim)
        self.attn = TextAttention(config)
        self.mlp = Mlp(config.dim, config.ff_dim, config.dim)

    def forward(
        self, x: Tensor, rotary: Tensor, mask: Tensor | None, cache: LayerCache | None, lora: LayerLora | None
    ) -> Tensor:
        lora = lora or {}
        normed = self.ln(x)
        return x + self.attn(normed, rotary, mask, cache, lora.get("attn", {})) + self.mlp(normed, lora.get("mlp"))


class TextDecoder(nn.Module):
    """The decoder's blocks, the token embedding and the language head."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Parameter(torch.empty(config.vocab_size, config.dim))
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.n_layers))
        self.post_ln = nn.LayerNorm(config.dim)
        self.lm_head = nn.Linear(config.dim, config.vocab_size)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [...] → embeddings [..., dim]."""
        return F.embedding(ids, self.wte)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        caches: Sequence[LayerCache] | None = None,
        lora: Sequence[LayerLora] | None = None,
    ) -> Tensor:
        """Run the blocks.

        Args:
            x: [B, T, dim] embeddings.
            positions: [B, T] integers.
            mask: Boolean, broadcastable to [B, heads, T, S]; True where attention is allowed. None: everywhere.
            caches: One per layer, or None when all that is attended to stands in `x`.
            lora: One adapter per layer.

        Returns:
            [B, T, dim] hidden states before `post_ln`: the region heads read these.
        """
        rotary = rotary_table(positions, self.config.rotary_dim)
        for i, block in enumerate(self.blocks):
            x = block(x, rotary, mask, None if caches is None else caches[i], None if lora is None else lora[i])
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., dim] → next-token logits [..., vocab_size]."""
        return self.lm_head(self.post_ln(hidden))


def prefix_mask(length: int, prefix: int, device: torch.device | str | None = None) -> Tensor:
    """[length, length] boolean mask: the first `prefix` positions see one another, the others what is before them."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    mask[:prefix, :prefix] = True
    return mask
