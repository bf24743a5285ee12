"""Scores counted in bins: against scikit-learn on the scores themselves, in the spread over other
sequences, and cut into passes in any way.
"""

import numpy as np
import pytest
import torch
from sklearn import metrics

from monitor.features.scores import (
    BINS,
    GROUPS,
    Scores,
    accuracy,
    auc,
    selectivity,
)


def drawn(seed, *, tokens=600, rows=20, apart=1.0, scored=3):
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, 2, (scored, tokens), generator=random).to(torch.int8)
    row = torch.randint(rows, (tokens,), generator=random)
    scores = torch.randn(scored, tokens, generator=random) + apart / 2 * labels
    return scores, labels, row


def counted(scores, labels, row, *, threshold=0.0, scale=1.0):
    each = torch.ones(len(scores))
    counting = Scores(threshold * each, scale * each)
    counting.add(scores, labels, row)
    return counting.counts


@pytest.mark.parametrize("apart", [0.0, 1.0, 6.0])
@pytest.mark.parametrize(("threshold", "scale"), [(0.0, 1.0), (0.4, 3.0), (-0.2, 0.5)])
def test_against_scikit_learn(apart, threshold, scale):
    scores, labels, row = drawn(0, apart=apart)
    counts = counted(scores, labels, row, threshold=threshold, scale=scale)
    for which in range(len(scores)):
        counts_for = labels[which] != 0
        truth = labels[which][counts_for].numpy() > 0
        score = scores[which][counts_for].numpy()
        said = score > threshold
        expected = metrics.roc_auc_score(truth, score)
        assert auc(counts)[0][which].item() == pytest.approx(expected, abs=2e-3)
        expected = metrics.balanced_accuracy_score(truth, said)
        assert accuracy(counts)[0][which].item() == pytest.approx(expected, abs=1e-6)
        sides = [int(truth.sum()), int((~truth).sum())]
        assert counts[which].sum((0, 2)).tolist() == sides


def test_ties_count_half_and_far_scores_are_not_lost():
    labels = torch.tensor([[1, -1]], dtype=torch.int8)
    row = torch.arange(2)
    assert auc(counted(torch.tensor([[0.3, 0.3]]), labels, row))[0].item() == 0.5
    far = torch.tensor([[1e30, -1e30]])
    assert auc(counted(far, labels, row))[0].item() == 1.0
    assert accuracy(counted(far, labels, row))[0].item() == 1.0
    # All scores alike: they say nothing, at whatever threshold.
    same = torch.full((1, 2), 7.0)
    assert accuracy(counted(same, labels, row, threshold=7.0, scale=0.0))[0].item() == 0.5
    infinite = torch.tensor([[torch.inf, -torch.inf]])
    assert auc(counted(infinite, labels, row))[0].item() == 1.0


def test_passes_may_be_cut_anywhere():
    scores, labels, row = drawn(1)
    whole = counted(scores, labels, row)
    for sizes in ([1] * 600, [17, 400, 183], [599, 1]):
        each = torch.ones(3)
        pieces = Scores(0 * each, each)
        for cut in zip(
            scores.split(sizes, 1), labels.split(sizes, 1), row.split(sizes), strict=True
        ):
            pieces.add(*cut)
        assert torch.equal(pieces.counts, whole)
    assert whole.shape == (3, GROUPS, 2, BINS)
    assert whole.sum() == (labels != 0).sum()


def deleted(estimate, scores, labels, row):
    """The jackknife written out: each sequence left out in turn."""
    found = []
    for group in row.unique():
        kept = row != group
        found.append(estimate(scores[kept], labels[kept]))
    found = np.array(found)
    return np.sqrt((len(found) - 1) / len(found) * ((found - found.mean()) ** 2).sum())


@pytest.mark.parametrize("rows", [3, 9, 16])
def test_errors_are_the_jackknife_over_the_sequences_that_there_are(rows):
    """Fewer sequences than groups leave some groups empty, which are no evidence of anything."""
    scores, labels, row = drawn(2, rows=rows, scored=2)
    counts = counted(scores, labels, row)

    def balanced(score, label):
        return metrics.balanced_accuracy_score(label[label != 0] > 0, score[label != 0] > 0)

    for which in range(2):
        expected = deleted(balanced, scores[which], labels[which], row)
        assert accuracy(counts)[1][which].item() == pytest.approx(expected, rel=1e-4)


def test_errors_are_the_spread_over_other_sequences():
    values, errors = [], []
    for seed in range(200):
        random = torch.Generator().manual_seed(seed)
        scores, labels, row = drawn(seed, tokens=320, rows=10, scored=2)
        # Tokens of a sequence share a part.
        scores = scores + 0.7 * torch.randn(10, generator=random)[row]
        counts = counted(scores, labels, row)
        found = [*(e(counts) for e in (auc, accuracy)), selectivity(counts[None])]
        values.append(torch.stack([value.flatten()[0] for value, _ in found]))
        errors.append(torch.stack([error.flatten()[0] for _, error in found]))
    ratio = torch.stack(errors).square().mean(0).sqrt() / torch.stack(values).std(0)
    assert ((ratio > 0.85) & (ratio < 1.3)).all(), ratio


def test_selectivity_is_the_difference_of_two_accuracies():
    scores, labels, row = drawn(3, scored=4)
    counts = counted(scores, labels, row)
    value, _ = selectivity(counts.unflatten(0, (2, 2)))
    exact = accuracy(counts)[0].unflatten(0, (2, 2))
    torch.testing.assert_close(value, exact[:, 0] - exact[:, 1])
    # What is the same token by token differs by nothing, for sure.
    value, error = selectivity(counts[:1].repeat(2, 1, 1, 1)[None])
    assert value.item() == error.item() == 0


def test_what_cannot_be_told_is_not_a_number():
    scores, labels, row = drawn(4, scored=1)
    one_side = labels.abs()
    for estimate in (auc, accuracy):
        value, error = estimate(counted(scores, one_side, row))
        assert value.isnan().all()
        assert error.isnan().all()
    _, error = auc(counted(scores, labels, torch.zeros_like(row)))
    assert error.isnan().all()
    nothing = counted(scores, 0 * labels, row)
    assert nothing.sum() == 0
    assert auc(nothing)[0].isnan().all()
