"""Induction and its neighbours: where every head looks on repeated random tokens.

Prefix matching is the attention from a token's later copies to the tokens that followed its
earlier ones: for queries i in later copies of a block of period P, the mean of Σ_k p[i, i - kP + 1]
over all earlier copies k (Olsson et al. 2022, "In-context Learning and Induction Heads"). The
previous-token, duplicate-token and first-token scores are such means for the offsets 1 and kP and
for position 0. `beyond_position` is prefix matching less the same mean where P is the period of
another sequence, as near as may be, and the keys are not those of prefix matching by chance.
A perfect head scores 1; the null is uniform attention over the keys in view, on the same tokens.

What fools it: at one fixed period a head that copies by position alone scores near 1, which is why
the stimulus draws a period for each sequence; and attention is a pattern, not yet a mechanism.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from monitor.attention import LayerAttention
from monitor.estimate import jackknife_stderr, left_in, pooled_mean
from monitor.evidence import Evidence
from monitor.record import HEAD, LAYER, Field, ProbeSpec
from monitor.stimuli import Stimulus

_FIXED_PERIOD = "Copying by position, where all periods are equal; here each sequence has its own."
_UNIFORM = "uniform attention over the keys in view, on the same tokens"

SPEC = ProbeSpec(
    name="induction",
    help="Where every attention head looks on random tokens repeated at random periods.",
    source="Olsson et al. 2022, In-context Learning and Induction Heads",
    dims=(LAYER, HEAD),
    fields=(
        Field(
            name="prefix_matching",
            help="Mean attention from a token's later copies to the tokens after its earlier ones.",
            low=0,
            high=1,
            null=_UNIFORM,
            fooled_by=_FIXED_PERIOD,
        ),
        Field(
            name="beyond_position",
            help="`prefix_matching` less what the head gives to the same distances in sequences of "
            "another period: 0 for a head that attends by position alone.",
            high=1,
            null=_UNIFORM,
            fooled_by="A head that looks anywhere else at what repeats takes attention from these "
            "distances.",
        ),
        Field(
            name="previous_token",
            help="Mean attention to the position before, on repeated random tokens.",
            low=0,
            high=1,
            null=_UNIFORM,
            fooled_by="Working circuits may need little of it: there is no fixed threshold.",
        ),
        Field(
            name="previous_token_text",
            help="Mean attention to the position before, on held-out text.",
            low=0,
            high=1,
            null=_UNIFORM,
            fooled_by="Text repeats words at short distances: compare it with random tokens.",
        ),
        Field(
            name="duplicate_token",
            help="Mean attention from a token's later copies to its earlier ones.",
            low=0,
            high=1,
            null=_UNIFORM,
            fooled_by=_FIXED_PERIOD,
        ),
        Field(
            name="first_token",
            help="Mean attention to position 0: the attention sink.",
            low=0,
            high=1,
            null=_UNIFORM,
            fooled_by="Heads with nothing to do rest there: it says nothing of what else they do.",
        ),
        Field(
            name="same_offset",
            help="Probability that two queries of sequences of different periods attend equally "
            "far back: 1 for a head that attends by position alone.",
            low=0,
            high=1,
            null=_UNIFORM,
            fooled_by="Heads that attend by position to several places share it out between them.",
        ),
        Field(
            name="entropy",
            help="Mean entropy of the attention rows.",
            unit="nats",
            low=0,
            null=_UNIFORM + ": the mean log of the number of keys in view",
            fooled_by="It grows with the number of keys in view: compare normalized_entropy.",
        ),
        Field(
            name="normalized_entropy",
            help="Mean entropy of the attention rows, each over the log of its keys in view.",
            low=0,
            high=1,
            null="1: " + _UNIFORM,
            fooled_by="Short rows weigh as much as long ones.",
        ),
        Field(
            name="largest_logit",
            help="Largest score that the softmax gets in a sequence, mean over sequences: training "
            "that diverges lets it grow (Wortsman et al. 2023). Where attention is blunt it can be "
            "below the true one, by less than the log of the keys in view.",
            null="0: queries and keys that have nothing to do with each other",
            fooled_by="What is added to all scores of a query changes it and nothing else.",
        ),
    ),
    needs=(("repeated", "attention"), ("text", "attention")),
)


Seen = TypeVar("Seen")

# Which target, on which stimulus, each attention score sums.
_TARGETS = {
    "prefix_matching": ("repeated", "prefix_matching"),
    "previous_token": ("repeated", "previous_token"),
    "previous_token_text": ("text", "previous_token"),
    "duplicate_token": ("repeated", "duplicate_token"),
    "first_token": ("repeated", "first_token"),
}


def compute(evidence: Evidence) -> dict[str, Any]:
    """One row a head, from the attention on `repeated` and, where there is any, on `text`."""
    observations = evidence.observations
    columns: dict[str, Any] = {}
    for field, (name, target) in _TARGETS.items():
        if name not in observations:
            columns |= {field: None, f"{field}_stderr": None, f"{field}_null": None}
            continue
        layers, stimulus = _present(observations[name].attention), observations[name].stimulus
        columns |= _estimates(
            field,
            torch.cat([layer.mass[target] for layer in layers], dim=1),
            torch.cat([layer.uniform[target] for layer in layers], dim=1),
            stimulus.targets[target].queries,
        )
    layers = _present(observations["repeated"].attention)
    stimulus = observations["repeated"].stimulus
    columns |= _beyond_position(layers, stimulus)
    columns |= _same_offset(layers, stimulus.period)
    batch, positions = stimulus.tokens.shape
    queries = torch.full((batch,), positions - 1)
    uniform = torch.cat([layer.uniform_entropy for layer in layers], dim=1)
    entropy = torch.cat([_present(layer.entropy) for layer in layers], dim=1)
    columns |= _estimates("entropy", entropy, uniform, queries)
    normalized = torch.cat([_present(layer.normalized_entropy) for layer in layers], dim=1)
    ones = torch.full_like(uniform, positions - 1)
    columns |= _estimates("normalized_entropy", normalized, ones, queries)
    columns.update(_largest(layers))
    heads = [(layer, head) for layer in layers for head in range(layer.uniform_entropy.shape[1])]
    return columns | {
        "layer": [layer.layer for layer, _ in heads],
        "head": [head for _, head in heads],
        "n": [batch] * len(heads),
        "validity": [_validity(layer) for layer, _ in heads],
    }


def _present(observed: Seen | None) -> Seen:
    if observed is None:
        raise ValueError(
            "induction needs the attention, with entropy on `repeated`, to be observed"
        )
    return observed


def _estimates(
    field: str,
    total: Float[Tensor, "batch head"],
    uniform: Float[Tensor, "batch head"],
    queries: Num[Tensor, " batch"],
) -> dict[str, Float[Tensor, " head"]]:
    mean, stderr = pooled_mean(total, queries)
    null, _ = pooled_mean(uniform, queries)
    return {field: mean, f"{field}_stderr": stderr, f"{field}_null": null}


def _largest(layers: Sequence[LayerAttention]) -> Mapping[str, Float[Tensor, " head"] | None]:
    shown = [layer.largest_logit for layer in layers if layer.largest_logit is not None]
    if len(shown) < len(layers):
        return dict.fromkeys(("largest_logit", "largest_logit_stderr", "largest_logit_null"))
    largest = torch.cat(shown, dim=1)
    return _estimates("largest_logit", largest, torch.zeros_like(largest), torch.ones(len(largest)))


def _beyond_position(
    layers: Sequence[LayerAttention], stimulus: Stimulus
) -> dict[str, Float[Tensor, " head"] | None]:
    """The difference of two pooled means, and its standard error by leaving sequences out."""
    own, other = (stimulus.targets[name].queries for name in ("prefix_matching", "other_period"))
    if not other.any():
        return dict.fromkeys(("beyond_position", "beyond_position_stderr", "beyond_position_null"))

    batch = len(own)
    everything = torch.ones(1, batch, dtype=torch.bool)
    kept = torch.cat([everything, left_in(batch, groups=batch)]).double()

    def beyond(of: str) -> Float[Tensor, "group head"]:
        """Of all sequences, and without each of them."""
        matching, elsewhere = (
            torch.cat([getattr(layer, of)[name] for layer in layers], dim=1).double()
            for name in ("prefix_matching", "other_period")
        )
        own_mean = kept @ matching / (kept @ own.double())[:, None]
        return own_mean - kept @ elsewhere / (kept @ other.double())[:, None]

    attended = beyond("mass")
    return {
        "beyond_position": attended[0],
        "beyond_position_stderr": jackknife_stderr(attended[1:]),
        "beyond_position_null": beyond("uniform")[0],
    }


def _same_offset(
    layers: Sequence[LayerAttention], period: Int[Tensor, " batch"]
) -> dict[str, Float[Tensor, " head"] | None]:
    """Each pair of sequences of different periods gives how often offsets drawn from both agree."""
    pairs = (period[:, None] != period).float()
    if not pairs.any():
        return dict.fromkeys(("same_offset", "same_offset_stderr", "same_offset_null"))
    offsets = torch.cat([_present(layer.offsets) for layer in layers], dim=1)
    uniform = torch.cat([_present(layer.uniform_offsets) for layer in layers], dim=1)

    def agreement(profile: Tensor) -> tuple[Tensor, Tensor]:
        rows = (torch.einsum("aho,bho->hab", profile, profile) * pairs).sum(-1)
        return rows.sum(-1) / pairs.sum(), (rows.sum(-1, keepdim=True) - 2 * rows) / (
            pairs.sum() - 2 * pairs.sum(-1)
        )

    mean, without = agreement(offsets)
    return {
        "same_offset": mean,
        "same_offset_stderr": jackknife_stderr(without.mT),
        "same_offset_null": agreement(uniform)[0],
    }


def _validity(layer: LayerAttention) -> str:
    if not layer.causal:
        return "attention is not causal"
    if not layer.uniform["prefix_matching"].any():
        return "no earlier copy is in view"
    return "ok"
