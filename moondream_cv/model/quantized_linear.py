"""Linear layers with quantized weights, for inference.

Inputs have the data type of the activations, and so have outputs. Results are batch invariant: each input row has its
own scale. If the input requires a gradient, the layers dequantize their weights, so that adapters can be trained.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moondream_cv.model.quantization import INT8_MAX, row_chunks

logger = logging.getLogger(__name__)

ROWS_PER_CHUNK = 256
"""Input rows of one int8 product on a CPU. Its input and its output fit into the cache of most CPUs."""

_REDUCED_INT8_MAX = 63  # sums of two products with 8-bit weights fit into 16 bits
_SMALLEST_SCALE = 1e-12  # scale of an input row of zeros
_MIN_CUDA_ROWS = 32  # `torch._int_mm` requires more than 16 rows


class QuantizedLinear(nn.Module):
    """Base class of linear layers with quantized weights.

    Attributes:
        in_features: Width of inputs.
        out_features: Width of outputs.
        bias: [out] float32 bias; None: no bias.
    """

    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def extra_repr(self) -> str:
        """Return the sizes for `repr`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the [out, in] weight in full precision."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: [..., in] → [..., out]."""
        return self._apply_to(x, gelu=False)

    def gelu(self, x: Tensor) -> Tensor:
        """Apply the layer and then the tanh form of GELU: [..., in] → [..., out]."""
        return self._apply_to(x, gelu=True)

    def _apply_to(self, x: Tensor, gelu: bool) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            y = F.linear(x, self.dequantize(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
            return F.gelu(y, approximate="tanh") if gelu else y
        rows = x.reshape(-1, self.in_features)
        return self._product(rows, gelu).view(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor, gelu: bool) -> Tensor:
        """Return the output of the layer for [rows, in]."""
        raise NotImplementedError

    def _finish(self, y: Tensor, gelu: bool) -> Tensor:
        """Add the bias to a product, in its memory, and apply GELU."""
        if self.bias is not None:
            y.add_(self.bias)
        return gelu_(y) if gelu else y


class Int8Linear(QuantizedLinear):
    """A linear layer with 8-bit weights and dynamically quantized inputs.

    On CPUs, oneDNN computes the products of integers. CUDA devices compute them in tensor cores. On other devices, and
    for sizes that these do not support, the weight is dequantized for each call.

    Attributes:
        weight_scale: [out] float32 scales.
    """

    weight_scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        """Create a layer.

        Args:
            weight: [out, in] int8 weight.
            scale: [out] scales.
            bias: [out] bias; None: no bias.
        """
        super().__init__(weight.shape[1], weight.shape[0], bias)
        self.register_buffer("weight_scale", scale.detach().float())
        self._store(weight)

    @property
    def weight(self) -> Tensor:
        """[out, in] int8 weight."""
        return self._weight.to_dense().T if self._weight.is_mkldnn else self._weight

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the [out, in] weight in full precision."""
        weight = self.weight
        values = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        for chunk in row_chunks(weight.shape):
            values[chunk] = weight[chunk].float().mul_(self.weight_scale[chunk, None])
        return values

    def _store(self, weight: Tensor) -> None:
        """Keep one copy of the weight, in the layout of the product."""
        uses_onednn = weight.device.type == "cpu" and onednn_int8_max() is not None
        self._weight = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None) if uses_onednn else weight

    def _product(self, x: Tensor, gelu: bool) -> Tensor:
        if self._weight.is_mkldnn:
            return self._onednn_product(x, gelu)
        is_aligned = self.in_features % 8 == 0 and self.out_features % 8 == 0
        if x.device.type == "cuda" and is_aligned:
            return self._cuda_product(x, gelu)
        y = F.linear(x, self._weight.to(x.dtype)).float().mul_(self.weight_scale)
        return self._finish(y, gelu).to(x.dtype)

    def _onednn_product(self, x: Tensor, gelu: bool) -> Tensor:
        if len(x) <= ROWS_PER_CHUNK:
            return self._onednn_chunk(x, gelu).to(x.dtype)
        out = torch.empty(len(x), self.out_features, dtype=x.dtype, device=x.device)
        for source, target in zip(x.split(ROWS_PER_CHUNK), out.split(ROWS_PER_CHUNK), strict=True):
            target.copy_(self._onednn_chunk(source, gelu))
        return out

    def _onednn_chunk(self, x: Tensor, gelu: bool) -> Tensor:
        largest = onednn_int8_max() or INT8_MAX
        integers, scale = quantize_rows(x, largest)
        return self._finish(_onednn_matmul(integers, largest, self._weight, self.weight_scale).mul_(scale), gelu)

    def _cuda_product(self, x: Tensor, gelu: bool) -> Tensor:
        integers, scale = quantize_rows(x, INT8_MAX)
        padded = F.pad(integers, (0, 0, 0, max(0, _MIN_CUDA_ROWS - len(x))))
        y = torch._int_mm(padded, self._weight.T)[: len(x)].float().mul_(scale).mul_(self.weight_scale)
        return self._finish(y, gelu).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        """Move the layer to another device. Scales and bias keep their data type."""
        weight = fn(self.weight)
        self._store(weight)
        self.weight_scale = self.weight_scale.to(weight.device)
        self.bias = None if self.bias is None else self.bias.to(weight.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle the integers: packed weights have neither."""
        return type(self), (self.weight.contiguous(), self.weight_scale, self.bias)


def quantize_rows(x: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Quantize each row of activations.

    Args:
        x: [rows, in] activations.
        largest: Largest integer.

    Returns:
        [rows, in] int8 integers in −largest..largest, and the [rows, 1] float32 scales.
    """
    x = x.float()
    peak = torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_())  # faster than abs() and amax()
    scale = peak.div_(largest).add_(_SMALLEST_SCALE)
    return torch.mul(x, scale.reciprocal()).round_().to(torch.int8), scale


def gelu_(x: Tensor) -> Tensor:
    """Apply the tanh form of GELU in place: x · sigmoid(√(8/π) · (x + 0.044715 · x³)).

    On CPUs, this takes half of the time of `F.gelu`.
    """
    factor = x.new_full((), 1.5957691216057308)  # √(8/π)
    inner = torch.addcmul(factor, x, x, value=0.044715 * 1.5957691216057308).mul_(x)
    return x.mul_(inner.sigmoid_())


@functools.cache
def onednn_int8_max() -> int | None:
    """Return the largest integer of inputs for which oneDNN's int8 products are exact on this CPU.

    Without VNNI instructions, sums of two products saturate at 16 bits, so inputs have 7 bits.

    Returns:
        127 or 63; None: oneDNN has no fast int8 products here.
    """
    # On other processors, oneDNN computes them with slow reference code.
    if not torch.backends.mkldnn.is_available() or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return None
    try:
        weight = torch.full((16, 64), INT8_MAX, dtype=torch.int8, device="cpu")
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        scale = torch.ones(16, dtype=torch.float32, device="cpu")
        for largest in (INT8_MAX, _REDUCED_INT8_MAX):
            x = torch.full((1, 64), largest, dtype=torch.int8, device="cpu")
            if bool((_onednn_matmul(x, largest, packed, scale) == 64 * largest * INT8_MAX).all()):
                return largest
    except (AttributeError, RuntimeError):
        logger.info("this build of PyTorch has no int8 products of oneDNN; int8 weights are dequantized for each call")
    return None


def _onednn_matmul(x: Tensor, largest: int, packed: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 product of [rows, in] integers and a packed weight.

    Args:
        x: Integers in −largest..largest; they are overwritten.
        largest: Largest integer in `x`.
        packed: Result of `torch.ops.onednn.qlinear_prepack`.
        scale: [out] scales of the weight.
    """
    # The kernel reads unsigned inputs. The conversion of floats to int8 is faster than that to uint8.
    zero = largest + 1
    result: Tensor = torch.ops.onednn.qlinear_pointwise.default(
        x.view(torch.uint8).add_(zero), 1.0, zero, packed, scale, _zeros(len(scale)),
        None, 1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return result


@functools.cache
def _zeros(size: int) -> Tensor:
    """Return the zero points of a symmetric weight."""
    return torch.zeros(size, dtype=torch.int64, device="cpu")
