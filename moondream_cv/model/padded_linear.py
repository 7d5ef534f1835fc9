"""A linear layer whose input columns are padded to a multiple that matrix units of GPUs require."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

MULTIPLE = 16  # rows of bfloat16 then start at multiples of 32 bytes


class PaddedLinear(nn.Module):
    """Linear layer that computes with zero columns behind its weight. The result does not change.

    The patches of Moondream 2 have 588 values, for which CUDA has only slow products. Parameters and the state dict are
    those of the layer that it replaces.

    Attributes:
        weight: [out, in] weight.
        bias: [out] bias.
        padded_weight: [out, padded in] copy of the weight, which `forward` uses. It is no buffer, because buffers
            belong to the fingerprint of a model.
    """

    def __init__(self, layer: nn.Linear) -> None:
        """Share the parameters of a layer.

        Args:
            layer: Layer to replace. Its weight must not change afterwards.
        """
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.padding = -layer.in_features % MULTIPLE
        self.padded_weight = F.pad(layer.weight.detach(), (0, self.padding))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: [..., in] → [..., out]."""
        return F.linear(F.pad(x, (0, self.padding)), self.padded_weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PaddedLinear:
        """Move or convert the layer."""
        super()._apply(fn, recurse)
        self.padded_weight = fn(self.padded_weight)
        return self
