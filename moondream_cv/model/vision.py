"""The vision encoder: crops → patch features → one grid of image tokens. The engine cuts images into crops."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moondream_cv.model.config import VisionConfig
from moondream_cv.model.layers import Linear, Mlp, full_attention


class VisionAttention(nn.Module):
    """Multi-head self-attention over the patches of one crop, without a mask."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.n_heads, dim // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [3, N, heads, P, head_dim]
        out = full_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, length, dim))


class VisionBlock(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(config.enc_dim)
        self.attn = VisionAttention(config.enc_dim, config.enc_n_heads)
        self.ln2 = nn.LayerNorm(config.enc_dim)
        self.mlp = Mlp(config.enc_dim, config.enc_ff_dim, config.enc_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class VisionEncoder(nn.Module):
    """ViT over global and local crops, and the projection of both to the text decoder's width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_emb = Linear(config.in_channels * config.enc_patch_size**2, config.enc_dim)
        self.pos_emb = nn.Parameter(torch.zeros(1, config.num_patches, config.enc_dim))
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.enc_n_layers))
        self.post_ln = nn.LayerNorm(config.enc_dim)
        self.proj_mlp = Mlp(2 * config.enc_dim, config.proj_inner_dim, config.proj_out_dim)

    def forward(self, crops: Tensor, on_block: Callable[[int], None] | None = None) -> Tensor:
        """Encode crops independently of one another.

        Args:
            crops: [N, 3, crop_size, crop_size] RGB in −1..1.
            on_block: Function that receives the number of complete blocks after each block; it must be None if the
                encoder is compiled.

        Returns:
            [N, num_patches, enc_dim] features, patches row by row.
        """
        n, channels, height, width = crops.shape
        p = self.config.enc_patch_size
        patches = crops.view(n, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        x = self.patch_emb(patches.reshape(n, -1, channels * p * p)) + self.pos_emb
        for number, block in enumerate(self.blocks, 1):
            x = block(x)
            if on_block is not None:
                on_block(number)
        return self.post_ln(x)

    def join(self, features: Tensor, tilings: Sequence[tuple[int, int]]) -> Tensor:
        """Join the features of each image's crops and project them to image tokens.

        Args:
            features: [N, num_patches, enc_dim] features; for each image its global crop, then its local crops row by
                row.
            tilings: (rows, columns) of local crops of each image.

        Returns:
            [images, num_patches, proj_out_dim] image tokens.
        """
        grid, joined, start = self.config.grid, [], 0
        for rows, columns in tilings:
            stop = start + 1 + rows * columns
            local = stitch(
                features[start + 1 : stop].unflatten(1, (grid, grid)), rows, columns, self.config.overlap_margin
            )
            pooled = _pool(local, grid)  # [grid², enc_dim]
            joined.append(torch.cat((features[start], pooled), dim=-1))
            start = stop
        return self.proj_mlp(torch.stack(joined))


def stitch(tiles: Tensor, rows: int, columns: int, margin: int) -> Tensor:
    """Stitch overlapping tiles together. Tiles are cropped by the margin at sides with a neighbor.

    Args:
        tiles: [rows · columns, grid, grid, C] tiles, row by row.
        rows: Number of rows.
        columns: Number of columns.
        margin: Patches at each side of a tile that its neighbor also covers.

    Returns:
        [rows · window + 2 · margin, columns · window + 2 · margin, C] with window = grid − 2 · margin.
    """
    size = tiles.shape[1]

    def kept(index: int, count: int) -> slice:
        return slice(0 if index == 0 else margin, size if index == count - 1 else size - margin)

    strips = [
        torch.cat([tiles[r * columns + c][kept(r, rows), kept(c, columns)] for c in range(columns)], dim=1)
        for r in range(rows)
    ]
    return torch.cat(strips)


def _pool(features: Tensor, grid: int) -> Tensor:
    """Average-pool [H, W, C] features to [grid², C]."""
    planes = features.permute(2, 0, 1)[None]
    if planes.device.type == "mps":  # not implemented there for sizes that do not divide
        pooled = F.adaptive_avg_pool2d(planes.cpu(), grid).to(planes.device)
    else:
        pooled = F.adaptive_avg_pool2d(planes, grid)
    return pooled[0].flatten(1).T
