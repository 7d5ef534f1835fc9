"""The whole network: vision encoder, text decoder and region heads under the published key names."""

from __future__ import annotations

import math

import torch
from torch import nn

from moondream_cv.model.config import MoondreamConfig
from moondream_cv.model.region import RegionHeads
from moondream_cv.model.text import TextDecoder
from moondream_cv.model.vision import VisionEncoder


class MoondreamNetwork(nn.Module):
    """Moondream 2 in the sizes of a config: the weights and the forward passes of the components."""

    def __init__(self, config: MoondreamConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config.vision)
        self.text = TextDecoder(config.text)
        self.region = RegionHeads(config.region)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.text.wte.device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the activations, and of all weights that are not quantized except the token embeddings."""
        return self.text.post_ln.weight.dtype

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Initialize the weights with random numbers, for training.

        Patch positions are initialized with two-dimensional sines and cosines of amplitude 0.7. With small random
        values, the tiny model stays at chance level for more than 10,000 images.

        Args:
            generator: Source of random numbers; None: torch's default generator.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = 1 / math.sqrt(module.in_features)
                module.weight.normal_(0.0, bound, generator=generator)
                module.bias.zero_()
            elif isinstance(module, nn.LayerNorm):
                module.weight.fill_(1.0)
                module.bias.zero_()
        self.text.wte.normal_(0.0, 0.5, generator=generator)
        self.text.lm_head.weight.normal_(0.0, 0.02, generator=generator)
        self.region.coord_features.normal_(0.0, 4.0, generator=generator)
        self.region.size_features.normal_(0.0, 2.0, generator=generator)
        self.vision.pos_emb.copy_(0.7 * _sincos_2d(self.config.vision.grid, self.config.vision.enc_dim))


def _sincos_2d(grid: int, dim: int) -> torch.Tensor:
    """Return [1, grid², dim] sines and cosines of row and column, at geometrically spaced wavelengths."""
    quarter = dim // 4
    frequencies = (
        torch.pow(2.0 * grid, -torch.arange(quarter, dtype=torch.float32, device="cpu") / max(quarter - 1, 1)) * math.pi
    )
    axis = torch.arange(grid, dtype=torch.float32, device="cpu")[:, None] * frequencies  # [grid, quarter]
    rows = torch.cat((axis.sin(), axis.cos()), -1)[:, None].expand(grid, grid, -1)
    columns = torch.cat((axis.sin(), axis.cos()), -1)[None].expand(grid, grid, -1)
    table = torch.zeros(grid, grid, dim, dtype=torch.float32, device="cpu")
    table[..., : 4 * quarter] = torch.cat((rows, columns), -1)
    return table.view(1, grid * grid, dim)
