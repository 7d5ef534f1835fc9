"""Sampling: temperature, top-p, random numbers and banned tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moondream_cv.engine.sampling import SamplingParams, sample

PROBABILITIES = (0.5, 0.3, 0.15, 0.05)
LOGITS = torch.log(torch.tensor(PROBABILITIES))
DRAWS = np.linspace(0, 1, 4001, endpoint=False).tolist()


def tokens(draws: list[float], temperature: float = 1.0, top_p: float = 1.0, banned: tuple[int, ...] = ()) -> list[int]:
    """Return the token that each random number selects."""
    sampled, _ = sample(
        LOGITS.expand(len(draws), -1), [SamplingParams(temperature, top_p, draw, banned) for draw in draws]
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
    assert set(tokens(DRAWS, top_p=top_p)) == kept


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_tokens_follow_their_probabilities(temperature: float) -> None:
    sampled = tokens(DRAWS, temperature)
    powers = [p ** (1 / temperature) for p in PROBABILITIES]
    for token, power in enumerate(powers):
        assert sampled.count(token) / len(DRAWS) == pytest.approx(power / sum(powers), abs=1e-3)


def test_banned_tokens_are_never_sampled() -> None:
    assert set(tokens(DRAWS, banned=(0, 2))) == {1, 3}
    sampled, logprobs = sample(LOGITS[None], [SamplingParams(0.0, 0.3, None, (0,))])
    assert sampled.tolist() == [1]
    assert float(logprobs) == pytest.approx(math.log(0.3 / 0.5))  # among the allowed tokens


@given(
    rows=st.lists(
        st.tuples(
            st.floats(0.1, 3.0),
            st.floats(0.0, 1.0),
            st.none() | st.floats(0.0, 1.0, exclude_max=True),
            st.sampled_from(((), (3,), (0, 5))),
        ),
        min_size=1,
        max_size=9,
    ),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_sampling_does_not_depend_on_the_batch(
    rows: list[tuple[float, float, float | None, tuple[int, ...]]], seed: int
) -> None:
    logits = 3 * torch.randn(len(rows), 50, generator=torch.Generator().manual_seed(seed))
    sampled, logprobs = sample(logits, [SamplingParams(*row) for row in rows])
    for i, row in enumerate(rows):
        alone, logprob = sample(logits[i : i + 1], [SamplingParams(*row)])
        assert int(alone) == int(sampled[i])
        assert float(logprob) == pytest.approx(float(logprobs[i]), abs=1e-6)
        assert int(alone) not in row[3]
