"""Temperature, top-p, seeds and bans."""

from __future__ import annotations

import math

import pytest
import torch

from moondream_cv.engine.sampling import Sampler
from moondream_cv.requests import Settings

LOGITS = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))


def draws(count: int = 400, **settings: float) -> list[int]:
    sampler = Sampler.of(Settings(**{"seed": 0, **settings}), torch.device("cpu"))  # type: ignore[arg-type]
    return [sampler.choose(LOGITS) for _ in range(count)]


def test_temperature_zero_takes_the_likeliest() -> None:
    assert set(draws(20, temperature=0.0)) == {0}


@pytest.mark.parametrize(("top_p", "tokens"), [(0.3, {0}), (0.6, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})])
def test_top_p_keeps_the_likeliest(top_p: float, tokens: set[int]) -> None:
    assert set(draws(temperature=1.0, top_p=top_p)) == tokens


def test_frequencies_follow_the_probabilities() -> None:
    drawn = draws(4000, temperature=1.0, top_p=1.0)
    assert abs(drawn.count(0) / 4000 - 0.5) < 0.03
    assert abs(drawn.count(2) / 4000 - 0.15) < 0.03


def test_a_seed_repeats_the_draws() -> None:
    assert draws(50, temperature=1.0, top_p=1.0) == draws(50, temperature=1.0, top_p=1.0)
    assert draws(50, temperature=1.0, top_p=1.0) != draws(50, temperature=1.0, top_p=1.0, seed=1)


def test_banned_tokens_are_never_chosen() -> None:
    sampler = Sampler.of(Settings(temperature=1.0, top_p=1.0, seed=0), torch.device("cpu"))
    assert 0 not in {sampler.choose(LOGITS, banned=(0,)) for _ in range(200)}


def test_mean_logprob() -> None:
    sampler = Sampler.of(Settings(temperature=0.0), torch.device("cpu"))
    assert sampler.mean_logprob is None
    sampler.choose(LOGITS)
    assert sampler.mean_logprob == pytest.approx(math.log(0.5))
