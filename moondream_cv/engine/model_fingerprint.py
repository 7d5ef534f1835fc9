"""Identify weights by their content, so that encoded images can move between processes.

The fingerprint covers the name, shape and dtype of every weight, and a sample of its values, since a fine-tuned model
has the same names and shapes as the original. It does not depend on the device.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from moondream_cv.model.adapters import Adapter
from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.model.packed_linear import PackedLinear, sample_values

_DIGEST_BYTES = 16


@torch.no_grad()
def fingerprint(network: MoondreamNetwork, adapter: Adapter | None) -> str:
    """Return 32 hexadecimal digits that identify a network, its dtype and an adapter.

    Args:
        network: Weights, on any device except meta.
        adapter: Adapter; None: no adapter.
    """
    digest = hashlib.blake2b(repr(network.config).encode(), digest_size=_DIGEST_BYTES)
    samples = []
    for name, shape, values in itertools.chain(_weights(network), _adapter_weights(adapter)):
        digest.update(f"{name} {list(shape)} {values.dtype}\n".encode())
        samples.append(values.float())
    digest.update(torch.cat(samples).cpu().numpy().tobytes())  # one transfer from the device
    return digest.hexdigest()


def _weights(network: MoondreamNetwork) -> Iterator[tuple[str, torch.Size, Tensor]]:
    """Return the name, the shape and a sample of all weights in order."""
    for prefix, module in network.named_modules():
        stem = f"{prefix}." if prefix else ""
        if isinstance(module, PackedLinear):
            yield f"{stem}weight", torch.Size((module.out_features, module.in_features)), module.samples
        for name, parameter in module.named_parameters(recurse=False):
            yield f"{stem}{name}", parameter.shape, sample_values(parameter)
    # Quantized layers have buffers instead of parameters: their scales are a sample of the weights.
    for name, buffer in network.named_buffers():
        yield name, buffer.shape, sample_values(buffer)


def _adapter_weights(adapter: Adapter | None) -> Iterator[tuple[str, torch.Size, Tensor]]:
    for name, tensor in () if adapter is None else adapter.tensors():
        yield f"adapter.{name}", tensor.shape, sample_values(tensor)
