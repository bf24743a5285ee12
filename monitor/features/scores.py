"""How well scores tell two classes apart, from counts that can be added up token by token.

A score is moved so that its threshold is 0, scaled, and put into one of a fixed number of bins: so
the memory that this takes does not grow with the number of tokens. Accuracy is exact, since the
threshold lies between two bins; of the area under the ROC curve a pair within one bin counts half.

Shapes: `scored` what tokens are scored by; `group` sequences that are left out together for the
standard error; `side` 0 where a token has the concept, 1 where it has not; `bin` of the score.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

# Of one score and 16 groups they take 32 KiB; a pair of normal scores 1 sd apart has its area to
# within a thousandth.
BINS = 256
GROUPS = 16

# Infinity over itself would be no number.
_FAR = 1e30

Counts = Int[Tensor, "*scored group side bin"]


class Scores:
    """Counts the scores of labelled tokens, `scored` of each.

    `threshold` is where a score changes sides, `scale` about its standard deviation: bins are
    finest near the threshold, and none is missed however far off it is.
    """

    def __init__(
        self, threshold: Float[Tensor, " scored"], scale: Float[Tensor, " scored"]
    ) -> None:
        self._threshold = threshold
        # A score that does not vary falls beside its threshold, on one side.
        self._scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        shape = (len(threshold), GROUPS, 2, BINS)
        self._counts = torch.zeros(shape, dtype=torch.int32, device=threshold.device)

    def add(
        self,
        scores: Float[Tensor, "scored token"],
        labels: Int8[Tensor, "scored token"],
        group: Int[Tensor, " token"],
    ) -> None:
        """Counts tokens by what labels say of them for each score; 0 does not count."""
        away = (scores - self._threshold[:, None]) / self._scale[:, None]
        # From (-∞, ∞) into (-1, 1); what is no number is on the lower side.
        away = away.clamp(-_FAR, _FAR)
        squeezed = (away / (1 + away.abs())).nan_to_num(nan=-1.0)
        bins = ((squeezed + 1) * (BINS / 2)).long().clamp(max=BINS - 1)
        scored = torch.arange(len(scores), device=scores.device)[:, None]
        side = (labels < 0).long()
        place = ((scored * GROUPS + group % GROUPS) * 2 + side) * BINS + bins
        counted = place[labels != 0]
        flat = self._counts.view(-1)
        flat.index_add_(0, counted, torch.ones_like(counted, dtype=torch.int32))

    @property
    def counts(self) -> Counts:
        """What was counted, on the CPU."""
        return self._counts.cpu()


def auc(counts: Counts) -> tuple[Float[Tensor, "*scored"], Float[Tensor, "*scored"]]:
    """Area under the ROC curve: how often a token with the concept scores above one without it;
    and its standard error. NaN where there are none of either.

    >>> scores = Scores(torch.zeros(1), torch.ones(1))
    >>> labels = torch.tensor([[1, 1, -1, -1]], dtype=torch.int8)
    >>> scores.add(torch.tensor([[2.0, -0.5, 0.5, -1.0]]), labels, torch.arange(4))
    >>> auc(scores.counts)[0]
    tensor([0.7500])
    """
    return _with_stderr(_area, counts)


def accuracy(counts: Counts) -> tuple[Float[Tensor, "*scored"], Float[Tensor, "*scored"]]:
    """Share of tokens on their side of the threshold, the mean of the two sides' shares, so that
    guessing has 1/2 however many there are of each; and its standard error.
    """
    return _with_stderr(_balanced, counts)


def selectivity(
    counts: Int[Tensor, "*scored 2 group side bin"],
) -> tuple[Float[Tensor, "*scored"], Float[Tensor, "*scored"]]:
    """By how much the accuracy at a concept is above that at its control task (Hewitt & Liang
    2019), from the counts of the two; and the standard error of the difference.
    """

    def ahead(whole: Tensor) -> Tensor:
        concept, control = _balanced(whole).unbind(-1)
        return concept - control

    return _with_stderr(ahead, counts)


def _with_stderr(estimate: Callable[[Tensor], Tensor], counts: Counts) -> tuple[Tensor, Tensor]:
    whole = counts.sum(-3)
    without = (whole.unsqueeze(-3) - counts).movedim(-3, 0)
    replicates = torch.stack([estimate(left) for left in without])
    # A group of which nothing was counted is none.
    counted = (counts != 0).any((-2, -1)).movedim(-1, 0)
    counted = counted.reshape(len(counted), *replicates.shape[1:], -1).any(-1)
    groups = counted.sum(0)
    mean = torch.where(counted, replicates, 0.0).sum(0) / groups
    squares = torch.where(counted, (replicates - mean).square(), 0.0).sum(0)
    error = (squares * (groups - 1) / groups).sqrt()
    return estimate(whole), torch.where(groups > 1, error, torch.nan)


def _area(counts: Int[Tensor, "*scored side bin"]) -> Float[Tensor, "*scored"]:
    having, lacking = counts.double().unbind(-2)
    below = lacking.cumsum(-1) - lacking / 2
    pairs = having.sum(-1) * lacking.sum(-1)
    return ((having * below).sum(-1) / pairs).float()


def _balanced(counts: Int[Tensor, "*scored side bin"]) -> Float[Tensor, "*scored"]:
    having, lacking = counts.double().unbind(-2)
    right = having[..., BINS // 2 :].sum(-1) / having.sum(-1)
    rejected = lacking[..., : BINS // 2].sum(-1) / lacking.sum(-1)
    return ((right + rejected) / 2).float()
