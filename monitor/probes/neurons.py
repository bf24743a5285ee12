"""What the neurons of each layer are like, beside random directions of their space.

A neuron is selective for a concept where the means of its activation on the tokens with and without
it are at least half a standard deviation apart, and further than those of 99% of the layer's
neurons where labels are permuted (`monitor.features.permuting`). So by chance alone a neuron is
selective for about 0.01 of the concepts given, or fewer; the null of `concepts_per_neuron` says how
many it was. Random directions (64 orthonormal ones, of neurons in their own standard deviations)
have the same information without privileged axes: where neurons tell no more than these do, what is
told is the layer's doing and not its neurons'.

A neuron is dead that was on no token beyond 1% of the layer's typical activation (the mean over
neurons of the root mean square): of ReLU neurons those that are never active, of smooth ones those
that are as good as never. Dead ones do not count in the other fields. Kurtosis is the fourth
central moment over the squared variance: 3 for a Gaussian.

Class selectivity (Morcos et al. 2018) is (μmax − μ-max) / (μmax + μ-max), with the mean activation
on the tokens of the concept on which it is highest, and the mean of those of the other concepts.
For negative activations it means nothing: it is missing where the layer has any, or fewer than two
concepts are given. Without concepts all that is about them is missing, and the rest is told.

Standard errors leave out one of up to 8 groups of sequences at a time, at the same threshold.
"""

from __future__ import annotations

import math
from typing import Any

from monitor.evidence import Evidence, unseen
from monitor.record import LAYER, Field, ProbeSpec

_DIRECTIONS = "the same of 64 random orthonormal directions of the neurons' space"
_PERMUTED = "the same with labels permuted between sequences"
_FEW_IDS = (
    "A concept of few token ids is told by many neurons of any model, untrained ones too: compare "
    "it with random directions."
)
_MORE = "Concepts that go together, a string and its quotes say, count each."

SPEC = ProbeSpec(
    name="neurons",
    help="What the neurons of each block's MLP are like (after the nonlinearity), and how many "
    "concepts they tell. n: sources. Without concepts what is about these is missing.",
    source="Morcos et al. 2018, On the importance of single directions for generalization; Gurnee "
    "et al. 2023, Finding neurons in a haystack; Bricken et al. 2023, Towards monosemanticity",
    dims=(LAYER,),
    fields=(
        Field(
            name="dead_share",
            help="Share of the neurons that are never beyond 1% of the layer's typical activation.",
            low=0,
            high=1,
            null="0: every neuron is active at times",
            fooled_by="A neuron that is active on fewer tokens than 1 in those seen looks dead.",
        ),
        Field(
            name="kurtosis",
            help="Kurtosis of activations over tokens, the median of the neurons; 3: Gaussian.",
            low=1,
            null=_DIRECTIONS,
            fooled_by="The nonlinearity alone makes it larger than that of directions: random "
            "weights have neurons of large kurtosis too. A few outlier tokens raise it.",
        ),
        Field(
            name="concepts_per_neuron",
            help="Mean number of concepts that a neuron is selective for: the class means are at "
            "least half a standard deviation apart, and further than in 99% of the layer's neurons "
            "with labels permuted.",
            low=0,
            null=_PERMUTED,
            fooled_by=_FEW_IDS + " " + _MORE,
        ),
        Field(
            name="concepts_per_direction",
            help="Mean number of concepts that a random direction of the neurons' space is "
            "selective for: what a neuron tells because all of the layer does.",
            low=0,
            null=_PERMUTED,
            fooled_by="Neurons that go together are told of by most random directions.",
        ),
        Field(
            name="selective_share",
            help="Share of the neurons that are selective for at least one concept.",
            low=0,
            high=1,
            null=_DIRECTIONS,
            fooled_by="The null is that of 64 directions: a share of 1/2 is known to 0.06. "
            + _FEW_IDS,
        ),
        Field(
            name="polysemantic_share",
            help="Share of the neurons that are selective for two concepts or more; missing with "
            "fewer than two concepts.",
            low=0,
            high=1,
            null=_DIRECTIONS,
            fooled_by=_MORE + " What concepts do not name is not seen.",
        ),
        Field(
            name="class_selectivity",
            help="(μmax − μ-max) / (μmax + μ-max) of the mean activations by concept, the mean of "
            "the neurons; missing where activations can be negative, and with fewer than two "
            "concepts.",
            low=0,
            high=1,
            null=_PERMUTED,
            fooled_by="Rarely active neurons are selective for whatever is there when they are: "
            "see its null. Concepts that overlap lower it.",
        ),
    ),
    needs=(("concepts", "neurons"),),
)


def compute(evidence: Evidence) -> dict[str, Any]:
    """One row a layer; where its neurons are not seen, one that says why."""
    seen, why = evidence.collected("neurons")
    if seen is None:
        return unseen(SPEC, why)
    columns: dict[str, Any] = {column: [] for column in unseen(SPEC, "")}
    for layer in range(seen.layers):
        columns["layer"].append(layer)
        columns["n"].append(seen.fitted)
        columns["validity"].append(seen.reasons.get(layer, "ok"))
        told = seen.estimates.get(layer, {})
        for field in SPEC.fields:
            parts = told.get(field.name, (math.nan,) * 3)
            for column, value in zip(field.columns, parts, strict=True):
                columns[column].append(value if math.isfinite(value) else None)
    return columns
