"""Which weights these are: a digest, their norm, and a sketch that tells how far others are.

Of two measurements with the same digest the weights are the same, bit for bit. The square root of
the summed squared differences of two sketches, of m numbers each, estimates the distance of the
weights, relative to which its standard deviation is about 1 / √(2 m), or more where there are few
weights. `monitor.detection` follows both through a run: a checkpoint that is not from this run, or
from another time of it, breaks the chain, and no transition is claimed across that.

What fools it: weights that were turned into ones that do the same, by permuting neurons say, are
far away.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.linalg import vector_norm

from monitor.divided import ONLY_A_PART, is_whole
from monitor.evidence import Evidence, unseen
from monitor.record import Field, ProbeSpec
from monitor.sketching import digest, sketch

SPEC = ProbeSpec(
    name="parameters",
    help="Which weights were measured, so that a checkpoint that is not what it is taken for is "
    "noticed. n: parameters.",
    source="Charikar et al. 2002, Finding frequent items in data streams",
    dims=(),
    fields=(
        Field(
            name="norm",
            help="Root of the sum of squares of all parameters; exact, its standard error is 0.",
            low=0,
            null="0: all that weight decay alone leaves",
            fooled_by="Norms, which make much of what a model does independent of it.",
        ),
        Field(
            name="digest",
            help="Hexadecimal; the same for the same names, types, shapes and bits of parameters.",
            text=True,
            stderr=False,
        ),
        Field(
            name="sketch",
            help="Sums of all parameters with random signs: the distance of two sketches is about "
            "that of the weights.",
            stderr=False,
            per="projection",
        ),
    ),
    needs=(),
    weights=True,
)


def compute(evidence: Evidence) -> dict[str, Any]:
    """One row."""
    module = evidence.known_parts().model.module
    count = sum(parameter.numel() for parameter in module.parameters())
    if not is_whole(module.parameters()):
        return unseen(SPEC, ONLY_A_PART, n=count)
    norms = [vector_norm(p.detach(), dtype=torch.float64) for p in module.parameters()]
    return {
        "norm": [math.hypot(*map(float, norms))],
        "norm_stderr": [0.0],
        "norm_null": [0.0],
        "digest": [digest(module)],
        "sketch": [sketch(module).tolist()],
        "n": [count],
        "validity": ["ok"],
    }
