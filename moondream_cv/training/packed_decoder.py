"""Run the decoder on sequences that are packed behind the prefix of their image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moondream_cv.model.moondream import MoondreamNetwork
from moondream_cv.model.text import LayerLora


def run_packed(
    network: MoondreamNetwork,
    images: Tensor | None,
    inputs: Tensor,
    positions: Tensor,
    numbers: Tensor,
    adapter: Sequence[LayerLora] | None = None,
    checkpointing: bool = False,
) -> Tensor:
    """Compute the hidden states of packed sequences, each as if it were alone behind its image.

    Args:
        network: Network to run.
        images: [B, num_patches, dim] image tokens; None: the sequences have no image.
        inputs: [B, T, dim] input embeddings of the sequences.
        positions: [B, T] positions behind the prefix, from 0 for each sequence.
        numbers: [B, T] number of the sequence at each position.
        adapter: Low-rank updates of each layer; None: no adapter.
        checkpointing: Recompute the activations of each block in the backward pass instead of keeping them.

    Returns:
        [B, T, dim] hidden states of the sequences.
    """
    prefix = 0
    if images is not None:
        prefix = network.config.prefix_length
        bos = torch.full((len(inputs), 1), network.config.tokenizer.bos_id, device=inputs.device, dtype=torch.long)
        inputs = torch.cat((network.text.embed(bos), images, inputs), dim=1)
        before = torch.arange(prefix, device=inputs.device).expand(len(inputs), -1)
        positions = torch.cat((before, prefix + positions), dim=1)
    mask = packed_mask(numbers, prefix)
    return network.text(inputs, positions, mask, adapter=adapter, checkpointing=checkpointing)[:, prefix:]


def packed_mask(numbers: Tensor, prefix: int) -> Tensor:
    """Return the attention mask of packed sequences, [B, 1, prefix + T, prefix + T] bool.

    The prefix attends to itself. Each sequence attends to the prefix and, causally, to itself.

    Args:
        numbers: [B, T] number of the sequence at each position.
        prefix: Length of the image prefix.
    """
    batch, length = numbers.shape
    mask = torch.zeros(batch, prefix + length, prefix + length, dtype=torch.bool, device=numbers.device)
    mask[:, :, :prefix] = True
    same = numbers[:, :, None] == numbers[:, None]
    mask[:, prefix:, prefix:] = same & torch.ones(length, length, dtype=torch.bool, device=numbers.device).tril()
    return mask[:, None]
