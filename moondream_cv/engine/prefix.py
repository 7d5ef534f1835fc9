"""The keys and values that requests on an image start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.model.text import LayerLora, attention


@dataclass(frozen=True)
class Prefix:
    """Keys and values of one image's tokens: a pair [1, kv_heads, P, head_dim] for each layer."""

    layers: tuple[tuple[Tensor, Tensor], ...]

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[2]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)


def encode_prefix(network: MoondreamNetwork, embeddings: Tensor, lora: Sequence[LayerLora] | None) -> list[Prefix]:
    """Keys and values of the tokens of images, which all see one another within an image.

    Args:
        embeddings: [I, P, dim] of I images.

    Returns:
        One prefix for each image; they share no memory, so that each can be let go by itself.
    """
    recorders = [_Recorder() for _ in network.text.blocks]
    positions = torch.arange(embeddings.shape[1], device=embeddings.device)[None]
    with torch.inference_mode():
        network.text(embeddings, positions, attends=recorders, lora=lora)
    return [
        Prefix(tuple((_one(r.keys, image), _one(r.values, image)) for r in recorders))
        for image in range(len(embeddings))
    ]


class _Recorder:
    """Full attention that keeps the keys and values."""

    keys: Tensor
    values: Tensor

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys, self.values = k, v
        return attention(q, k, v)


def _one(tensor: Tensor, image: int) -> Tensor:
    """[I, P, kv_heads, head_dim] → a copy of one image's [1, kv_heads, P, head_dim]."""
    return tensor[image : image + 1].transpose(1, 2).clone(memory_format=torch.contiguous_format)
