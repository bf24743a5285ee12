"""The logit lens: what the model would predict if it stopped after a block.

The residual stream after block l goes through the final norm and the unembedding as if no block
came after (nostalgebraist 2020, "interpreting GPT: the logit lens"), at a sample of predictions:
the loss of the actual next token, how often its likeliest token is the final layer's, and how far
the final prediction diverges from its own, KL(final ‖ layer) = Σ p_final log(p_final / p_layer), in
nats. At the last layer these are the model's own loss, 1 and 0.

What fools it: early layers need not hold their predictions in the basis of the last one, so that
the lens can read nothing where a probe trained for it reads much (Belrose et al. 2023, "Eliciting
Latent Predictions from Transformers with the Tuned Lens").
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from monitor.estimate import pooled_mean
from monitor.evidence import Evidence, unseen
from monitor.record import STREAM_LAYER, Field, ProbeSpec

_BRITTLE = "Early layers may hold in another basis what the lens cannot read (Belrose et al. 2023)."

SPEC = ProbeSpec(
    name="logit_lens",
    help="What final norm and unembedding make of the residual stream after every block, at 8 "
    "positions a sequence of held-out text (without any, of repeated random tokens).",
    source="nostalgebraist 2020, interpreting GPT: the logit lens",
    dims=(STREAM_LAYER,),
    fields=(
        Field(
            name="loss",
            help="Mean loss of the next token.",
            unit="nats",
            low=0,
            null="the loss of the tokens that come next elsewhere in the sequence",
            fooled_by=_BRITTLE,
        ),
        Field(
            name="agreement",
            help="Share of predictions whose likeliest token is the final layer's.",
            low=0,
            high=1,
            null="agreement with the final layer's predictions elsewhere in the sequence",
            fooled_by=_BRITTLE + " A few frequent tokens agree by themselves.",
        ),
        Field(
            name="kl",
            help="Mean divergence of the final prediction from this layer's, KL(final ‖ layer).",
            unit="nats",
            low=0,
            null="divergence of the final layer's predictions elsewhere in the sequence",
            fooled_by=_BRITTLE,
        ),
    ),
    # On the first of these that there is.
    needs=(("text", "lens"), ("repeated", "lens")),
)


def compute(evidence: Evidence) -> dict[str, Any]:
    """One row for what enters the first block, and one a block; from the lens on `text` or, where
    there is none, on `repeated`.
    """
    observations = evidence.observations
    observation = observations["text" if "text" in observations else "repeated"]
    lens = observation.lens
    if lens is None:
        return unseen(SPEC, observation.reasons.get("lens", "it was not observed"))
    count = torch.full((lens.loss.shape[1],), lens.predictions)
    layers = len(lens.loss)
    return {
        "layer": list(range(-1, layers - 1)),
        **_estimates("loss", lens.loss, lens.loss_chance, count),
        **_estimates("agreement", lens.agreement, lens.agreement_chance, count),
        **_estimates("kl", lens.kl, lens.kl_chance, count),
        "n": [len(count)] * layers,
        "validity": ["ok"] * layers,
    }


def _estimates(
    field: str,
    total: Float[Tensor, "layer batch"],
    chance: Float[Tensor, "layer batch"],
    count: Tensor,
) -> dict[str, Float[Tensor, " layer"]]:
    mean, stderr = pooled_mean(total.T, count)
    null, _ = pooled_mean(chance.T, count)
    return {field: mean, f"{field}_stderr": stderr, f"{field}_null": null}
