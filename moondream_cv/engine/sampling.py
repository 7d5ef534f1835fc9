"""Sampling of the next tokens of many sequences, each with its own parameters and random number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moondream_cv.engine.transfers import floats, integers

MIN_TEMPERATURE = 1e-30  # float32 rounds lower temperatures to 0


class SamplingParams(NamedTuple):
    """Parameters for sampling one token of one sequence.

    Attributes:
        temperature: Sampling temperature; ignored without a random number.
        top_p: Sample from the most likely tokens that together reach this probability.
        random: Random number in 0..1; None selects the most likely token.
        banned: Token IDs that must not be sampled.
        bitmask: [ceil(vocab_size / 32)] int32 bitmask of the allowed tokens, lowest bit first; None allows all tokens.
        second_random: Random number in 0..1 for the second choice of a step: the x behind a decision, or a height.
    """

    temperature: float
    top_p: float
    random: float | None
    banned: tuple[int, ...] = ()
    bitmask: np.ndarray | None = None
    second_random: float | None = None


def sample(logits: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """Sample one token for each sequence, independently of the other sequences.

    The random number of a sequence selects a position in the cumulative distribution of the tokens that top-p keeps,
    most likely token first.

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
    sampled = [row for row, one in enumerate(params) if one.random is not None]
    if sampled:
        settings = [
            (max(one.temperature, MIN_TEMPERATURE), one.top_p, one.random) for one in params if one.random is not None
        ]
        temperature, top_p, random = floats(settings, torch.float32, device)[..., None].unbind(1)
        index = integers(sampled, device)
        behind = logits[index] - logits[index].amax(-1, keepdim=True)  # the maximum is 0, so it stays finite
        ordered, order = (behind / temperature).softmax(-1).sort(descending=True, stable=True)
        reached = ordered.cumsum(-1)
        ordered = ordered.masked_fill(reached - ordered > top_p, 0.0)
        reached = ordered.cumsum(-1)
        rank = (reached <= random * reached[:, -1:]).sum(-1, keepdim=True)
        last = (ordered > 0).sum(-1, keepdim=True) - 1  # rounding may exceed it
        rank = rank.minimum(last).clamp_min(0)  # NaN has no rank; its log-probability is NaN
        chosen[index] = order.gather(-1, rank)[:, 0]
    return chosen, logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
