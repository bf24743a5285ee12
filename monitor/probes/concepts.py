"""Concepts as directions in the residual stream: how well they can be read off, and how they turn.

Directions are fitted on one part of the labelled sequences and judged on another. The area under
the ROC curve (AUC) says how often a token that has the concept lies further along its direction
than one that has it not. A concept that token ids decide can be read off any embedding, trained or
not; so the selectivity (Hewitt & Liang 2019) is the accuracy less that at a control task, in which
every token id has a side of its own, drawn at random.

A direction that is fitted on some tokens is off by noise. Of class means δ apart, with covariance Σ
in each of two classes of n/2 tokens, two such directions have an expected cosine of about
‖δ‖²/(‖δ‖² + 4 tr Σ/n). It is estimated from the cosine r of two halves of the tokens as 2r/(1 + r)
(Spearman–Brown), and it is the null of a drift: a direction has turned where its cosine with an
earlier one is below what noise alone leaves. As every measurement is made on the same tokens their
noise is largely the same too, so the null is on the safe side.

Shapes: `layer` what enters the first block and then what each returns; `concept`; `method` how a
direction was found.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from monitor.capture import Observation
from monitor.evidence import Evidence, unseen
from monitor.features import METHODS, Directions
from monitor.features.scores import accuracy, auc, selectivity
from monitor.labels import FEWEST
from monitor.record import STREAM_LAYER, Dim, Field, ProbeSpec

_BY_HEART = (
    "What the token id decides can be read off any embedding, trained or not: see the selectivity."
)
_SAME_TOKENS = (
    "It depends on the steps between the two. A rare concept's direction seems to turn by noise "
    "alone: compare it with its null."
)
_NOISE = (
    "what noise alone leaves of it: the cosine to expect of directions fitted on as many other "
    "tokens, from two halves of them"
)

SPEC = ProbeSpec(
    name="concepts",
    help="How well concepts can be read off the residual stream along a direction, on sequences "
    "that it was not fitted on, and how far the direction has turned.",
    source="Marks & Tegmark 2023; Hewitt & Liang 2019; Kim et al. 2018",
    dims=(
        STREAM_LAYER,
        Dim(name="concept", help="What tokens have or lack.", text=True),
        Dim(
            name="method",
            help="How the direction was found: `diff_in_means`, `mass_mean` (that times the "
            "inverse of the shrunk covariance) or `logistic` (regression with an L2 penalty, on at "
            "most 1,024 tokens).",
            text=True,
        ),
    ),
    fields=(
        Field(
            name="auc",
            help="Area under the ROC curve: how often a token that has the concept lies further "
            "along the direction than one that has it not.",
            low=0,
            high=1,
            null="1/2: labels are shuffled",
            fooled_by=_BY_HEART,
        ),
        Field(
            name="accuracy",
            help="Share of tokens on their side of the threshold, where half of them have the "
            "concept.",
            low=0,
            high=1,
            null="1/2: labels are shuffled",
            fooled_by=_BY_HEART,
        ),
        Field(
            name="selectivity",
            help="Accuracy less that at a control task, in which every token id has a side drawn "
            "at random.",
            low=-1,
            high=1,
            null="0: no better than what is known by heart",
            fooled_by="It is low for what token ids decide, which may be represented all the same; "
            "and where few tokens are rare the control task is easy.",
        ),
        Field(
            name="split_half",
            help="Cosine of the directions fitted on two halves of the tokens.",
            low=-1,
            high=1,
            stderr=False,
            null="0: nothing but noise, in as many dimensions as the variance is spread over",
            null_sd=True,
            fooled_by="Noise that the halves share, of texts on one subject say, raises it; of few "
            "whole texts noise alone scatters it by half as much again as null_sd says.",
        ),
        Field(
            name="drift_previous",
            help="Cosine with the direction at the previous measurement of this attempt. Missing "
            "at the first.",
            low=-1,
            high=1,
            stderr=False,
            null=_NOISE,
            null_sd=True,
            fooled_by=_SAME_TOKENS,
        ),
        Field(
            name="drift_first",
            help="Cosine with the direction at the first measurement of this attempt: after "
            "resuming, the first since then. Missing at the first.",
            low=-1,
            high=1,
            stderr=False,
            null=_NOISE,
            null_sd=True,
            fooled_by=_SAME_TOKENS,
        ),
    ),
    needs=(("concepts", "directions"),),
)


def compute(evidence: Evidence) -> dict[str, Any]:
    """One row for each layer (what enters the first block has -1), concept and method."""
    found, why = evidence.collected("directions")
    if found is None:
        return unseen(SPEC, why)
    columns: dict[str, Any] = {}
    fitted = found.vectors.isfinite().all(-1)
    for field, estimate in (("auc", auc), ("accuracy", accuracy), ("selectivity", selectivity)):
        counts = found.counts if field == "selectivity" else found.counts[:, :, :, 0]
        value, stderr = estimate(counts)
        # What cannot be scored must not look like chance.
        value = torch.where(fitted, value, torch.nan)
        null = torch.full_like(value, 0.0 if field == "selectivity" else 0.5)
        columns |= {field: value, f"{field}_stderr": stderr, f"{field}_null": null}
    columns |= _split_half(found)
    columns |= _drift("drift_previous", found, evidence.previous.get("concepts"))
    columns |= _drift("drift_first", found, evidence.first.get("concepts"))
    few = found.too_few
    rows = list(itertools.product(found.layers, range(len(found.names)), METHODS))
    known = torch.tensor([not few[concept] for _, concept, _ in rows])
    controlled = torch.tensor([bool(found.controlled[concept]) for _, concept, _ in rows])
    return {
        **{
            name: _cells(values, controlled if name.startswith("selectivity") else known)
            for name, values in columns.items()
        },
        "layer": [layer for layer, _, _ in rows],
        "concept": [found.names[concept] for _, concept, _ in rows],
        "method": [method for _, _, method in rows],
        "n": [int(found.sources[concept]) for _, concept, _ in rows],
        "validity": [_validity(found, concept) for _, concept, _ in rows],
    }


def _split_half(found: Directions) -> dict[str, Tensor]:
    cosine = found.split_half
    spread = found.dimensions[:, None].rsqrt().expand_as(cosine)
    return {
        "split_half": cosine,
        "split_half_null": torch.zeros_like(cosine),
        "split_half_null_sd": spread,
    }


def _drift(field: str, found: Directions, earlier: Observation | None) -> dict[str, Tensor | None]:
    names = (field, f"{field}_null", f"{field}_null_sd")
    before = None if earlier is None else earlier.features.get("directions")
    if before is None or (before.names, before.vectors.shape) != (found.names, found.vectors.shape):
        return dict.fromkeys(names)
    cosine = torch.cosine_similarity(found.vectors, before.vectors, dim=-1)
    expected = (found.reliability * before.reliability).sqrt()
    spread = noise_spread(expected, found.dimensions[:, None].expand_as(expected))
    return dict(zip(names, (cosine, expected, spread), strict=True))


def noise_spread(
    expected: Float[Tensor, "*direction"], dimensions: Float[Tensor, "*direction"]
) -> Float[Tensor, "*direction"]:
    """Standard deviation of the cosine of two estimates of one direction, of which noise leaves
    `expected`, to first order, where the noise is spread over so many `dimensions` (a
    participation ratio) and the direction lies in no special one of them.
    """
    return (1 - expected) * ((1 + 2 * expected - expected**2) / dimensions).sqrt()


def _cells(
    values: Float[Tensor, "layer concept method"] | None, known: Tensor
) -> list[float | None] | None:
    """The entries of a column, one a row; None for concepts of which nothing can be said."""
    if values is None:
        return None
    pairs = zip(values.flatten().tolist(), known.tolist(), strict=True)
    return [value if on else None for value, on in pairs]


def _validity(found: Directions, concept: int) -> str:
    if not found.too_few[concept]:
        return "ok"
    fewest = int(found.tokens[:, concept].min())
    return f"too few tokens: {fewest} of a side in a part of the sequences, {FEWEST} are needed"
