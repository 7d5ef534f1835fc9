"""Sampling: temperature, top-p, seeds and banned tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moondream_cv.engine.sampling import SEED_BITS, SamplingParams, sample

PROBABILITIES = (0.5, 0.3, 0.15, 0.05)
LOGITS = torch.log(torch.tensor(PROBABILITIES))
SEEDS = np.random.default_rng(0).integers(0, 2**SEED_BITS, 20_000).tolist()


def tokens(temperature: float = 1.0, top_p: float = 1.0, banned: tuple[int, ...] = ()) -> list[int]:
    """Return the token that each seed selects."""
    sampled, _ = sample(
        LOGITS.expand(len(SEEDS), -1), [SamplingParams(temperature, top_p, seed, banned) for seed in SEEDS]
    )
    return sampled.tolist()


def test_greedy_sampling_selects_the_most_likely_token() -> None:
    sampled, logprobs = sample(LOGITS[None], [SamplingParams(0.0, 0.3, None)])
    assert sampled.tolist() == [0]
    assert float(logprobs) == pytest.approx(math.log(0.5))


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.0, {0}), (0.3, {0}), (0.6, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_most_likely_tokens(top_p: float, kept: set[int]) -> None:
    assert set(tokens(top_p=top_p)) == kept


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_tokens_follow_their_probabilities(temperature: float) -> None:
    sampled = tokens(temperature)
    powers = [p ** (1 / temperature) for p in PROBABILITIES]
    for token, power in enumerate(powers):
        assert sampled.count(token) / len(SEEDS) == pytest.approx(
            power / sum(powers), abs=0.015
        )  # 4 standard deviations


def test_banned_tokens_are_never_sampled() -> None:
    assert set(tokens(banned=(0, 2))) == {1, 3}
    sampled, logprobs = sample(LOGITS[None], [SamplingParams(0.0, 0.3, None, (0,))])
    assert sampled.tolist() == [1]
    assert float(logprobs) == pytest.approx(math.log(0.3 / 0.5))  # among the allowed tokens


def test_seeds_and_tokens_have_independent_noise() -> None:
    """Consecutive seeds, and seeds that differ in their upper half only, select independent tokens."""
    logits = torch.zeros(1, 64)
    for seeds in (range(20_000), range(0, 20_000 << 40, 1 << 40)):
        sampled, _ = sample(logits.expand(len(seeds), -1), [SamplingParams(1.0, 1.0, seed) for seed in seeds])
        pairs = 64 * sampled[:-1] + sampled[1:]
        for values, count in ((sampled, 64), (pairs, 4096)):
            expected = len(values) / count
            chi_squared = float(((values.bincount(minlength=count) - expected) ** 2 / expected).sum())
            assert abs(chi_squared - (count - 1)) < 5 * math.sqrt(2 * (count - 1))


def test_rounding_of_logits_does_not_change_samples() -> None:
    """Sampling by the cumulative distribution would change about 3 in 1000 of these choices."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1000, 1024, generator=generator)
    rounded = logits + 1e-5 * torch.randn(logits.shape, generator=generator)
    params = [SamplingParams(1.0, 1.0, seed) for seed in SEEDS[:1000]]
    assert sample(logits, params)[0].equal(sample(rounded, params)[0])


def test_only_possible_token_is_sampled_with_any_noise() -> None:
    banned = tuple(range(1, 2000))
    sampled, _ = sample(torch.zeros(200, 2000), [SamplingParams(1.0, 0.9, seed, banned) for seed in SEEDS[:200]])
    assert not sampled.any()


@given(
    rows=st.lists(
        st.tuples(
            st.floats(0.1, 3.0),
            st.floats(0.0, 1.0),
            st.none() | st.integers(0, 2**SEED_BITS - 1),
            st.sampled_from(((), (3,), (0, 5))),
        ),
        min_size=1,
        max_size=9,
    ),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_sampling_does_not_depend_on_the_batch(
    rows: list[tuple[float, float, int | None, tuple[int, ...]]], seed: int
) -> None:
    logits = 3 * torch.randn(len(rows), 50, generator=torch.Generator().manual_seed(seed))
    sampled, logprobs = sample(logits, [SamplingParams(*row) for row in rows])
    for i, row in enumerate(rows):
        alone, logprob = sample(logits[i : i + 1], [SamplingParams(*row)])
        assert int(alone) == int(sampled[i])
        assert float(logprob) == pytest.approx(float(logprobs[i]), abs=1e-6)
        assert int(alone) not in row[3]
