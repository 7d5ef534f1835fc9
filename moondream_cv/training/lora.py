"""Trainable adapters: low-rank pairs in float32, next to frozen weights in any data type."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moondream_cv.model.adapters import Adapter, adapter_from_tensors, adapter_shapes
from moondream_cv.model.config import MoondreamConfig


class LoraParameters:
    """The trainable tensors of an adapter.

    An output y of a layer becomes y + B A x, with a scale of 1 (Hu et al., "LoRA", 2021,
    https://arxiv.org/abs/2106.09685). The pair `attn.out` acts on the output of the attention.

    Attributes:
        config: Configuration of the checkpoint.
        tensors: A [rank, in] and B [out, rank] of each layer by name, in float32.
    """

    def __init__(self, config: MoondreamConfig, tensors: Mapping[str, Tensor]) -> None:
        """Use existing tensors.

        Args:
            config: Configuration of the checkpoint.
            tensors: Tensors with the names and shapes of `adapter_shapes`; they are copied.
        """
        self.config = config
        self.tensors = {name: tensor.detach().float().clone().requires_grad_() for name, tensor in tensors.items()}

    @classmethod
    def initialize(cls, config: MoondreamConfig, rank: int, seed: int, device: torch.device) -> LoraParameters:
        """Return an adapter that changes nothing: A is uniform in ±1/√in, and B is 0.

        Args:
            config: Configuration of the checkpoint.
            rank: Rank of all pairs.
            seed: Random seed; the same on all devices.
            device: Device of the tensors.
        """
        generator = torch.Generator(device="cpu").manual_seed(seed)
        tensors = {}
        for name, shape in adapter_shapes(config, rank).items():
            tensor = torch.zeros(shape, device="cpu", dtype=torch.float32)
            if name.endswith(".A"):
                tensor.uniform_(-1, 1, generator=generator).mul_(shape[1] ** -0.5)
            tensors[name] = tensor.to(device)
        return cls(config, tensors)

    @property
    def rank(self) -> int:
        """Rank of the pairs."""
        return next(len(tensor) for name, tensor in self.tensors.items() if name.endswith(".A"))

    def adapter(self, dtype: torch.dtype) -> Adapter:
        """Return the adapter in the data type of the activations. Gradients reach the tensors.

        Args:
            dtype: Data type of the activations.
        """
        return adapter_from_tensors("", {name: tensor.to(dtype) for name, tensor in self.tensors.items()}, self.config)

    @torch.inference_mode(False)
    def detached(self, name: str, dtype: torch.dtype) -> Adapter:
        """Return a copy of the adapter for inference, without pairs that change nothing.

        Args:
            name: Name of the adapter.
            dtype: Data type of the activations.
        """
        tensors = {key: tensor.detach().to(dtype, copy=True) for key, tensor in self.tensors.items()}
        return adapter_from_tensors(name, tensors, self.config).without_zeros()
