"""Linear layers whose bfloat16 weights are stored in oneDNN's blocked layout, for inference on CPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moondream_cv.memory_trimming import LOADING_INTERVAL, MemoryTrimmer, trim_memory
from moondream_cv.model.layers import can_use_onednn, onednn_linear
from moondream_cv.progress import Operation

MIN_VALUES = 2**20  # weights of a MB or less gain nothing
NUM_SAMPLES = 256  # evenly spaced values per weight, for the fingerprint of a model
_ROWS_HINT = 729  # the layout is the same for all numbers of rows


class PackedLinear(nn.Module):
    """A linear layer with a packed weight.

    Without packing, oneDNN rearranges the weight for each product: a product with one row takes 1.5 times as long, and
    one with many rows 1.07 times as long. Outputs are equal to those of `Linear`.

    Attributes:
        in_features: Width of inputs.
        out_features: Width of outputs.
        bias: [out] bias; None: no bias.
        samples: Result of `sample_values` for the weight.
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        """Pack a weight.

        Args:
            weight: [out, in] bfloat16 weight. The layer keeps a copy of it.
            bias: [out] bias; None: no bias.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self._store(weight.detach())

    @property
    def weight(self) -> Tensor:
        """[out, in] weight, as a copy."""
        return self._weight.to_dense() if self._weight.is_mkldnn else self._weight

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: [..., in] → [..., out]."""
        return self._apply_to(x, "none", "")

    def gelu(self, x: Tensor) -> Tensor:
        """Apply the layer and then the tanh form of GELU: [..., in] → [..., out]."""
        return self._apply_to(x, "gelu", "tanh")

    def extra_repr(self) -> str:
        """Return the sizes for `repr`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply_to(self, x: Tensor, activation: str, algorithm: str) -> Tensor:
        if self._weight.is_mkldnn and can_use_onednn(x):
            return onednn_linear(x, self._weight, self.bias, activation, algorithm)
        y = F.linear(x, self.weight, self.bias)
        return F.gelu(y, approximate="tanh") if activation == "gelu" else y

    def _store(self, weight: Tensor) -> None:
        self.samples = sample_values(weight).clone()
        is_packable = weight.dtype == torch.bfloat16 and can_use_onednn(weight, is_training=False)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT) if is_packable else weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Move or convert the layer. Where oneDNN has no bfloat16 products, its weight is not packed."""
        self._store(fn(self.weight))
        super()._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state: dict[str, Any],
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        key, expected = f"{prefix}weight", (self.out_features, self.in_features)
        weight = state.pop(key, None)
        if weight is None:
            if strict:
                missing.append(key)
        elif weight.shape != expected:
            errors.append(f"{key} must have the shape {list(expected)}, got {list(weight.shape)}")
        else:
            self._store(weight.to(self._weight.device, self._weight.dtype))
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle the weight: packed weights have neither."""
        return type(self), (self.weight, self.bias)


def sample_values(tensor: Tensor) -> Tensor:
    """Return up to 256 evenly spaced values of a tensor.

    Args:
        tensor: Tensor of any shape.
    """
    flat = tensor.reshape(-1)
    return flat[:: max(1, flat.numel() // NUM_SAMPLES)][:NUM_SAMPLES]


def pack_weights(network: nn.Module, operation: Operation | None = None) -> None:
    """Replace the large bfloat16 layers of a network on the CPU by packed layers, if oneDNN supports them.

    Args:
        network: Network for inference.
        operation: Receives the progress.
    """
    # Names only: a list of the layers would keep all unpacked weights in memory.
    names = [
        name
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear)
        and layer.weight.numel() >= MIN_VALUES
        and layer.weight.dtype == torch.bfloat16
        and can_use_onednn(layer.weight, is_training=False)
    ]
    trimmer = MemoryTrimmer(LOADING_INTERVAL)
    for i, name in enumerate(names):
        if operation is not None:
            operation.update("Packing weights", i, len(names), "layers")
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        network.set_submodule(name, PackedLinear(layer.weight, layer.bias))
        trimmer.trim()
    trim_memory()
