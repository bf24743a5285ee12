"""A sparse dictionary of the residual stream, trained further at each measurement.

A top-k sparse autoencoder (Gao et al. 2024) writes each token's stream as a sum of few latents out
of many. It is trained on the fit half of the sequences of `concepts`, labelled or not, within a
fixed number of steps and ten seconds, from where the previous measurement left it, and told of on
the other half. It explains 1 − Σ‖x − x̂‖²/Σ‖x − x̄‖² of the variance, and recovers
(L_zero − L_dictionary)/(L_zero − L_model) of the loss: with what it makes of the stream in the
stream's place, beside zeros there. The first position of a sequence is left out of all of it: it is
never exchanged.

An autoencoder finds something in any activations: on a model whose weights are random it explains
much of the variance too (Heap et al. 2025). So the null is the mean of three others, with as many
steps on the same tokens, of untrained twins: the model with the entries of each weight matrix
shuffled among themselves. They scatter more than sequences alone would have them: `_null_sd` says
how much. A twin predicts nothing, so that there is no loss to recover; that is held against a
dictionary without latents, the mean.

Shapes: `batch` sequences; `estimate` each number, over all of them or as groups are left out;
`latent` of the dictionary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from monitor.dictionary import Evaluated, LayerDictionary
from monitor.estimate import jackknife_stderr, left_in
from monitor.evidence import Evidence, unseen
from monitor.record import Dim, Field, ProbeSpec

# Zeros must cost more than so many of their standard errors, and more than so many nats, before
# there is a loss to recover.
_SIGMAS, _LEAST_LOSS = 3, 0.01

_TWIN = "the mean of untrained twins'"
_WARM = "The learning rate and the steps since decide too: compare it with its null."

SPEC = ProbeSpec(
    name="dictionary",
    help="A top-k sparse autoencoder of the residual stream after the middle block, trained on "
    "from the previous measurement, on held-out sequences (optional: name it to have it measured).",
    source="Bricken et al. 2023; Gao et al. 2024; null: Heap et al. 2025",
    dims=(Dim(name="layer", help="Transformer block after which the stream is looked at."),),
    fields=(
        Field(
            name="variance_explained",
            help="Share of the variance of the stream that the dictionary explains.",
            high=1,
            null=_TWIN,
            null_sd=True,
            fooled_by="A few dimensions of large variance decide; random models have much too.",
        ),
        Field(
            name="loss_recovered",
            help="Share of the loss that zeros in the stream's place cost which the dictionary in "
            "its place does not. Missing where zeros cost nothing.",
            null="the mean in the stream's place (an untrained twin has no loss to recover)",
            fooled_by="Zeros cost far more than a model without that layer would: near 1 is easy.",
        ),
        Field(
            name="l0",
            help="Mean number of latents that fire on a token.",
            low=0,
            null=_TWIN,
            null_sd=True,
            fooled_by="At most k of them can, and mostly do: it says little of the model.",
        ),
        Field(
            name="dead_share",
            help="Share of the latents that fire on none of the tokens.",
            low=0,
            high=1,
            null=_TWIN,
            null_sd=True,
            fooled_by="Few tokens, or a dictionary that is larger than it need be.",
        ),
        Field(
            name="decoder_cosine",
            help="Mean cosine of the latents that fire with where they pointed at the previous "
            "measurement. Missing at the first.",
            low=-1,
            high=1,
            null=_TWIN,
            null_sd=True,
            fooled_by="It begins where it was, and so stays near. " + _WARM,
        ),
        Field(
            name="births",
            help="Share of the latents that fire now and did not at the previous measurement. "
            "Missing at the first.",
            low=0,
            high=1,
            null=_TWIN,
            null_sd=True,
            fooled_by="Rare latents fire on none of few tokens by chance. " + _WARM,
        ),
        Field(
            name="deaths",
            help="Share of the latents that fired at the previous measurement and do not now. "
            "Missing at the first.",
            low=0,
            high=1,
            null=_TWIN,
            null_sd=True,
            fooled_by="Rare latents fire on none of few tokens by chance. " + _WARM,
        ),
        Field(
            name="steps",
            help="Steps of training at this measurement; a count, without error.",
            low=0,
            null=_TWIN,
            fooled_by="A slow machine makes fewer of them in its time, and so all else worse.",
        ),
    ),
    needs=(("concepts", "dictionary"),),
)

_LATER = ("decoder_cosine", "births", "deaths")


def compute(evidence: Evidence) -> dict[str, Any]:
    """One row for each layer that has a dictionary."""
    told, why = evidence.collected("dictionary")
    if told is None:
        return unseen(SPEC, why)
    rows = [_row(layer) for layer in told]
    return {column: [row[column] for row in rows] for column in rows[0]}


def _row(told: LayerDictionary) -> dict[str, Any]:
    row: dict[str, Any] = {"layer": told.layer, "n": len(told.model.tokens), "validity": "ok"}
    seen, twins = _estimates(told.model), [_estimates(twin) for twin in told.twins]
    for field in SPEC.fields:
        if field.name == "loss_recovered":
            estimate, by_mean = _recovered(told.model.losses)
            nulls = [by_mean]
        else:
            estimate, nulls = seen[field.name], [twin[field.name] for twin in twins]
        row |= _columns(field, estimate, [null[0] for null in nulls if null is not None])
    return row


def _columns(
    field: Field, estimate: Float[Tensor, " estimate"] | None, nulls: list[Tensor]
) -> dict[str, Any]:
    """A field's columns; all None where it could not be told."""
    if estimate is None or not nulls:
        return dict.fromkeys(field.columns)
    null = torch.stack(nulls)
    columns = {
        field.name: estimate[0].item(),
        f"{field.name}_stderr": jackknife_stderr(estimate[1:]).item(),
        f"{field.name}_null": null.mean().item(),
    }
    if not field.null_sd:
        return columns
    return columns | {f"{field.name}_null_sd": null.std().item() if len(null) > 1 else None}


def _kept(batch: int) -> Float[Tensor, "estimate batch"]:
    """All sequences, then those that remain as each group is left out."""
    everyone = torch.ones(1, batch, dtype=torch.bool)
    return torch.cat([everyone, left_in(batch)]).double()


def _estimates(seen: Evaluated) -> dict[str, Float[Tensor, " estimate"] | None]:
    kept = _kept(len(seen.tokens))
    tokens = kept @ seen.tokens.double()
    variance = kept @ seen.squares - (kept @ seen.sums).square().sum(1) / tokens
    fires = kept @ seen.fires.double()
    alive = (fires > 0).double()
    estimates: dict[str, Tensor | None] = {
        "variance_explained": 1 - (kept @ seen.residual) / variance,
        "l0": fires.sum(1) / tokens,
        "dead_share": 1 - alive.mean(1),
        "steps": torch.full((len(kept),), float(seen.steps), dtype=torch.float64),
    }
    if seen.cosine is None or seen.fired is None:
        return estimates | dict.fromkeys(_LATER)
    before = seen.fired.double()
    return estimates | {
        "decoder_cosine": (alive @ seen.cosine.double()) / alive.sum(1),
        "births": (alive * (1 - before)).mean(1),
        "deaths": ((1 - alive) * before).mean(1),
    }


def _recovered(
    losses: Mapping[str, Float[Tensor, " batch"]] | None,
) -> tuple[Float[Tensor, " estimate"] | None, Float[Tensor, " estimate"] | None]:
    """The share of the loss that the dictionary, and that the mean, recovers; None where there are
    no losses, or zeros cost nothing that could be told from none.
    """
    if losses is None:
        return None, None
    kept = _kept(len(losses["model"]))
    model, made, zero, mean = (
        kept @ losses[name] for name in ("model", "dictionary", "zero", "mean")
    )
    predictions = kept @ losses["predictions"]
    cost = (zero - model) / predictions
    if not cost[0] > max(_LEAST_LOSS, _SIGMAS * float(jackknife_stderr(cost[1:]))):
        return None, None
    return (zero - made) / (zero - model), (zero - mean) / (zero - model)
