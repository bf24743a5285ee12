"""Direct logit attribution: which components write the correct next token's logit.

The residual stream x before the final norm is the sum of what the embedding, every head and every
MLP wrote to it. With the number σ by which the norm divided in this very pass its output
γ ⊙ C x / σ + β is linear in x, and so each component's write w has a term of the logit of token t,
(γ ⊙ C w / σ) · W_U[t]; all terms, and what depends on no component, add up to the logit (Elhage et
al. 2021, "A Mathematical Framework for Transformer Circuits"). Means over queries in later copies
of repeated random tokens, whose next token an earlier copy holds: there an induction head writes
that token, and not another of the same block. That other one is the null.

What fools it: it is the direct effect alone. What a component writes may be read by later ones, or
undone by them, and σ depends on all of them: that a head causes the prediction takes an ablation.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from monitor.capture import Observation
from monitor.estimate import pooled_mean
from monitor.evidence import Evidence
from monitor.record import Dim, Field, ProbeSpec

_DIRECT = "The direct effect alone: later components may read what is written, or undo it."

SPEC = ProbeSpec(
    name="attribution",
    help="What every component writes directly towards the logit of the correct next token, on "
    "later copies of repeated random tokens; the terms add up to the logit.",
    source="Elhage et al. 2021, A Mathematical Framework for Transformer Circuits",
    dims=(
        Dim(
            name="component",
            help="What writes: embedding (with positions), head, attention_bias (what a block's "
            "attention writes whatever its heads do), mlp or bias (of final norm and unembedding); "
            "logit is the sum of all.",
            text=True,
        ),
        Dim(name="layer", help="Transformer block, counted from 0 at the embedding; -1: none."),
        Dim(name="head", help="Attention (query) head, counted from 0; -1: none."),
    ),
    fields=(
        Field(
            name="logit",
            help="Mean contribution to the correct next token's logit (before a cap on it).",
            null="contribution to the logit of another token of the same block",
            fooled_by="What raises the logits of all tokens alike predicts nothing: see contrast.",
        ),
        Field(
            name="contrast",
            help="Mean contribution to the correct next token's logit minus that to the logit of "
            "another token of the same block.",
            null="0: what is written says nothing of which token comes next",
            fooled_by=_DIRECT,
        ),
    ),
    needs=(("repeated", "attribution"),),
)


def compute(evidence: Evidence) -> dict[str, Any]:
    """One row a component, from the attribution on `repeated`."""
    observation = evidence.observations["repeated"]
    sums = observation.attribution
    if sums is None:
        return _unseen(observation)
    rows = len(sums.components)
    null, _ = pooled_mean(sums.shuffled.T, sums.questions)
    return {
        "component": [component.kind for component in sums.components],
        "layer": [component.layer for component in sums.components],
        "head": [component.head for component in sums.components],
        **_estimates("logit", sums.correct, sums.questions),
        "logit_null": null,
        **_estimates("contrast", sums.correct - sums.shuffled, sums.questions),
        "contrast_null": torch.zeros(rows),
        "n": [len(sums.questions)] * rows,
        "validity": ["ok"] * rows,
    }


def _estimates(
    field: str, total: Float[Tensor, "component batch"], questions: Int[Tensor, " batch"]
) -> dict[str, Float[Tensor, " component"]]:
    mean, stderr = pooled_mean(total.T, questions)
    return {field: mean, f"{field}_stderr": stderr}


def _unseen(observation: Observation) -> dict[str, Any]:
    columns: dict[str, Any] = dict.fromkeys(c for field in SPEC.fields for c in field.columns)
    why = observation.reasons.get("attribution", "it was not observed")
    none = {"component": ["logit"], "layer": [-1], "head": [-1]}
    return columns | none | {"n": [0], "validity": [why]}
