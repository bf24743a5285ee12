"""In-context learning: how much the loss falls as the model reads on.

The in-context score is the loss late in the context minus the loss early in it, on held-out text
(Olsson et al. 2022: tokens 500 and 50 of 512; here the means over the last and the second sixteenth
of the context, which hold those positions). The paired score compares the same targets: their loss
with the whole context before them minus with at most the last quarter of it. Both fall below their
null of 0 as the model learns to use its context.

What fools them: late and early tokens of few windows differ in difficulty (the paired score does
not have that), and any use of context counts: neither score is a measure of induction alone.
The loss on repeated random tokens has no such excuse: nothing but copying helps there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from monitor.capture import Observation
from monitor.estimate import pooled_mean
from monitor.evidence import Evidence
from monitor.losses import early_and_late, late_minus_early, whole_minus_tail
from monitor.record import Field, ProbeSpec

_LOG_VOCABULARY = "log(vocabulary): the uniform guess"
_NO_CONTEXT = "0: a model that does not use its context"

SPEC = ProbeSpec(
    name="in_context",
    help="How much the loss falls along the context, on held-out text and on repeated tokens.",
    source="Olsson et al. 2022, In-context Learning and Induction Heads",
    dims=(),
    fields=(
        Field(
            name="loss_early",
            help="Mean loss early in the context (its second sixteenth), on held-out text.",
            unit="nats",
            low=0,
            null=_LOG_VOCABULARY,
            fooled_by="Text that the model was trained on.",
        ),
        Field(
            name="loss_late",
            help="Mean loss late in the context (its last sixteenth), on held-out text.",
            unit="nats",
            low=0,
            null=_LOG_VOCABULARY,
            fooled_by="Text that the model was trained on.",
        ),
        Field(
            name="score",
            help="In-context score: late loss minus early loss; below 0 the context is used.",
            unit="nats",
            null=_NO_CONTEXT,
            fooled_by="Late and early tokens differ in difficulty; any use of context counts.",
        ),
        Field(
            name="paired_score",
            help="Loss with the whole context minus with its last quarter, on the same targets.",
            unit="nats",
            null=_NO_CONTEXT,
            fooled_by="Any use of distant context counts, not only induction.",
        ),
        Field(
            name="repeat_first",
            help="Mean loss on the first copy of repeated random tokens: nothing can predict them.",
            unit="nats",
            low=0,
            null=_LOG_VOCABULARY,
            fooled_by="It grows above its null as the model gets sure of its language.",
        ),
        Field(
            name="repeat_later",
            help="Mean loss on the later copies of repeated random tokens: copying predicts them.",
            unit="nats",
            low=0,
            null=_LOG_VOCABULARY,
            fooled_by="Overconfidence in the language can hide copying: compare repeat_first.",
        ),
        Field(
            name="loss_by_position",
            help="Mean loss of token i + 1 given tokens 0 to i of held-out text, for every i.",
            unit="nats",
            stderr=False,
            per="position",
        ),
    ),
    needs=(("repeated", "losses"), ("text", "losses"), ("text_tail", "losses")),
)


# Every prediction counts.
_ALL = torch.ones(1, 1)


def compute(evidence: Evidence) -> dict[str, Any]:
    """One row, from the losses on `repeated` and, where there is any, on `text` and its tail."""
    observations = evidence.observations
    repeated = observations["repeated"]
    losses, stimulus = _losses(repeated), repeated.stimulus
    columns: dict[str, Any] = {"n": [len(losses)], "validity": ["no held-out text"]}
    columns |= dict.fromkeys(c for field in SPEC.fields for c in field.columns)
    guess = math.log(repeated.vocab_size)
    columns |= _estimates("repeat_first", losses, stimulus.first_copy[:, :-1], guess)
    columns |= _estimates("repeat_later", losses, stimulus.later_copy[:, :-1], guess)
    if "text" not in observations:
        return columns
    text, tail = _losses(observations["text"]), _losses(observations["text_tail"])
    early, late = early_and_late(text)
    return columns | {
        **_estimates("loss_early", early, _ALL, guess),
        **_estimates("loss_late", late, _ALL, guess),
        **_estimates("score", late_minus_early(text)[:, None], _ALL, 0.0),
        **_estimates("paired_score", whole_minus_tail(text, tail)[:, None], _ALL, 0.0),
        "loss_by_position": text.mean(0, keepdim=True),
        "n": [min(len(losses), len(text))],
        "validity": ["ok"],
    }


def _losses(observation: Observation) -> Float[Tensor, "batch prediction"]:
    if observation.losses is None:
        raise ValueError("in_context needs the losses on its stimuli to be observed")
    return observation.losses


def _estimates(
    field: str,
    values: Float[Tensor, "batch prediction"],
    wanted: Shaped[Tensor, "#batch #prediction"],
    null: float,
) -> dict[str, Any]:
    wanted = wanted.expand_as(values)
    mean, stderr = pooled_mean((values * wanted).sum(1), wanted.sum(1))
    return {field: mean[None], f"{field}_stderr": stderr[None], f"{field}_null": [null]}
