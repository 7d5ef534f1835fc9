"""How sure the model was of an object: from its own token probabilities, never a constant.

An object exists because the model went on instead of stopping, and it lies where the peaks of its coordinate and size
distributions lie. The confidence is the probability of going on, times the geometric mean of the probability mass near
each peak:

    confidence = (1 − p(stop)) · (mass(x) · mass(y) [· mass(width) · mass(height)])^(1/n)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

PEAK_REACH = 16  # bins on each side: 1.6 % of the image for a coordinate, a ninth of a size


def continue_probability(logits: Tensor, eos_id: int) -> Tensor:
    """Probability of anything but the end: [..., vocab_size] → [...]."""
    return 1.0 - logits.float().softmax(-1)[..., eos_id]


def peak_mass(logits: Tensor) -> Tensor:
    """Probability within `PEAK_REACH` bins of the likeliest bin: [..., bins] → [...]."""
    probabilities = F.pad(logits.float().softmax(-1), (PEAK_REACH, PEAK_REACH))
    windows = probabilities.unfold(-1, 2 * PEAK_REACH + 1, 1)  # [..., bins, window]
    peak = logits.argmax(-1)[..., None, None].expand(*logits.shape[:-1], 1, windows.shape[-1])
    return windows.gather(-2, peak).sum((-1, -2)).clamp(max=1.0)


def combine(going_on: Tensor, masses: Sequence[Tensor]) -> Tensor:
    """The confidence of an object from its parts."""
    stacked = torch.stack([m.reshape(()) for m in masses])
    return going_on.reshape(()) * stacked.clamp_min(1e-12).log().mean().exp()


AXIS_FEATURES = 1


def axis_features(logits):
    return peak_mass(logits)[..., None]


def confidence(going_on, box, features):
    return going_on * math.exp(sum(math.log(max(f[0], 1e-12)) for f in features) / len(features))
