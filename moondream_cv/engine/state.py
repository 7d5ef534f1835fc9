"""The state of one request being decoded: its keys and values, and where it stands.

It knows embeddings and hidden states; what they mean is the business of `regions.py` and `text.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.model.text import LayerLora

GROWTH = 64  # positions by which a full cache grows at least


class LayerKeysValues:
    """Keys and values of one layer, in a buffer that grows when it is full."""

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        self.length = keys.shape[2]
        self._keys, self._values = _with_room(keys, room), _with_room(values, room)

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append [1, kv_heads, T, head_dim]; give back views of all up to now."""
        stop = self.length + keys.shape[2]
        if stop > self._keys.shape[2]:
            room = max(GROWTH, keys.shape[2], self.length // 4)
            self._keys = _with_room(self._keys[:, :, : self.length], room)
            self._values = _with_room(self._values[:, :, : self.length], room)
        self._keys[:, :, self.length : stop] = keys
        self._values[:, :, self.length : stop] = values
        self.length = stop
        return self._keys[:, :, :stop], self._values[:, :, :stop]


@dataclass(frozen=True)
class Prefix:
    """Keys and values that a request starts from: of an image, or none. A pair [1, kv_heads, P, head_dim] a layer."""

    layers: tuple[tuple[Tensor, Tensor], ...]

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[2]


class DecodingState:
    """One row: feed it embeddings, get hidden states."""

    def __init__(self, network: MoondreamNetwork, prefix: Prefix, lora: Sequence[LayerLora] | None, room: int) -> None:
        self._network, self._lora = network, lora
        self._caches = [LayerKeysValues(k, v, room) for k, v in prefix.layers]

    @property
    def length(self) -> int:
        return self._caches[0].length

    @property
    def room(self) -> int:
        """Positions of the model's context that are left."""
        return self._network.config.text.max_context - self.length

    def feed(self, embeddings: Tensor) -> Tensor:
        """Append [1, T, dim] embeddings, each seeing all before it; give back the last hidden state [1, dim]."""
        count, start = embeddings.shape[1], self.length
        device = embeddings.device
        mask = None
        if count > 1:
            mask = torch.ones(count, start + count, dtype=torch.bool, device=device).tril(start)
        positions = torch.arange(start, start + count, device=device)[None]
        with torch.inference_mode():
            return self._network.text(embeddings, positions, mask, self._caches, self._lora)[:, -1]


def encode_prefix(network: MoondreamNetwork, embeddings: Tensor, lora: Sequence[LayerLora] | None) -> Prefix:
    """Keys and values of [1, P, dim] embeddings that all see one another."""
    caches = [LayerKeysValues(k, v, embeddings.shape[1]) for k, v in empty_prefix(network).layers]
    positions = torch.arange(embeddings.shape[1], device=embeddings.device)[None]
    with torch.inference_mode():
        network.text(embeddings, positions, None, caches, lora)
    nothing = embeddings.new_empty(1, network.config.text.n_kv_heads, 0, network.config.text.head_dim)
    return Prefix(tuple(c.update(nothing, nothing) for c in caches))


def empty_prefix(network: MoondreamNetwork) -> Prefix:
    """Where a request without an image starts."""
    config = network.config.text
    nothing = torch.empty(1, config.n_kv_heads, 0, config.head_dim, device=network.device, dtype=network.dtype)
    return Prefix(((nothing, nothing),) * config.n_layers)


def _with_room(tensor: Tensor, room: int) -> Tensor:
    batch, heads, length, dim = tensor.shape
    buffer = tensor.new_empty(batch, heads, length + room, dim)
    buffer[:, :, :length] = tensor
    return buffer
