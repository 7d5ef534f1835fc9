"""Sampling of the next tokens of many sequences, each with its own parameters and seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moondream_cv.engine.transfers import floats, integers

MIN_TEMPERATURE = 1e-30  # float32 rounds lower temperatures to 0
SEED_BITS = 62
_MASK = 2**32 - 1


class SamplingParams(NamedTuple):
    """Parameters for sampling one token of one sequence.

    Attributes:
        temperature: Sampling temperature; ignored without a seed.
        top_p: Sample from the most likely tokens that together reach this probability.
        seed: Seed of this choice, below 2**SEED_BITS; None selects the most likely token.
        banned: Token IDs that must not be sampled.
        bitmask: [ceil(vocab_size / 32)] int32 bitmask of the allowed tokens, lowest bit first; None allows all tokens.
        second_seed: Seed of the second choice of a step: the x behind a decision, or a height.
    """

    temperature: float
    top_p: float
    seed: int | None
    banned: tuple[int, ...] = ()
    bitmask: np.ndarray | None = None
    second_seed: int | None = None


def sample(logits: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """Sample one token for each sequence, independently of the other sequences.

    The token with the largest sum of log-probability and Gumbel noise is a sample of the distribution. Rounding, which
    differs between batches, changes it only if the two largest sums are equal up to rounding.

    Args:
        logits: [S, vocab_size] next-token logits.
        params: Parameters of each sequence.

    Returns:
        [S] token IDs; [S] logarithms of their probabilities before temperature and top-p, among the allowed tokens.
    """
    logits, device = logits.float(), logits.device
    # Exclude banned tokens and those that a grammar forbids
    ban = [(row, token) for row, one in enumerate(params) for token in one.banned]
    if ban:
        rows, tokens = integers(ban, device).unbind(1)
        logits = logits.index_put((rows, tokens), logits.new_tensor(-torch.inf))
    constrained = [row for row, one in enumerate(params) if one.bitmask is not None]
    if constrained:
        index = integers(constrained, device)
        packed = torch.from_numpy(np.stack([one.bitmask for one in params if one.bitmask is not None])).to(device)
        bits = packed[..., None] >> torch.arange(32, dtype=torch.int32, device=device) & 1  # [n, W, 32]
        allowed = bits.flatten(1)[:, : logits.shape[-1]].bool()
        logits = logits.index_put((index,), logits[index].masked_fill(~allowed, -torch.inf))
    # Select the most likely token, or sample
    chosen = logits.argmax(-1)
    sampled = [row for row, one in enumerate(params) if one.seed is not None]
    if sampled:
        seeded = [params[row] for row in sampled]
        index = integers(sampled, device)
        behind = logits[index] - logits[index].amax(-1, keepdim=True)  # the maximum is 0, so it stays finite
        temperature = floats([max(one.temperature, MIN_TEMPERATURE) for one in seeded], torch.float32, device)
        scores = behind / temperature[:, None]
        limited = [row for row, one in enumerate(seeded) if one.top_p < 1]
        if limited:
            index_limited = integers(limited, device)
            top_p = floats([seeded[row].top_p for row in limited], torch.float32, device)
            scores[index_limited] = _keep_most_likely(scores[index_limited], top_p[:, None])
        seeds = integers([one.seed for one in seeded if one.seed is not None], device)
        chosen[index] = (scores + _gumbel_noise(seeds, logits.shape[-1])).argmax(-1)
    return chosen, logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]


def _keep_most_likely(scores: Tensor, top_p: Tensor) -> Tensor:
    """Set the scores of all tokens to -inf except the most likely ones that together reach top_p, [n, 1]."""
    ordered, order = scores.softmax(-1).sort(descending=True, stable=True)
    dropped = ordered.cumsum(-1) - ordered > top_p
    return scores.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)


def _gumbel_noise(seeds: Tensor, count: int) -> Tensor:
    """Return standard Gumbel noise that depends on the seed and the position only.

    Args:
        seeds: [n] int64 seeds, below 2**SEED_BITS.
        count: Number of values for each seed, at most 2**32.

    Returns:
        [n, count] finite float32 values.
    """
    position = torch.arange(count, dtype=torch.long, device=seeds.device)
    low, high = seeds[:, None] & _MASK, seeds[:, None] >> 32
    bits = _hash(_hash(_hash(position) ^ low) ^ high).float()  # not the default dtype; it keeps small values apart
    uniform = (bits + 0.5) / 2**32
    return -(-torch.log1p(-uniform.clamp_max(1 - 2**-24))).log()


def _hash(values: Tensor) -> Tensor:
    """Mix 32-bit integers in an int64 tensor: xor-shifts and odd factors below 2**31, so no product overflows."""
    values = (values ^ values >> 16) * 0x21F0AAAD & _MASK
    values = (values ^ values >> 15) * 0x735A2D97 & _MASK
    return values ^ values >> 15
