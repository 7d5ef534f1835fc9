"""The region heads: encode coordinates and sizes as Fourier features, and decode them as distributions over bins.

A coordinate is a fraction of the image's width or height in 0..1. A size is (width, height) in the same unit, on a
logarithmic scale from 1/1024 to 1: bin b of n represents 2^(b / (n − 1) · 10 − 10).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moondream_cv.model.config import RegionConfig
from moondream_cv.model.layers import Linear, LoraPair, Mlp

SIZE_OCTAVES = 10.0
RegionLora = Mapping[str, Mapping[str, LoraPair]]  # {"coord_decoder": {"fc1", "fc2"}, "size_decoder": {"fc1", "fc2"}}


class RegionHeads(nn.Module):
    """Encoders and decoders of coordinates and sizes."""

    def __init__(self, config: RegionConfig) -> None:
        super().__init__()
        self.config = config
        self.coord_encoder = Linear(config.coord_feat_dim, config.dim)
        self.coord_decoder = Mlp(config.dim, config.inner_dim, config.coord_out_dim)
        self.size_encoder = Linear(config.size_feat_dim, config.dim)
        self.size_decoder = Mlp(config.dim, config.inner_dim, config.size_out_dim)
        self.coord_features = nn.Parameter(torch.empty(1, config.coord_feat_dim // 2))
        self.size_features = nn.Parameter(torch.empty(2, config.size_feat_dim // 2))

    def encode_coordinate(self, coordinate: Tensor) -> Tensor:
        """Return input embeddings: coordinates [..., 1] in 0..1 → [..., dim]."""
        return self.coord_encoder(_fourier(coordinate, self.coord_features))

    def decode_coordinate(self, hidden: Tensor, lora: RegionLora | None = None) -> Tensor:
        """Return logits over bins: hidden states [..., dim] → [..., coord_out_dim]; bin b is b / coord_out_dim."""
        return self.coord_decoder(hidden, lora and lora.get("coord_decoder"))

    def encode_size(self, size: Tensor) -> Tensor:
        """Return input embeddings: (width, height) [..., 2] in 0..1 → [..., dim]."""
        return self.size_encoder(_fourier(size, self.size_features))

    def decode_size(self, hidden: Tensor, lora: RegionLora | None = None) -> Tensor:
        """Return logits over bins: hidden states [..., dim] → [..., 2, size_out_dim / 2], for width and height."""
        return self.size_decoder(hidden, lora and lora.get("size_decoder")).unflatten(-1, (2, -1))


def _fourier(x: Tensor, frequencies: Tensor) -> Tensor:
    angles = 2 * math.pi * x @ frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def bin_to_coordinate(index: Tensor, bins: int) -> Tensor:
    """Convert bin indices of a coordinate to float32 fractions of the image's side."""
    return index.float() / bins


def bin_to_size(index: Tensor, bins: int) -> Tensor:
    """Convert bin indices of a size to float32 fractions of the image's side, 2^(index / (bins − 1) · 10 − 10)."""
    return torch.pow(2.0, (index.float() / (bins - 1)) * SIZE_OCTAVES - SIZE_OCTAVES)


def size_to_bin(size: Tensor, bins: int) -> Tensor:
    """Return the inverse of `bin_to_size` as a real number. Sizes below 1/1024 are raised to 1/1024."""
    return (size.clamp_min(2.0**-SIZE_OCTAVES).log2() + SIZE_OCTAVES) / SIZE_OCTAVES * (bins - 1)
