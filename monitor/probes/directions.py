"""The directions of concepts themselves, to be used afterwards.

With v the `vector` of a row: adding α v to the residual stream after that layer steers the model
towards the concept (Rimsky et al. 2024), x − (x·v) v/‖v‖² takes the concept's direction out of it
(Ravfogel et al. 2020), and x·v scores tokens.

Shapes: `layer` what enters the first block and then what each returns; `concept`; `method` how a
direction was found; `feature` of the stream.
"""

from __future__ import annotations

import itertools
from typing import Any

from monitor.evidence import Evidence, unseen
from monitor.features import METHODS
from monitor.record import STREAM_LAYER, Dim, Field, ProbeSpec

SPEC = ProbeSpec(
    name="directions",
    help="The directions of concepts in the residual stream; whether they mean anything is in the "
    "same rows of `concepts`.",
    source="Marks & Tegmark 2023",
    dims=(
        STREAM_LAYER,
        Dim(name="concept", help="What tokens have or lack.", text=True),
        Dim(
            name="method",
            help="How it was found: `diff_in_means`, `mass_mean` or `logistic`.",
            text=True,
        ),
    ),
    fields=(
        Field(
            name="vector",
            help="From tokens that lack the concept towards those that have it, as long as the "
            "method makes it: diff-in-means is the difference of the two means.",
            per="feature",
            stderr=False,
        ),
        Field(
            name="contexts",
            help="The tokens furthest along it in sequences on which it was not fitted, one of "
            "each of five sequences: token ids, that of the token in brackets "
            "(`monitor.query.decoded` makes text of them).",
            text=True,
            stderr=False,
        ),
    ),
    needs=(("concepts", "directions"),),
)


def compute(evidence: Evidence) -> dict[str, Any]:
    """One row for each layer (what enters the first block has -1), concept and method."""
    found, why = evidence.collected("directions")
    if found is None:
        return unseen(SPEC, why)
    few = found.too_few.tolist()
    rows = list(itertools.product(found.layers, range(len(found.names)), METHODS))
    vectors = found.vectors.flatten(0, 2).tolist()
    return {
        "layer": [layer for layer, _, _ in rows],
        "concept": [found.names[concept] for _, concept, _ in rows],
        "method": [method for _, _, method in rows],
        "vector": [None if few[row[1]] else v for row, v in zip(rows, vectors, strict=True)],
        "contexts": [
            None if few[row[1]] else words for row, words in zip(rows, found.contexts, strict=True)
        ],
        "n": [int(found.sources[concept]) for _, concept, _ in rows],
        "validity": ["too few tokens" if few[concept] else "ok" for _, concept, _ in rows],
    }
