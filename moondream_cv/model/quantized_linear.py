"""Linear layers with quantized weights, for inference.

Inputs have the data type of the activations, and so have outputs. `Int8Linear` is batch invariant: each input row has
its own scale. `Int4Linear` is not: on CPUs, it computes up to 32 rows in bfloat16 and more rows in the data type of the
inputs. If the input requires a gradient, the layers dequantize their weights, so that adapters can be trained.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moondream_cv.model.hardware import has_onednn_kernels
from moondream_cv.model.quantization import INT8_MAX, pack_int4, row_chunks

logger = logging.getLogger(__name__)

MAX_ROWS_PER_CHUNK = 384
"""Input rows of one int8 product on a CPU. Its input and its output fit into the cache of most CPUs."""

MAX_KERNEL_ROWS = 32
"""Maximum number of input rows of PyTorch's 4-bit kernel. For more rows, dequantizing the weight is faster."""

_KERNEL_GROUPS = (32, 64, 128, 256)
_PACKED_BLOCKS = 16  # blocks that are packed at a time, from 32-bit integers
_CACHED_CHUNK = 2**20  # values that fit into the cache of most CPUs
_REDUCED_INT8_MAX = 63  # sums of two products with 8-bit weights fit into 16 bits
_SMALLEST_SCALE = 1e-12  # scale of an input row of zeros
_GELU_FACTOR = 1.5957691216057308  # √(8/π)
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

    @property
    def integers(self) -> Tensor:
        """[out, in] integers of the weight."""
        raise NotImplementedError

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

    def _store(self, integers: Tensor) -> None:
        """Keep one copy of the integers, in the layout of the product."""
        raise NotImplementedError

    def _product(self, x: Tensor, gelu: bool) -> Tensor:
        """Return the output of the layer for [rows, in]."""
        raise NotImplementedError

    def _finish(self, y: Tensor, gelu: bool) -> Tensor:
        """Add the bias to a product, in its memory, and apply GELU."""
        if self.bias is not None:
            y.add_(self.bias)
        return gelu_(y) if gelu else y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Move the layer to another device. Its tensors keep their data types."""
        integers = fn(self.integers)
        for name, tensor in self.named_buffers():
            self.register_buffer(name, tensor.to(integers.device))
        self._store(integers)
        return self


class Int8Linear(QuantizedLinear):
    """A linear layer with 8-bit weights and dynamically quantized inputs.

    On CPUs, oneDNN computes the products of integers. CUDA devices compute them in tensor cores. On other devices, and
    for sizes that these do not support, the weight is dequantized for each call.

    Attributes:
        weight_scale: [out] float32 scales.
    """

    weight_scale: Tensor

    def __init__(self, integers: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        """Create a layer.

        Args:
            integers: [out, in] int8 integers of the weight.
            scale: [out] scales.
            bias: [out] bias; None: no bias.
        """
        super().__init__(integers.shape[1], integers.shape[0], bias)
        self.register_buffer("weight_scale", scale.detach().float())
        self._store(integers)

    @property
    def integers(self) -> Tensor:
        """[out, in] int8 integers of the weight."""
        return self._weight.to_dense().T if self._weight.is_mkldnn else self._weight

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the [out, in] weight in full precision."""
        integers = self.integers
        weight = torch.empty(integers.shape, dtype=dtype, device=integers.device)
        for rows in row_chunks(weight.shape):
            weight[rows] = integers[rows].float().mul_(self.weight_scale[rows, None])
        return weight

    def _store(self, integers: Tensor) -> None:
        uses_onednn = integers.device.type == "cpu" and onednn_int8_max() is not None
        self._weight = torch.ops.onednn.qlinear_prepack(integers.contiguous(), None) if uses_onednn else integers

    def _product(self, x: Tensor, gelu: bool) -> Tensor:
        if self._weight.is_mkldnn:
            return _in_chunks(x, self.out_features, lambda chunk: self._chunk(chunk, gelu))
        is_aligned = self.in_features % 8 == 0 and self.out_features % 8 == 0
        if x.device.type == "cuda" and is_aligned:
            return self._cuda_product(x, gelu)
        y = F.linear(x, self._weight.to(x.dtype)).float().mul_(self.weight_scale)
        return self._finish(y, gelu).to(x.dtype)

    def gelu_then(self, x: Tensor, following: Int8Linear) -> Tensor:
        """Apply the layer, the tanh form of GELU and another layer: [..., in] → [..., out of the other layer].

        On CPUs, the values between the layers stay in the cache, in float32.

        Args:
            x: Inputs.
            following: Layer on the same device.
        """
        if not self._weight.is_mkldnn or (torch.is_grad_enabled() and x.requires_grad):
            return following(self.gelu(x))
        rows = x.reshape(-1, self.in_features)
        y = _in_chunks(rows, following.out_features, lambda chunk: following._chunk(self._chunk(chunk, True), False))
        return y.view(*x.shape[:-1], following.out_features)

    def _chunk(self, x: Tensor, gelu: bool) -> Tensor:
        """Return the float32 output for a few rows."""
        largest = onednn_int8_max() or INT8_MAX
        integers, scale = quantize_rows(x, largest)
        y = _onednn_matmul(integers, largest, self._weight, self.weight_scale)
        if self.bias is None:
            return self._finish(y.mul_(scale), gelu)
        torch.addcmul(self.bias, y, scale, out=y)
        return gelu_(y) if gelu else y

    def _cuda_product(self, x: Tensor, gelu: bool) -> Tensor:
        integers, scale = quantize_rows(x, INT8_MAX)
        padded = F.pad(integers, (0, 0, 0, max(0, _MIN_CUDA_ROWS - len(x))))
        y = torch._int_mm(padded, self._weight.T)[: len(x)].float().mul_(scale).mul_(self.weight_scale)
        return self._finish(y, gelu).to(x.dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.integers
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle the integers, because packed weights cannot be copied."""
        return type(self), (self.integers.contiguous(), self.weight_scale, self.bias)


class Int4Linear(QuantizedLinear):
    """A linear layer with 4-bit weights. Products are in full precision.

    For a few input rows, PyTorch's kernel for x86 CPUs reads the packed weight and computes in bfloat16. Otherwise the
    weight is dequantized for each call.

    Attributes:
        scale: [out, groups] scale of each group of inputs.
        zero_point: [out, groups] zero point of each group of inputs.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, levels: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None = None) -> None:
        """Create a layer.

        Args:
            levels: [out, in] uint8 levels in 0..15.
            scale: [out, groups] scales.
            zero_point: [out, groups] zero points.
            bias: [out] bias; None: no bias.
        """
        super().__init__(levels.shape[1], levels.shape[0], bias)
        self.register_buffer("scale", scale.detach())
        self.register_buffer("zero_point", zero_point.detach())
        self._store(levels)

    @property
    def group_size(self) -> int:
        """Number of inputs with one scale."""
        return self.in_features // self.scale.shape[1]

    @property
    def integers(self) -> Tensor:
        """[out, in] uint8 levels in 0..15."""
        low, high = self._packed & 0b1111, self._packed >> 4
        if self._kernel_scales is None:
            return torch.cat((low, high), dim=1)
        blocks = -1, self.in_features, int4_block() // 2
        return _unpack_blocks(low.view(blocks), high.view(blocks)).reshape(self.in_features, -1).T

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the [out, in] weight in full precision."""
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self._packed.device)
        for rows in self._row_chunks():
            weight[rows] = self._dequantize(rows, dtype)
        return weight

    def _row_chunks(self) -> Iterator[slice]:
        """Divide the outputs into parts that fit into the cache of most CPUs, of whole blocks of the kernel."""
        step = max(1, _CACHED_CHUNK // self.in_features)
        if self._kernel_scales is not None:
            step = max(1, step // int4_block()) * int4_block()
        for start in range(0, self.out_features, step):
            yield slice(start, min(start + step, self.out_features))

    def _dequantize(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Return rows of the weight in full precision."""
        packed, scale, zero_point = self._packed[rows], self.scale[rows].float(), self.zero_point[rows].float()
        low, high = packed & 0b1111, packed >> 4
        if self._kernel_scales is None:
            groups = torch.cat((low, high), dim=1).view(*scale.shape, -1).float()
            return groups.sub_(zero_point[..., None]).mul_(scale[..., None]).to(dtype).view(-1, self.in_features)
        blocks = -1, self.in_features, int4_block() // 2
        levels = _unpack_blocks(low.view(blocks), high.view(blocks))  # [in, blocks, 2, block size / 2]
        groups = levels.reshape(scale.shape[1], -1, scale.shape[0]).float()  # [groups, group size, rows]
        groups.sub_(zero_point.T.contiguous()[:, None]).mul_(scale.T.contiguous()[:, None])
        return groups.to(dtype).view(self.in_features, -1).T

    def _store(self, integers: Tensor) -> None:
        block = int4_block() if integers.device.type == "cpu" else 0
        if not block or self.out_features % block or self.group_size not in _KERNEL_GROUPS:
            self._kernel_scales = None
            low, high = integers.chunk(2, dim=1)
            self._packed = (high << 4) | low
            return
        zero = (8 - self.zero_point.float()) * self.scale.float()  # the kernel subtracts 8 from the levels
        scales = torch.stack((self.scale.float(), zero), dim=-1)
        self._kernel_scales = scales.transpose(0, 1).to(torch.bfloat16, memory_format=torch.contiguous_format)
        self._packed = torch.empty(self.out_features, self.in_features // 2, dtype=torch.uint8, device="cpu")
        for rows in range(0, self.out_features, _PACKED_BLOCKS * block):
            chunk = slice(rows, rows + _PACKED_BLOCKS * block)
            self._packed[chunk] = _pack_blocks(integers[chunk])

    def _product(self, x: Tensor, gelu: bool) -> Tensor:
        if self._kernel_scales is not None and 0 < len(x) <= MAX_KERNEL_ROWS:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(
                x.to(torch.bfloat16).contiguous(), self._packed, self.group_size, self._kernel_scales
            )
            return self._finish(y.float(), gelu).to(x.dtype)
        out = torch.empty(len(x), self.out_features, dtype=x.dtype, device=x.device)
        for rows in self._row_chunks():
            bias = None if self.bias is None else self.bias[rows].to(x.dtype)
            y = F.linear(x, self._dequantize(rows, x.dtype), bias)
            out[:, rows] = gelu_(y.float()) if gelu else y
        return out

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight.packed"] = pack_int4(self.integers, self.group_size)
        destination[f"{prefix}weight.scale"] = self.scale.reshape(-1, 1)
        destination[f"{prefix}weight.zero_point"] = self.zero_point.reshape(-1, 1)
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle the levels, because their packed layout depends on the CPU."""
        return type(self), (self.integers.contiguous(), self.scale, self.zero_point, self.bias)


def quantization_of(network: nn.Module) -> str | None:
    """Return "int8" or "int4" for a network with quantized layers, otherwise None.

    Args:
        network: Network to inspect.
    """
    for module in network.modules():
        if isinstance(module, QuantizedLinear):
            return "int4" if isinstance(module, Int4Linear) else "int8"
    return None


def weight_bytes(network: nn.Module) -> int:
    """Return the memory of the weights of a network in bytes, including those that are stored in packed layouts.

    Args:
        network: Network on any device.
    """
    values = (value for module in network.modules() for value in vars(module).values())
    packed = [value for value in values if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers(), *packed))


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


def _in_chunks(x: Tensor, out_features: int, product: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function to [rows, in] a few rows at a time, and return the [rows, out] result in the type of `x`."""
    if len(x) <= MAX_ROWS_PER_CHUNK:
        return product(x).to(x.dtype)
    out = torch.empty(len(x), out_features, dtype=x.dtype, device=x.device)
    for source, target in zip(x.split(MAX_ROWS_PER_CHUNK), out.split(MAX_ROWS_PER_CHUNK), strict=True):
        target.copy_(product(source))
    return out


def gelu_(x: Tensor) -> Tensor:
    """Apply the tanh form of GELU in place: x · sigmoid(√(8/π) · (x + 0.044715 · x³)).

    On CPUs, this takes half of the time of `F.gelu`.
    """
    inner = torch.addcmul(x.new_full((), _GELU_FACTOR), x, x, value=0.044715 * _GELU_FACTOR).mul_(x)
    return x.mul_(inner.sigmoid_())


@functools.cache
def onednn_int8_max() -> int | None:
    """Return the largest integer of inputs for which oneDNN's int8 products are exact on this CPU.

    Without VNNI instructions, sums of two products saturate at 16 bits, so inputs have 7 bits.

    Returns:
        127 or 63; None: oneDNN has no fast int8 products here.
    """
    if not has_onednn_kernels():
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
def int4_block() -> int:
    """Return the number of outputs in a block of PyTorch's 4-bit kernel on this CPU.

    Returns:
        64 with AVX-512, 32 with AVX2; 0: the kernel is missing or slow.
    """
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return 0
    levels = torch.arange(128 * 32, device="cpu", dtype=torch.int32).view(128, 32).mul_(7).remainder_(16)
    try:
        packed = _pack_blocks(levels)
    except (AttributeError, RuntimeError):
        return 0
    for block in (64, 32):
        blocks = packed.view(-1, 32, block // 2)
        if torch.equal(_unpack_blocks(blocks & 0b1111, blocks >> 4).reshape(32, -1).T, levels):
            return block
    return 0


def _pack_blocks(levels: Tensor) -> Tensor:
    """Return the layout of PyTorch's 4-bit kernel: [out, in] levels → [out, in / 2] uint8."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels.to(torch.int32), 1)
    return packed


def _unpack_blocks(low: Tensor, high: Tensor) -> Tensor:
    """Return the levels in blocks of the 4-bit kernel.

    Args:
        low: [blocks, in, block size / 2] low bits: the first half of the outputs of each block.
        high: [blocks, in, block size / 2] high bits: the second half.

    Returns:
        [in, blocks, 2, block size / 2] levels.
    """
    return torch.stack((low, high), dim=2).transpose(0, 1)


@functools.cache
def _zeros(size: int) -> Tensor:
    """Return the zero points of a symmetric weight."""
    return torch.zeros(size, dtype=torch.int64, device="cpu")
