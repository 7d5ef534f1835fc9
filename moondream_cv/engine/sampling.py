"""Choosing the next tokens of many rows at once, each with settings and a random number of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

COLDEST = 1e-30  # a temperature below it is rounded to 0 on the way to the device


def choose(
    logits: Tensor,
    temperatures: Sequence[float],
    top_ps: Sequence[float],
    draws: Sequence[float | None],
    banned: Sequence[Sequence[int]],
    bitmasks: Sequence[np.ndarray | None] = (),
) -> tuple[Tensor, Tensor]:
    """Choose a token for each row; what is chosen does not depend on the other rows.

    A row samples from the likeliest tokens, up to and with the one that makes their probabilities reach its top-p: its
    random number says how far to go through them, the likeliest first.

    Args:
        logits: [R, vocab_size].
        temperatures: One for each row that samples, above 0.
        top_ps: One for each row.
        draws: A random number in 0..1 for each row; None takes the likeliest token.
        banned: Tokens that a row must not choose.
        bitmasks: [ceil(vocab_size / 32)] int32 bitmask of the tokens that each row may choose, lowest bit first; None
            allows all. Empty: no row is constrained.

    Returns:
        [R] token ids; [R] logarithms of their probabilities before temperature and top-p, among what is not banned.
    """
    logits, device = logits.float(), logits.device
    ban = [(row, token) for row, tokens in enumerate(banned) for token in tokens]
    if ban:
        rows, tokens = torch.tensor(ban, device=device, dtype=torch.long).unbind(1)
        logits = logits.index_put((rows, tokens), logits.new_tensor(-torch.inf))
    constrained = [row for row, bitmask in enumerate(bitmasks) if bitmask is not None]
    if constrained:
        index = torch.tensor(constrained, device=device, dtype=torch.long)
        packed = torch.from_numpy(np.stack([bitmask for bitmask in bitmasks if bitmask is not None])).to(device)
        bits = packed[..., None] >> torch.arange(32, dtype=torch.int32, device=device) & 1  # [n, W, 32]
        allowed = bits.flatten(1)[:, : logits.shape[-1]].bool()
        logits = logits.index_put((index,), logits[index].masked_fill(~allowed, -torch.inf))
    chosen = logits.argmax(-1)
    sampled = [row for row, draw in enumerate(draws) if draw is not None]
    if sampled:
        settings = [(max(temperatures[row], COLDEST), top_ps[row], draws[row]) for row in sampled]
        temperature, top_p, draw = torch.tensor(settings, device=device, dtype=torch.float32)[..., None].unbind(1)
        index = torch.tensor(sampled, device=device, dtype=torch.long)
        behind = logits[index] - logits[index].amax(
            -1, keepdim=True
        )  # 0 at the best: no temperature makes that infinite
        ordered, order = (behind / temperature).softmax(-1).sort(descending=True, stable=True)
        reached = ordered.cumsum(-1)
        ordered = ordered.masked_fill(reached - ordered > top_p, 0.0)
        reached = ordered.cumsum(-1)
        rank = (reached <= draw * reached[:, -1:]).sum(-1, keepdim=True)
        last = (ordered > 0).sum(-1, keepdim=True) - 1  # rounding may point behind it
        rank = rank.minimum(last).clamp_min(0)  # of NaN, none is above 0; its row learns of it from the log-probability
        chosen[index] = order.gather(-1, rank)[:, 0]
    return chosen, logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
