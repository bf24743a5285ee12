"""Analogies: whether a − b + c is nearest to d, and whether that takes a common offset at all.

3CosAdd (Mikolov et al. 2013): with unit vectors the answer is the word x with the largest
cos(x, a) − cos(x, b) + cos(x, c), of all words of all relations that were given, but for a, b and c
themselves. That this is d proves little: the offset a − b may be so short that what is nearest to c
(or to a) alone is the answer (Linzen 2016, "Issues in evaluating semantic spaces using word
analogies"; Rogers et al. 2017, "The (too many) problems of analogical reasoning with word
vectors"). So that baseline is the null, the accuracy with a, b and c allowed stands beside it, and
the offsets' own similarity, mean cos(a − b, a′ − b′) over pairs of the relation without a word in
common, beside that of the same words paired otherwise (Fournier et al. 2020, "Analogies minus
analogy test"). A direction is there where the accuracy beats the baseline, and not before.

Standard errors are jackknives: each word is left out with all quadruples that have it, words that
are in the same quadruples counting as one and what all quadruples share as given. For quadruples
without common words it is the usual standard error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from monitor.analogies import quadruples_in
from monitor.estimate import jackknife_stderr
from monitor.evidence import Evidence, unseen
from monitor.features.analogies import WordProducts
from monitor.record import STREAM_LAYER, Dim, Field, ProbeSpec

_NONE = "no analogies were given: pass Analogies(...) in concepts="

_SHUFFLES = 32

_WORDS = (
    "The candidates are the words of the analogies that were given: it is easier among few of them."
)

SPEC = ProbeSpec(
    name="analogies",
    help="Whether a − b + c leads to d in the residual stream, for each relation between words "
    "that the user gave; a shared direction is there only where accuracy beats "
    "accuracy_without_offset.",
    source="Mikolov et al. 2013, Linguistic Regularities in Continuous Space Word Representations; "
    "Linzen 2016; Rogers et al. 2017",
    dims=(
        STREAM_LAYER,
        Dim(name="relation", help="Name that the user gave the analogies.", text=True),
    ),
    fields=(
        Field(
            name="accuracy",
            help="Share of quadruples of which d is nearest to a − b + c, where a, b and c are no "
            "answers.",
            low=0,
            high=1,
            null="accuracy_without_offset: what is nearest to c, or to a, alone",
            fooled_by="Words that lie in pairs have 1 without any offset in common. " + _WORDS,
        ),
        Field(
            name="accuracy_inputs_allowed",
            help="The same where a, b and c may be the answer too.",
            low=0,
            high=1,
            null="1 / candidates: guessing",
            fooled_by="Nearly always low, as words lie nearer to themselves than to d: it says "
            "that the accuracy came from leaving them out, not that there is no offset. " + _WORDS,
        ),
        Field(
            name="accuracy_without_offset",
            help="Share of quadruples of which d is nearest to c alone or to a alone (the better "
            "of the two shares), where a, b and c are no answers.",
            low=0,
            high=1,
            null="1 / (candidates − 3): guessing",
            fooled_by=_WORDS,
        ),
        Field(
            name="accuracy_gain",
            help="accuracy − accuracy_without_offset, of the same quadruples.",
            low=-1,
            high=1,
            null="0: the offset adds nothing",
            fooled_by="Where the baseline is right already an offset cannot show itself.",
        ),
        Field(
            name="offset_similarity",
            help="Mean cosine between offsets a − b (and d − c) of two pairs without a word in "
            "common. Missing where there are too few pairs to pair them otherwise: four, or more.",
            low=-1,
            high=1,
            null="the same of the same words paired otherwise",
            null_sd=True,
            fooled_by="A few features of large values in the stream make all offsets alike, and "
            "those of shuffled pairs too.",
        ),
    ),
    needs=(("analogies", "analogies"),),
)


def compute(evidence: Evidence) -> dict[str, Any]:
    """One row a layer and relation, from the words of `analogies`."""
    if "analogies" not in evidence.observations:
        return unseen(SPEC, _NONE)
    words, why = evidence.collected("analogies", "analogies")
    if words is None:
        return unseen(SPEC, why)
    columns: dict[str, list[Any]] = {
        name: [] for name in ("layer", "relation", "n", "validity", *_VALUES)
    }
    stimulus = evidence.observations["analogies"].stimulus
    for name, quadruples in quadruples_in(stimulus).items():
        for layer, row in zip(words.layers, _rows(words, quadruples), strict=True):
            for column, value in {"layer": layer, "relation": name, **row}.items():
                columns[column].append(value)
    return columns


_VALUES = tuple(column for field in SPEC.fields for column in field.columns)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Quadruples:
    """Of one relation the `places` of its words among all, and which of its quadruples remain as
    each word is left out.
    """

    places: Int[Tensor, "quadruple 4"]
    kept: Bool[Tensor, "left_out quadruple"]

    @classmethod
    def of(cls, places: Int[Tensor, "quadruple 4"]) -> _Quadruples:
        without = (places.unique()[:, None, None] != places).all(2)
        kept = torch.unique(without[without.any(1)], dim=0)
        return cls(places=places, kept=kept)

    def mean(
        self, hits: Float64[Tensor, "layer quadruple"]
    ) -> tuple[Float64[Tensor, " layer"], Float64[Tensor, "left_out layer"]]:
        """Mean over quadruples, and with each word left out."""
        kept = self.kept.double()
        return hits.mean(1), kept @ hits.T / kept.sum(1, keepdim=True)

    @property
    def least_stderr(self) -> float:
        """Of a share that so many answers can have, however alike they are: the standard deviation
        of the Beta posterior with Jeffreys' prior if all are right. The jackknife would say 0.
        """
        n = min(len(self.places), len(self.kept))
        return math.sqrt((n + 0.5) * 0.5 / ((n + 1) ** 2 * (n + 2)))


def _rows(words: WordProducts, ids: Int[Tensor, "quadruple 4"]) -> list[dict[str, Any]]:
    """The columns of one relation, by layer."""
    quadruples = _Quadruples.of(torch.searchsorted(words.ids, ids.contiguous()))
    why = "ok"
    if len(quadruples.kept) < 2:
        why = "all quadruples have the same words: pass some of other words"
    elif len(words.ids) < 5:
        why = f"{len(words.ids)} words leave no choice: pass analogies of others too"
    columns: Mapping[str, Tensor | None] = dict.fromkeys(_VALUES)
    if why == "ok":
        columns = {
            **columns,
            **_accuracies(words.products, quadruples),
            **_offsets(words.products, quadruples),
        }
    return [
        {name: None if values is None else float(values[row]) for name, values in columns.items()}
        | {"n": len(ids), "validity": why}
        for row in range(len(words.layers))
    ]


def _accuracies(
    products: Float64[Tensor, "layer word word"], quadruples: _Quadruples
) -> dict[str, Tensor | None]:
    layers, candidates = products.shape[:2]
    length = products.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    # A word whose stream is zero is as near to all.
    unit = torch.where(length > 0, 1 / length, torch.zeros_like(length))
    cosines = products * unit[:, :, None] * unit[:, None, :]
    a, b, c, d = quadruples.places.T
    inputs = torch.zeros(len(a), candidates, dtype=torch.bool)
    inputs.scatter_(1, quadruples.places[:, :3], value=True)
    together = [
        cosines[layer][a] - cosines[layer][b] + cosines[layer][c] for layer in range(layers)
    ]

    def share(scores: list[Tensor], excluded: Tensor) -> tuple[Tensor, Tensor]:
        return quadruples.mean(torch.stack([_hits(layer, d, excluded) for layer in scores]))

    accuracy, accuracies = share(together, inputs)
    allowed, alloweds = share(together, torch.zeros_like(inputs))
    # As a and c are in it alike, either may do without the rest.
    near = [share([layer[word] for layer in cosines], inputs) for word in (a, c)]
    without = torch.stack([one for one, _ in near]).amax(0)
    withouts = torch.stack([many for _, many in near]).amax(0)
    least = torch.tensor(quadruples.least_stderr, dtype=torch.float64)
    estimates = {
        "accuracy": (accuracy, accuracies, without),
        "accuracy_inputs_allowed": (allowed, alloweds, torch.full((layers,), 1 / candidates)),
        "accuracy_without_offset": (without, withouts, torch.full((layers,), 1 / (candidates - 3))),
        "accuracy_gain": (accuracy - without, accuracies - withouts, torch.zeros(layers)),
    }
    return {
        column: values
        for name, (value, replicates, null) in estimates.items()
        for column, values in (
            (name, value),
            (f"{name}_stderr", jackknife_stderr(replicates).maximum(least)),
            (f"{name}_null", null),
        )
    }


def _hits(
    scores: Float64[Tensor, "quadruple word"],
    answer: Int[Tensor, " quadruple"],
    excluded: Bool[Tensor, "quadruple word"],
) -> Float64[Tensor, " quadruple"]:
    """1 where the answer has the largest score; of a tie its share."""
    scores = scores.masked_fill(excluded, -math.inf)
    best = scores == scores.amax(1, keepdim=True)
    return best.gather(1, answer[:, None]).flatten().double() / best.sum(1)


def _offsets(
    products: Float64[Tensor, "layer word word"], quadruples: _Quadruples
) -> dict[str, Tensor | None]:
    places = quadruples.places
    both = torch.cat([places[:, [0, 1]], places[:, [3, 2]]])
    pairs, of_quadruple = both.unique(dim=0, return_inverse=True)
    apart = _apart(pairs, torch.eye(products.shape[1]))
    cosines = _cosines(products, pairs) * apart
    # A pair remains as long as one of its quadruples does.
    has = torch.zeros(len(places), len(pairs), dtype=torch.float64)
    has.scatter_(1, of_quadruple.reshape(2, -1).T, 1.0)
    kept = (quadruples.kept.double() @ has > 0).double()
    total = torch.einsum("gm,lmn,gn->gl", kept, cosines, kept)
    count = torch.einsum("gm,mn,gn->g", kept, apart, kept)
    shuffled = _shuffled(products, pairs)
    if len(shuffled) < 2:
        return {}
    return {
        "offset_similarity": cosines.sum((1, 2)) / apart.sum(),
        "offset_similarity_stderr": jackknife_stderr(total / count[:, None]),
        "offset_similarity_null": shuffled.mean(0),
        "offset_similarity_null_sd": shuffled.std(0),
    }


def _cosines(
    products: Float64[Tensor, "layer word word"], pairs: Int[Tensor, "pair 2"]
) -> Float64[Tensor, "layer pair pair"]:
    """Of the offsets of every two pairs; 0 where one has no length."""
    left, right = pairs.T
    differences = products[:, left] - products[:, right]
    dots = differences[:, :, left] - differences[:, :, right]
    length = dots.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    unit = torch.where(length > 0, 1 / length, torch.zeros_like(length))
    return dots * unit[:, :, None] * unit[:, None, :]


def _apart(
    pairs: Int[Tensor, "pair 2"], near: Float[Tensor, "word word"]
) -> Float64[Tensor, "pair pair"]:
    """1 where no word of the one pair is near one of the other, else 0."""
    words = torch.eye(len(near))[pairs].sum(1)
    return (words @ near @ words.T == 0).double()


def _shuffled(
    products: Float64[Tensor, "layer word word"], pairs: Int[Tensor, "pair 2"]
) -> Float64[Tensor, "shuffle layer"]:
    """Mean cosine of the offsets of words that are no pairs, paired in several ways, always the
    same ones. Two are compared only if no word of the one is a partner of a word of the other:
    what goes away from a pair and what comes back to it point apart.
    """
    random = torch.Generator().manual_seed(0)
    partners = torch.eye(products.shape[1])
    partners[pairs[:, 0], pairs[:, 1]] = 1
    partners[pairs[:, 1], pairs[:, 0]] = 1
    shuffles = []
    for _ in range(_SHUFFLES):
        order = torch.randperm(len(pairs), generator=random)
        other = torch.stack([pairs[:, 0], pairs[order, 1]], dim=1)
        other = other[partners[other[:, 0], other[:, 1]] == 0]
        apart = _apart(other, partners)
        if bool(apart.any()):
            cosines = _cosines(products, other) * apart
            shuffles.append(cosines.sum((1, 2)) / apart.sum())
    return torch.stack(shuffles) if shuffles else products.new_zeros(0, len(products))
