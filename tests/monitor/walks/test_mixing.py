"""Whether walks mix: against sums over one pair of draws at a time, and for known correlations."""

import math

import pytest
import torch

from monitor.walks import effective_draws, split_rhat
from tests.oracles import walks as oracle


def correlated(like: float, *, chains: int = 4, draws: int = 60, seed: int = 0) -> torch.Tensor:
    """An autoregressive series, a chain a row, in its stationary state."""
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(chains, draws, generator=random, dtype=torch.float64)
    rows = [noise[:, 0]]
    for at in range(1, draws):
        rows.append(like * rows[-1] + math.sqrt(1 - like**2) * noise[:, at])
    return torch.stack(rows, 1)


@pytest.mark.parametrize("draws", [60, 61])
@pytest.mark.parametrize("like", [-0.4, 0.0, 0.7])
def test_numbers_are_those_of_the_oracle(like, draws):
    rows = correlated(like, draws=draws)
    rows[0] += 0.5
    assert split_rhat(rows) == pytest.approx(oracle.split_rhat(rows.tolist()), rel=1e-9)
    assert effective_draws(rows) == pytest.approx(oracle.effective_draws(rows.tolist()), rel=1e-9)


@pytest.mark.parametrize("like", [0.0, 0.5, 0.9])
def test_correlated_draws_count_for_fewer(like):
    rows = correlated(like, draws=5000)
    expected = rows.numel() * (1 - like) / (1 + like)
    assert effective_draws(rows) == pytest.approx(expected, rel=0.15)
    assert split_rhat(rows) < 1.02


def test_what_has_not_mixed_is_told():
    well = correlated(0.5, draws=80)
    assert split_rhat(well) < 1.1
    elsewhere = well + torch.tensor([0.0, 0.0, 0.0, 3.0])[:, None]
    on_their_way = well + torch.linspace(0, 3, 80)
    wider = well * torch.tensor([1.0, 1.0, 1.0, 8.0])[:, None]
    for rows in (elsewhere, on_their_way, wider):
        assert split_rhat(rows) > 1.1
    assert effective_draws(elsewhere) < effective_draws(well) / 4


def test_what_cannot_be_told_is_nan():
    for rows in (torch.zeros(4, 3), torch.zeros(4, 20), torch.full((4, 20), torch.nan)):
        assert math.isnan(split_rhat(rows))
        assert math.isnan(effective_draws(rows))
