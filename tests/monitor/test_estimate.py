"""Pooled means and the jackknife: against the formula, against repeated draws, and where there is
too little.
"""

import math

import pytest
import torch
from jaxtyping import TypeCheckError

from monitor.estimate import jackknife_stderr, left_in, pooled_mean


def test_mean_and_error_are_those_of_a_ratio_of_totals():
    totals, counts = [3.0, 8.0, 1.0, 5.5], [2, 5, 1, 4]
    mean, stderr = pooled_mean(torch.tensor(totals), torch.tensor(counts))
    ratio = sum(totals) / sum(counts)
    squares = sum((t - ratio * c) ** 2 for t, c in zip(totals, counts, strict=True))
    assert mean.item() == pytest.approx(ratio, rel=1e-6)
    assert stderr.item() == pytest.approx(math.sqrt(4 / 3 * squares) / sum(counts), rel=1e-6)


def test_with_equal_counts_it_is_the_standard_error_of_the_mean_of_sequences():
    totals = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    mean, stderr = pooled_mean(totals, torch.full((10,), 7))
    torch.testing.assert_close(mean, (totals / 7).mean(0))
    torch.testing.assert_close(stderr, (totals / 7).std(0) / math.sqrt(10))


def test_error_covers_samples_that_move_together_in_a_sequence():
    """Tokens of a sequence share a deviation: the spread of repeated draws is the error said."""
    random = torch.Generator().manual_seed(0)
    draws, batch, tokens = 2000, 16, 50
    count = torch.randint(10, tokens + 1, (draws, batch), generator=random)
    shared = torch.randn(draws, batch, generator=random)
    own = torch.randn(draws, batch, generator=random) * count.sqrt()
    estimates = [pooled_mean(s * c + o, c) for s, c, o in zip(shared, count, own, strict=True)]
    means, errors = (torch.stack(values) for values in zip(*estimates, strict=True))
    assert errors.square().mean().sqrt().item() == pytest.approx(means.std().item(), rel=0.1)
    # As if tokens were independent, the error would be far smaller.
    assert errors.mean() > 3 * (1 / count.sum(1).sqrt()).mean()


def test_one_sequence_has_no_error():
    mean, stderr = pooled_mean(torch.tensor([[6.0, 9.0]]), torch.tensor([3]))
    assert mean.tolist() == [2.0, 3.0]
    assert stderr.isnan().all()


def test_what_is_not_finite_stays_so_and_stays_apart():
    mean, stderr = pooled_mean(torch.tensor([[1.0, float("nan")], [2.0, 1.0]]), torch.ones(2))
    assert mean[0] == 1.5
    assert mean[1].isnan()
    assert stderr[1].isnan()


def test_shapes_are_checked_in_tests():
    with pytest.raises(TypeCheckError):
        pooled_mean(torch.ones(4, 3), torch.ones(5))


def test_groups_left_out_are_neighbours_of_nearly_one_size():
    kept = left_in(40, groups=16)
    assert (~kept).sum(0).tolist() == [1] * 40
    assert set((~kept).sum(1).tolist()) == {2, 3}
    for row in ~kept:
        places = row.nonzero().flatten().tolist()
        assert places == list(range(places[0], places[-1] + 1))
    assert torch.equal(left_in(5), ~torch.eye(5, dtype=torch.bool))


@pytest.mark.parametrize("batch", [12, 40])
def test_jackknife_is_the_spread_of_repeated_draws(batch):
    """Of a ratio of sums, whose error has a closed form; in groups it is as large on average."""
    draws = torch.rand(400, batch, 2, generator=torch.Generator().manual_seed(0)) + 0.2
    errors, exact, ratios = [], [], []
    for top, bottom in (draw.unbind(1) for draw in draws):
        ratio, stderr = pooled_mean(top, bottom)
        without = [top[kept].sum() / bottom[kept].sum() for kept in left_in(batch, groups=10)]
        errors.append(jackknife_stderr(torch.stack(without)))
        exact.append(stderr)
        ratios.append(ratio)
    said = torch.stack(errors).square().mean().sqrt().item()
    assert said == pytest.approx(torch.stack(exact).square().mean().sqrt().item(), rel=0.1)
    assert said == pytest.approx(torch.stack(ratios).std().item(), rel=0.1)


def test_one_group_has_no_error():
    assert jackknife_stderr(torch.ones(1, 3)).isnan().all()
