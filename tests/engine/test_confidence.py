"""The confidence formula on distributions whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from moondream_cv.engine.confidence import PEAK_REACH, combine, continue_probability, peak_mass


def test_continue_probability_is_what_is_not_the_end() -> None:
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3], [0.9, 0.05, 0.05]]))
    torch.testing.assert_close(continue_probability(logits, 0), torch.tensor([0.8, 0.1]))


def test_a_sharp_peak_has_all_the_mass() -> None:
    logits = torch.full((1024,), -30.0)
    logits[300] = 10.0
    assert float(peak_mass(logits)) == pytest.approx(1.0)


@pytest.mark.parametrize(("peak", "bins"), [(512, 2 * PEAK_REACH + 1), (0, PEAK_REACH + 1), (1023, PEAK_REACH + 1)])
def test_a_flat_distribution_has_the_mass_of_the_window(peak: int, bins: int) -> None:
    logits = torch.zeros(1024)
    logits[peak] = 1e-4  # marks the window's middle
    assert float(peak_mass(logits)) == pytest.approx(bins / 1024, rel=1e-3)


def test_peak_mass_of_batches() -> None:
    logits = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([torch.stack([peak_mass(row) for row in rows]) for rows in logits])
    torch.testing.assert_close(peak_mass(logits), expected)


def test_combination_is_a_geometric_mean() -> None:
    masses = [torch.tensor(0.5), torch.tensor([0.125])]
    assert float(combine(torch.tensor(0.8), masses)) == pytest.approx(0.8 * math.sqrt(0.5 * 0.125))
