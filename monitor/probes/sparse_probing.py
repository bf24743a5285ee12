"""Sparse probing: how well the best k neurons of an MLP tell a concept (Gurnee et al. 2023).

The k neurons whose class means differ most, in standard deviations within the classes, get a linear
discriminant with the threshold halfway between the class means: chosen, fitted and counted on
three different sets of sequences. With r the share of the tokens with the concept that it finds and
w the share of those without it that it takes for such, F1 = 2r / (1 + r + w) and the accuracy is
(1 + r - w) / 2: those where there are as many tokens of each. Guessing has an accuracy of 1/2; its
F1 is 2q / (1 + 2q) where it says yes to a share q, so 1/2 for a coin and 2/3 for yes always.

The same with k random neurons is the null. The control task (Hewitt & Liang 2019) gives every token
id a side at random, and gets the k neurons that are best for it. How much more accurate the
concept's classifier is (its selectivity) is not token ids learnt by heart; a difference of F1 could
come of saying yes more often. Against k the three tell a concept with a neuron of its own (high
from k = 1 on) from one that is spread over many, and both from what any neurons would do.

Shapes: `probed` what has a score; `group` sequences that are left out together; `side` 0 where a
token has the concept, 1 where not; `answer` the same as the classifier has it.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from monitor.estimate import jackknife_stderr
from monitor.evidence import Evidence, unseen
from monitor.features.sparse import CURVES, SIZES, Sparse
from monitor.labels import FEWEST
from monitor.record import LAYER, Dim, Field, ProbeSpec

_GUESSING = (
    "Guessing yes for a share q has 2q / (1 + 2q): 1/2 for a coin, 2/3 for yes always. So skewed "
    "activations move it without any knowledge: see accuracy."
)

SPEC = ProbeSpec(
    name="sparse_probing",
    help="How well a linear classifier on the best k neurons of a block's MLP (after the "
    "nonlinearity) tells tokens with a concept from those without. Chosen, fitted and told of on "
    "three different sets of sequences; k doubles up to 256, or a quarter of the tokens to fit on. "
    "n: evaluated sources in which tokens count.",
    source="Gurnee et al. 2023, Finding neurons in a haystack; Hewitt & Liang 2019",
    dims=(
        LAYER,
        Dim(name="concept", help="What the tokens are labelled with.", text=True),
        Dim(name="k", help="Number of neurons; -1: none, validity says why."),
    ),
    fields=(
        Field(
            name="f1",
            help="F1 of the classifier on the best k neurons, both sides weighed alike. Its error "
            "is that of the evaluation, for the neurons and weights that were fitted.",
            low=0,
            high=1,
            null="F1 with k random neurons of the layer, fitted as these: answers of up to 8 sets",
            fooled_by=_GUESSING + " Concepts of few token ids are told from these alone, in an "
            "untrained model too: see selectivity. The best k by themselves need not be the best "
            "together: neurons that say the same count k times.",
        ),
        Field(
            name="control_f1",
            help="The same for the control task, in which token ids have random sides, with the k "
            "neurons that are best for it. Missing where its tokens are too few on a side.",
            low=0,
            high=1,
            null="guessing that says yes as often: 2q / (1 + 2q)",
            fooled_by="Where few token ids count, they are soon learnt by heart.",
        ),
        Field(
            name="accuracy",
            help="Share of tokens that the classifier on the best k neurons is right about, the "
            "mean of the two sides' shares.",
            low=0,
            high=1,
            null="1/2: guessing, however often it says yes",
            fooled_by="Concepts of few token ids are told from these alone: see selectivity.",
        ),
        Field(
            name="selectivity",
            help="Accuracy beyond that for the control task: what is told of the concept beyond "
            "token ids. Missing with it.",
            low=-1,
            high=1,
            null="0: as good as for random sides",
            fooled_by="A concept that token ids decide, by a rule that neurons share, is selective "
            "as long as there are more ids than can be learnt by heart.",
        ),
    ),
    needs=(("concepts", "sparse"),),
)


def compute(evidence: Evidence) -> dict[str, Any]:
    """One row for each layer, concept and number of neurons; where there are none to tell of, one
    that says why.
    """
    sparse, why = evidence.collected("sparse")
    if sparse is None:
        return unseen(SPEC, why)
    found, taken = _rates(_of_groups(sparse.answers)).unbind(-1)
    score, right = _f1(found, taken), (1 + found - taken) / 2
    best, control, random = (CURVES.index(name) for name in CURVES)
    yes = (found[0] + taken[0])[:, :, control] / 2
    half = torch.full_like(yes, 0.5)
    estimates = {
        "f1": (*_estimate(score[:, :, :, best]), score[0, :, :, random]),
        "control_f1": (*_estimate(score[:, :, :, control]), _f1(yes, yes)),
        "accuracy": (*_estimate(right[:, :, :, best]), half),
        "selectivity": (
            *_estimate(right[:, :, :, best] - right[:, :, :, control]),
            torch.zeros_like(half),
        ),
    }
    rows = [
        row
        for layer in range(sparse.layers)
        for concept in range(len(sparse.names))
        for row in _rows(sparse, layer, concept, estimates)
    ]
    return {column: [row[column] for row in rows] for column in unseen(SPEC, "")}


def f1(
    answers: Int[Tensor, "*probed group side answer"],
) -> tuple[Float[Tensor, "*probed"], Float[Tensor, "*probed"]]:
    """F1 with both sides weighed alike, and its standard error from leaving groups out. NaN where a
    side has no tokens.

    >>> round(f1(torch.tensor([[[8, 2], [4, 6]]]))[0].item(), 6)  # 2 · 0.8 / (1 + 0.8 + 0.4)
    0.727273
    """
    return _estimate(_f1(*_rates(answers).unbind(-1)))


def _f1(found: Float[Tensor, "*probed"], taken: Float[Tensor, "*probed"]) -> Tensor:
    return 2 * found / (1 + found + taken)


def _of_groups(
    answers: Int[Tensor, "*probed GROUPS side answer"],
) -> Int[Tensor, "*probed group side answer"]:
    """Those of the groups that have sequences: fewer than all where these are few."""
    held = answers.sum((-2, -1)).flatten(0, -2).any(0)
    return answers[..., held, :, :] if held.any() else answers


def _rates(
    answers: Int[Tensor, "*probed group side answer"],
) -> Float[Tensor, "replicate *probed side"]:
    """Of either side the share that is said to have the concept: in all groups together, and then
    without each of them.
    """
    whole = answers.sum(-3, keepdim=True)
    left = torch.cat([whole, whole - answers], dim=-3).movedim(-3, 0).double()
    return left[..., 0] / left.sum(-1)


def _estimate(
    replicates: Float[Tensor, "replicate *probed"],
) -> tuple[Float[Tensor, "*probed"], Float[Tensor, "*probed"]]:
    return replicates[0], jackknife_stderr(replicates[1:])


def _rows(
    sparse: Sparse,
    layer: int,
    concept: int,
    estimates: dict[str, tuple[Tensor, Tensor, Tensor]],
) -> list[dict[str, Any]]:
    place = {
        "layer": layer,
        "concept": sparse.names[concept],
        "n": int(sparse.sources[concept]),
    }
    if layer in sparse.reasons:
        return [_nothing(place, sparse.reasons[layer])]
    if not sparse.largest[layer, concept]:
        fewest = int(sparse.tokens[0, concept].min())
        why = f"too few tokens: {fewest} of a side in a split, at least {FEWEST} are needed"
        return [_nothing(place, why)]
    rows = []
    for at, size in enumerate(SIZES):
        if size > sparse.largest[layer, concept]:
            break
        row: dict[str, Any] = {**place, "k": size, "validity": "ok"}
        for name, each in estimates.items():
            told = name in {"f1", "accuracy"} or bool(sparse.controlled[concept])
            for column, values in zip(SPEC.field(name).columns, each, strict=True):
                row[column] = float(values[layer, concept, at]) if told else None
        if sparse.lost[layer, concept, :, at].any():
            row = _nothing(place | {"k": size}, "there are activations that are not finite")
        rows.append(row)
    return rows


def _nothing(place: dict[str, Any], why: str) -> dict[str, Any]:
    numbers = dict.fromkeys(column for field in SPEC.fields for column in field.columns)
    return {"k": -1, **place, **numbers, "validity": why}
