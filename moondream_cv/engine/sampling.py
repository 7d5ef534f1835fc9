"""Choosing the next token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moondream_cv.requests import Settings


@dataclass
class Sampler:
    """Chooses tokens for one request; with a seed, the same ones every time.

    Attributes:
        logprob: Sum of the log-probabilities of the tokens chosen, before temperature and top-p.
        count: Tokens chosen.
    """

    temperature: float
    top_p: float
    generator: torch.Generator | None
    logprob: float = 0.0
    count: int = 0

    @classmethod
    def of(cls, settings: Settings, device: torch.device) -> Sampler:
        generator = None
        if settings.temperature > 0 and settings.seed is not None:
            generator = torch.Generator(device).manual_seed(settings.seed)
        return cls(settings.temperature, settings.top_p, generator)

    def choose(self, logits: Tensor, banned: tuple[int, ...] = ()) -> int:
        """Choose from [vocab_size] logits, never one of the banned ids."""
        logits = logits.float()
        if banned:
            logits = logits.index_fill(-1, torch.tensor(banned, device=logits.device), -torch.inf)
        if self.temperature == 0:
            token = int(logits.argmax())
        else:
            probabilities = _top_p((logits / self.temperature).softmax(-1), self.top_p)
            token = int(torch.multinomial(probabilities, 1, generator=self.generator))
        self.logprob += float(logits.log_softmax(-1)[token])
        self.count += 1
        return token

    @property
    def mean_logprob(self) -> float | None:
        return self.logprob / self.count if self.count else None


def _top_p(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero all but the likeliest tokens, up to and with the one that makes their sum reach `top_p`."""
    ordered, index = probabilities.sort(descending=True)
    ordered[ordered.cumsum(-1) - ordered > top_p] = 0.0
    return torch.zeros_like(probabilities).scatter(-1, index, ordered)
