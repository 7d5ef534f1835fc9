"""Identify weights by their content, so that encoded images can move between processes.

The fingerprint covers the name, shape and dtype of every weight, and a sample of its values, since a fine-tuned model
has the same names and shapes as the original. It does not depend on the device.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.model.packed_linear import PackedLinear
from moondream_cv.model.text import LayerLora

SAMPLES = 256  # evenly spaced values per weight
_DIGEST_BYTES = 16


@torch.no_grad()
def fingerprint(network: MoondreamNetwork, adapter: Sequence[LayerLora] | None) -> str:
    """Return 32 hexadecimal digits that identify a network, its dtype and an adapter.

    Args:
        network: Weights, on any device except meta.
        adapter: Adapter layers; None: no adapter.
    """
    digest = hashlib.blake2b(repr(network.config).encode(), digest_size=_DIGEST_BYTES)
    # Quantized layers have buffers instead of parameters: their scales are a sample of the weights.
    samples = []
    for name, tensor in itertools.chain(_weights(network), network.named_buffers(), _adapter_tensors(adapter or ())):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.reshape(-1)
        samples.append(flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].float())
    digest.update(torch.cat(samples).cpu().numpy().tobytes())  # one transfer from the device
    return digest.hexdigest()


def _weights(network: MoondreamNetwork) -> Iterator[tuple[str, Tensor]]:
    """Return all parameters in order. Packed weights are unpacked one at a time."""
    for prefix, module in network.named_modules():
        stem = f"{prefix}." if prefix else ""
        if isinstance(module, PackedLinear):
            yield f"{stem}weight", module.weight
        for name, parameter in module.named_parameters(recurse=False):
            yield f"{stem}{name}", parameter


def _adapter_tensors(layers: Iterable[LayerLora]) -> Iterator[tuple[str, Tensor]]:
    for i, layer in enumerate(layers):
        for block, projections in layer.items():
            for projection, pair in projections.items():
                for side, tensor in zip("AB", pair, strict=True):
                    yield f"adapter.{i}.{block}.{projection}.{side}", tensor
