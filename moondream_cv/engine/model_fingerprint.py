"""Identify weights by their content, so that encoded images can move between processes.

The fingerprint covers the name, shape and dtype of every weight, and a sample of its values, since a fine-tuned model
has the same names and shapes as the original. It does not depend on the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from moondream_cv.model.moondream import MoondreamNetwork
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
    named = [*network.named_parameters(), *network.named_buffers(), *_adapter_tensors(adapter or ())]
    for name, tensor in named:
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
    digest.update(_sample(tensor for _, tensor in named))
    return digest.hexdigest()


def _adapter_tensors(layers: Iterable[LayerLora]) -> Iterator[tuple[str, Tensor]]:
    for i, layer in enumerate(layers):
        for block, projections in layer.items():
            for projection, pair in projections.items():
                for side, tensor in zip("AB", pair, strict=True):
                    yield f"adapter.{i}.{block}.{projection}.{side}", tensor


def _sample(tensors: Iterable[Tensor]) -> bytes:
    samples = []
    for tensor in tensors:
        flat = tensor.reshape(-1)
        samples.append(flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].float())
    return torch.cat(samples).cpu().numpy().tobytes()  # one transfer from the device
