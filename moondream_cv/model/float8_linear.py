"""Linear layers with 8-bit floating-point weights and inputs, for CUDA devices that multiply them in hardware."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moondream_cv.model.quantization import quantize_int8
from moondream_cv.model.quantized_linear import QuantizedLinear

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
MIN_CAPABILITY = (8, 9)
_ALIGNMENT = 16  # both sizes of a weight are multiples of it
_SMALLEST_SCALE = 1e-12  # scale of a row of zeros


class Float8Linear(QuantizedLinear):
    """A linear layer with 8-bit floating-point weights and dynamically quantized inputs.

    Attributes:
        weight_scale: [out] float32 scales.
    """

    weight_scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        """Create a layer.

        Args:
            weight: [out, in] weight in `FLOAT8`.
            scale: [out] scales.
            bias: [out] bias; None: no bias.
        """
        super().__init__(weight.shape[1], weight.shape[0], bias)
        self.register_buffer("weight_scale", scale.detach().float())
        self._weight = weight

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the [out, in] weight in full precision."""
        return self._weight.float().mul_(self.weight_scale[:, None]).to(dtype)

    def _product(self, x: Tensor, gelu: bool) -> Tensor:
        values, scale = quantize_float8(x)
        y = torch._scaled_mm(
            values, self._weight.T, scale_a=scale[:, None], scale_b=self.weight_scale[None], out_dtype=torch.bfloat16
        )
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return (F.gelu(y, approximate="tanh") if gelu else y).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float8Linear:
        """Move the layer to another device. Its tensors keep their data types."""
        self._weight = fn(self._weight.view(torch.uint8)).view(FLOAT8)
        for name, tensor in self.named_buffers():
            self.register_buffer(name, tensor.to(self._weight.device))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save the weight as int8, because files contain no 8-bit floating-point weights."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        integers, scale = quantize_int8(self.dequantize(torch.float32))
        destination[f"{prefix}weight"], destination[f"{prefix}weight_scale"] = integers, scale

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle the tensors."""
        return type(self), (self._weight, self.weight_scale, self.bias)


def can_use_float8(device: torch.device | str, shape: tuple[int, ...]) -> bool:
    """Return whether a device multiplies 8-bit floating-point weights of a shape in hardware.

    Args:
        device: Device of the weight.
        shape: (out, in) shape of the weight.
    """
    device = torch.device(device)
    if device.type != "cuda" or torch.version.cuda is None or any(size % _ALIGNMENT for size in shape):
        return False
    return torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def quantize_float8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize rows of a weight or of activations to 8-bit floating-point numbers.

    Args:
        rows: [rows, in] values.

    Returns:
        [rows, in] values in `FLOAT8`, and the [rows] float32 scales.
    """
    rows = rows.float()
    scale = rows.abs().amax(-1).div_(FLOAT8_MAX).add_(_SMALLEST_SCALE)
    return (rows / scale[:, None]).clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8), scale
