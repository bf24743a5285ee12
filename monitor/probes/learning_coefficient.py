"""The local learning coefficient: how degenerate the loss is around the weights as they are.

λ̂ = nβ (E L(w) − L(w₀)), with w drawn around the weights w₀ from the density
∝ exp(−nβ L(w) − γ/2 ‖w − w₀‖²) by stochastic gradient Langevin dynamics (Lau et al. 2023), and
β = 1/log n (Watanabe 2013). In a bowl every direction of curvature h adds ½ nβh/(nβh + γ): a half
where it is steep, and nothing where it is flat. So λ̂ counts halves of the directions that matter,
as a model without any degeneracy, whose λ is d/2, has d of them; where the loss rises slower than
any bowl (w⁴, w₁²w₂⁴) a direction adds less than a half.

L is the mean loss on the held-out text, and n the number of tokens predicted in it, which is the
same at all measurements. With the number of training tokens for n, which the text is a small part
of, the walks would fit that part. γ follows the weights: by itself it lets each wander by a tenth
of their root mean square. ε is a tenth of what is stable in the steepest direction.

Its null is the bowl whose Hessian has the same trace (Hutchinson's estimate, from differences of
gradients), and the same curvature in all directions: no bowl of that trace has a larger λ̂, but
for the tenth that steps may add. What is below it has its curvature in few directions, or is no
bowl.

Walks cost what training does: four of 160 steps on a fourth of the text each, and a few more
gradients, are 185 passes over it forward and backward; two more the first time, and between 153 and
238 where a fourth of its sequences (three or more) is no whole number. They hold seven copies of
the weights in float32, and what such a pass does. So they are made where enough time was saved up.

What fools it: γ and n decide which directions matter; where w₀ is no minimum of the loss on this
text (early in training, or where it is not what the model was trained on) it is too small, or
negative; walks of 160 steps do not leave a place that takes longer to leave, whatever R̂ says.

Shapes: `chain` walks of `draw` draws each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from monitor.estimate import jackknife_stderr, pooled_mean
from monitor.evidence import Evidence, unseen
from monitor.record import Field, ProbeSpec
from monitor.walks import Options, effective_draws, split_rhat

# Chains are taken to tell of different places beyond this (Gelman & Rubin 1992).
_MIXED = 1.1

WALKS = Options()
"""How the walks are made."""

SPEC = ProbeSpec(
    name="learning_coefficient",
    help="The local learning coefficient of the loss on held-out text, by random walks around the "
    "weights, where time was saved up for them (optional: name it to have it measured).",
    source="Lau et al. 2023, Quantifying Degeneracy in Singular Models; R̂: Vehtari et al. 2021",
    dims=(),
    fields=(
        Field(
            name="estimate",
            help="λ̂: nβ times how much higher the loss is around the weights than at them. Its "
            "error is that of the walks, not of the text. Missing where it cannot be interpreted.",
            null="that of a bowl of the same trace, with the same curvature in all directions",
            null_sd=True,
            fooled_by="What localisation hides adds nothing; weights that are no minimum of the "
            "loss on this text make it too small, steps of finite size up to a tenth too large.",
        ),
        Field(
            name="rhat",
            help="Split R̂ of the loss along the walks, after ranks: above 1.1 they have not mixed.",
            low=0,
            null="1: all walks are in one place",
            fooled_by="Walks that all begin here can agree on what they have not yet left.",
        ),
        Field(
            name="effective_draws",
            help="How many independent draws would say as much as those of all walks.",
            low=0,
            null="the number of draws: none is like the one before",
            fooled_by="What changes slower than a walk lasts is not seen.",
        ),
        Field(
            name="drift",
            help="λ̂ of the second half of the draws minus that of the first.",
            null="0: the walks are where they stay",
            fooled_by="A drift that is slower than a walk lasts is small.",
        ),
        Field(
            name="distance",
            help="Root mean square distance of the draws from the weights.",
            low=0,
            null="that of localisation alone, in a flat loss",
            fooled_by="Nearly all directions are nearly flat: it is near its null where all is "
            "well, and far above it where walks go downhill.",
        ),
        Field(
            name="diverged",
            help="Share of the walks that were not finite, or twice as far as in a flat loss.",
            low=0,
            high=1,
            null="0",
            fooled_by="A loss that falls without end looks the same as steps that are too large.",
        ),
        Field(
            name="loss",
            help="Mean loss on the text at the weights as they are.",
            unit="nats",
            low=0,
            null="log(vocabulary): the uniform guess",
            fooled_by="Text that the model was trained on.",
        ),
    ),
    needs=(("text", "losses"),),
    interventions=True,
)


def compute(evidence: Evidence) -> dict[str, Any]:
    """One row, from the walks around the weights."""
    sampled = evidence.sampled
    if isinstance(sampled, str):
        return unseen(SPEC, sampled)
    setting, losses = sampled.setting, sampled.setting.losses
    rises = torch.stack([chain.rise for chain in sampled.chains])
    squares = torch.stack([chain.distance.square() for chain in sampled.chains])
    flat = math.sqrt(setting.weights / setting.localisation) if setting.localisation else None
    gone = torch.tensor([chain.diverged(setting) for chain in sampled.chains]).double()
    rhat, effective = _over(split_rhat, rises), _over(effective_draws, rises)
    validity = _validity(rises, rhat[0], gone)
    estimate = {
        "estimate": rises.mean().item(),
        "estimate_stderr": _stderr(rises, effective[0]),
        "estimate_null": setting.null,
        "estimate_null_sd": setting.null_sd,
    }
    if validity != "ok":
        estimate = dict.fromkeys(estimate)
    half = rises.shape[1] // 2
    row = {
        **estimate,
        **_columns("rhat", *rhat, 1.0),
        **_columns("effective_draws", *effective, float(rises.numel())),
        **_mean("drift", rises[:, -half:].mean(1) - rises[:, :half].mean(1), 0.0),
        **_columns("distance", *_over(lambda some: some.mean().sqrt().item(), squares), flat),
        **_mean("diverged", gone, 0.0),
        **_mean("loss", losses, math.log(evidence.observations["text"].vocab_size)),
        "n": len(losses),
        "validity": validity,
    }
    return {column: [value] for column, value in row.items()}


def _validity(rises: Float[Tensor, "chain draw"], rhat: float | None, gone: Tensor) -> str:
    if gone.any():
        return f"{int(gone.sum())} of {len(gone)} walks diverged"
    if rises.mean() < 0:
        return "negative: the weights are no minimum of the loss on this text"
    if rhat is None or rhat > _MIXED:
        return f"not mixed: R̂ is above {_MIXED}"
    return "ok"


def _stderr(rises: Float[Tensor, "chain draw"], effective: float | None) -> float | None:
    """What autocorrelation within chains leaves, or what chains differ by, if that is more."""
    if effective is None:
        return None
    between = (rises.mean(1).var() / len(rises)).sqrt().item() if len(rises) > 1 else 0.0
    return max(between, (rises.var() / effective).sqrt().item())


def _over(
    number: Callable[[Tensor], float], draws: Float[Tensor, "chain draw"]
) -> tuple[float | None, float | None]:
    """A number of all chains, and its standard error over them; None where it is not finite."""
    kept = [torch.arange(len(draws)) != out for out in range(len(draws))]
    left = torch.tensor([number(draws[some]) for some in kept if some.any()], dtype=torch.float64)
    error = jackknife_stderr(left).item() if len(left) else math.nan
    return _finite(number(draws)), _finite(error)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mean(name: str, values: Float[Tensor, " independent"], null: float) -> dict[str, Any]:
    """The columns of a mean."""
    mean, error = pooled_mean(values, torch.ones(len(values)))
    return _columns(name, _finite(mean.item()), _finite(error.item()), null)


def _columns(
    name: str, value: float | None, stderr: float | None, null: float | None
) -> dict[str, Any]:
    return {name: value, f"{name}_stderr": stderr, f"{name}_null": null}
