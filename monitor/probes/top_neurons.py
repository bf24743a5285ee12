"""The neurons that tell concepts best, with the tokens on which they are most active.

Of every layer the neurons whose class means differ most for any concept, in standard deviations;
without concepts those of the largest kurtosis. They are chosen in the sequences to fit on. The area
under the ROC curve and the tokens are of others, so that having been chosen helps neither.

A neuron has a label only where it was selective for the concept when it was chosen (as
`monitor.probes.neurons` has it) and its area in the other sequences is beyond 1/2 by three standard
deviations. A label says which of the given concepts it tells best: not that this is what it is for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from monitor.claims import Estimate
from monitor.evidence import Evidence, unseen
from monitor.features.neurons import NeuronsSeen
from monitor.features.scores import GROUPS, auc
from monitor.record import LAYER, Dim, Field, ProbeSpec

_GUESSING = 0.5

# By how many standard deviations the area of a neuron with a label differs from that.
_BEYOND = 3.0

SPEC = ProbeSpec(
    name="top_neurons",
    help="The 8 neurons of each block's MLP that tell concepts best (without concepts: of the "
    "largest kurtosis), and what they are most active on in sequences that did not choose them. "
    "n: evaluated sources.",
    source="Bills et al. 2023, Language models can explain neurons in language models; Gurnee et "
    "al. 2023, Finding neurons in a haystack",
    dims=(
        LAYER,
        Dim(name="neuron", help="Neuron of the layer; -1: none, validity says why."),
    ),
    fields=(
        Field(
            name="concept",
            help="The concept that it tells best; 'not' before it: it is more active without.",
            fooled_by="The best of the concepts that were given may be a bad one: see auc.",
            stderr=False,
            text=True,
        ),
        Field(
            name="label",
            help="The same where it is shown: selective for it when chosen, and auc beyond 1/2 by "
            "three standard deviations; else empty.",
            fooled_by="It names the best of the concepts that were given, and does not say that "
            "the neuron does nothing else, nor that the model uses it.",
            stderr=False,
            text=True,
        ),
        Field(
            name="score",
            help="Difference of its means on the tokens with and without the concept, in standard "
            "deviations, in the sequences that chose it.",
            low=0,
            null="that of the neuron of the same rank for labels permuted between sequences",
            fooled_by="It is the largest of many: auc is from sequences that did not choose.",
        ),
        Field(
            name="auc",
            help="How often it is more active on a token with the concept than on one without it "
            "(less, where 'not' is before the concept), in sequences that did not choose it.",
            low=0,
            high=1,
            null="1/2: it says nothing of the concept",
            fooled_by="A concept of few token ids is told by neurons of untrained models too. Of "
            "very skewed activations (squared ReLUs) bins make it too small, by up to 0.02.",
        ),
        Field(
            name="kurtosis",
            help="Kurtosis of its activation over tokens; 3: Gaussian.",
            low=1,
            null="the median of 64 random orthonormal directions of the neurons' space",
            fooled_by="A few outlier tokens raise it.",
        ),
        Field(
            name="contexts",
            help="The tokens on which it is most active, of up to 5 sequences: ids, that of the "
            "token in brackets among those around it.",
            fooled_by="The strongest activations need not be like the others.",
            stderr=False,
            text=True,
        ),
    ),
    needs=(("concepts", "neurons"),),
)


def compute(evidence: Evidence) -> dict[str, Any]:
    """One row for each layer and top neuron; where there are none, one that says why."""
    seen, why = evidence.collected("neurons")
    if seen is None:
        return unseen(SPEC, why)
    rows = [row for layer in range(seen.layers) for row in _rows(seen, layer)]
    return {column: [row[column] for row in rows] for column in unseen(SPEC, "")}


def _rows(seen: NeuronsSeen, layer: int) -> Iterator[dict[str, Any]]:
    top = seen.top.get(layer)
    if top is None or not len(top.neuron):
        why = seen.reasons.get(layer, "no neuron varies")
        columns = unseen(SPEC, why, n=seen.evaluated) | {"layer": [layer]}
        yield {name: None if value is None else value[0] for name, value in columns.items()}
        return
    area, area_stderr = auc(top.counts)
    held = (top.counts.sum((-2, -1)) > 0).sum(-1)
    for place, neuron in enumerate(top.neuron.tolist()):
        held_out = Estimate(
            value=float(area[place]),
            null=_GUESSING,
            stderr=float(area_stderr[place]),
            n=min(GROUPS, int(held[place])),
        )
        number = int(top.concept[place])
        named = "" if number < 0 else seen.names[number]
        concept = f"not {named}" if named and top.sign[place] < 0 else named
        shown = bool(top.selective[place]) and held_out.beyond(_BEYOND)
        told = {
            "score": top.score[:, place].tolist(),
            "auc": (held_out.value, held_out.stderr, _GUESSING if named else math.nan),
            "kurtosis": top.kurtosis[:, place].tolist(),
        }
        numbers = {
            column: value if math.isfinite(value) else None
            for name, parts in told.items()
            for column, value in zip(SPEC.field(name).columns, parts, strict=True)
        }
        yield numbers | {
            "layer": layer,
            "neuron": neuron,
            "concept": concept,
            "label": concept if shown else "",
            "contexts": top.contexts[place],
            "n": seen.evaluated,
            "validity": "ok",
        }
