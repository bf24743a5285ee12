"""Random walks around weights w₀ in which a loss is at home: stochastic gradient Langevin dynamics.

A walk draws from the density ∝ exp(−nβ L(w) − γ/2 ‖w − w₀‖²) (Lau et al. 2023), with β = 1/log n
(Watanabe 2013), by steps of −ε/2 (nβ ∇L(w) + γ (w − w₀)) and noise of variance ε, each with the
gradient on a few items drawn anew. No step is rejected, so that ε must be small: where L is a bowl
of curvatures h, and a = nβh + γ, what is estimated is

    nβ (E L(w) − L(w₀)) = ½ Σ nβh / [a (1 − εa/4)].

ε is therefore chosen so that εa is at most 0.4 in the steepest direction, where a tenth too much is
estimated then, and nothing at all in flat ones.

Shapes: `weight` all weights in one row; `item` what the loss is a mean over; `draw` steps of a
walk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from monitor.streams import UnseenError

# What a step may do to a bowl's steepest direction: ε times a.
_STEEP = 0.4

# So many products with the Hessian find the steepest direction, and its trace.
_STEEPEST, _TRACE = 8, 4

# Gradients are told apart at points this far from w₀, in the standard deviations that localisation
# leaves: near enough for the Hessian not to change, and far enough for rounding.
_APART = 0.1

# A walk that was on average so many times as far away as localisation would have it has diverged.
_FAR = 2


@runtime_checkable
class Potential(Protocol):
    """A loss L that is the mean over `items`, which hold `size` data points in all."""

    @property
    def start(self) -> Float[Tensor, " weight"]:
        """The weights w₀; not to be written to."""

    @property
    def items(self) -> int:
        """How many there are."""

    @property
    def size(self) -> int:
        """The number of data points n."""

    def gradient(
        self, weights: Float[Tensor, " weight"], items: Int[Tensor, " item"]
    ) -> tuple[Float[Tensor, " item"], Float[Tensor, " weight"]]:
        """The loss of each of some items, and the gradient of their mean: the caller changes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How walks are made: so many `chains`, each of `burn_in` steps that do not count and `draws`
    that do, with the gradient on one in `one_in` of the items: what that adds to the noise is 5% of
    it in the steepest direction of a model that predicts as well as can be, and less in others.

    `wander` is the standard deviation that localisation alone leaves a weight, in units of the root
    mean square of all weights, and so says what γ is. `step_size` ε, `localisation` γ and
    `inverse_temperature` nβ take the place of what is worked out otherwise.
    """

    chains: int = 4
    burn_in: int = 80
    draws: int = 80
    one_in: int = 4
    wander: float = 0.1
    step_size: float | None = None
    localisation: float | None = None
    inverse_temperature: float | None = None
    seed: int = 0

    def passes(self, items: int, chains: int) -> float:
        """How many gradients on all items it takes to prepare and to walk so many chains."""
        prepare = 1 + 2 * (_STEEPEST + _TRACE)
        return prepare + chains * (self.burn_in + self.draws) * self.batch(items) / items

    def batch(self, items: int) -> int:
        """How many of the items a step is taken by."""
        return max(1, round(items / self.one_in))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Setting:
    """What the walks around some weights have in common.

    `losses` are those at w₀; `weights` how many there are. `null` is what would be estimated in a
    bowl with the Hessian's trace, alike in all directions, with the standard deviation `null_sd`,
    since the trace is estimated; None where that is not positive.
    """

    step_size: float
    localisation: float
    inverse_temperature: float
    losses: Float[Tensor, " item"]
    weights: int
    null: float | None
    null_sd: float | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chain:
    """One walk: at each draw nβ times what the loss rose since w₀, and how far from it that is.

    Both are NaN from where numbers were not finite any more.
    """

    rise: Float[Tensor, " draw"]
    distance: Float[Tensor, " draw"]

    def diverged(self, setting: Setting) -> bool:
        """Whether it went where nothing holds it."""
        if not self.rise.isfinite().all():
            return True
        far = _FAR**2 * setting.weights
        return bool(self.distance.square().mean() * setting.localisation > far)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sampled:
    """All walks of one measurement."""

    setting: Setting
    chains: tuple[Chain, ...]


def prepared(potential: Potential, options: Options) -> Setting:
    """What walks around the weights as they are have in common.

    Raises `UnseenError` where the loss is not finite, or there is nothing to take steps by.
    """
    start = potential.start
    everything = torch.arange(potential.items)
    losses, slope = potential.gradient(start, everything)
    if not (losses.isfinite().all() and slope.isfinite().all()):
        raise UnseenError("the loss or its gradient is not finite")
    hot = options.inverse_temperature
    hot = potential.size / math.log(potential.size) if hot is None else hot
    localisation = options.localisation
    if localisation is None:
        rms = float(start.square().mean().sqrt())
        if not rms:
            raise UnseenError("all weights are zero: there is no scale to take steps by")
        localisation = (options.wander * rms) ** -2

    random = torch.Generator().manual_seed(options.seed)
    apart = _APART / math.sqrt(localisation or 1)

    def hessian_times(direction: Float[Tensor, " weight"], length: float) -> Tensor:
        there, back = (
            potential.gradient(start.add(direction, alpha=to), everything)[1]
            for to in (length, -length)
        )
        return there.sub_(back).div_(2 * length)

    steepest = 0.0
    if options.step_size is None:
        # The gradient lies along steep directions; the noise sees to it that it is not 0.
        direction = slope + 1e-3 * (slope.norm() + 1e-6) * _signs(start, random) / len(start) ** 0.5
        for _ in range(_STEEPEST):
            direction.div_(direction.norm())
            direction = hessian_times(direction, apart)
            steepest = float(direction.norm())
            if not steepest:
                break
    step_size, a = options.step_size, hot * steepest + localisation
    if step_size is None and not (math.isfinite(a) and a > 0):
        raise UnseenError(f"steps cannot be chosen: the curvature found is {steepest:g}")
    step_size = _STEEP / a if step_size is None else step_size

    # All weights move at once here: each by less.
    traces = [
        float((signs * hessian_times(signs, _APART * apart)).sum(dtype=torch.float64))
        for signs in (_signs(start, random) for _ in range(_TRACE))
    ]
    nulls = [_of_bowl(t / len(start), len(start), hot, localisation, step_size) for t in traces]
    mean = sum(traces) / len(traces)
    null = _of_bowl(mean / len(start), len(start), hot, localisation, step_size)
    spread = float(torch.tensor(nulls, dtype=torch.float64).std()) / math.sqrt(len(nulls))
    known = mean > 0 and math.isfinite(null) and math.isfinite(spread)
    return Setting(
        step_size=step_size,
        localisation=localisation,
        inverse_temperature=hot,
        losses=losses.double().cpu(),
        weights=len(start),
        null=null if known else None,
        null_sd=spread if known else None,
    )


def walked(potential: Potential, setting: Setting, options: Options, number: int) -> Chain:
    """Walk `number` from the weights; the same whoever makes it.

    The rise is that on the items of a step, beside the loss of the same items at w₀: what makes
    some items harder than others cancels.
    """
    start = potential.start
    drawing = torch.Generator().manual_seed(2 * (options.seed + number) + 1)
    noise = torch.Generator(start.device).manual_seed(2 * (options.seed + number))
    weights, step, hot = start.clone(), setting.step_size, setting.inverse_temperature
    total = options.burn_in + options.draws
    rise = torch.full((total,), torch.nan, dtype=torch.float64)
    distance = rise.clone()
    for at in range(total):
        some = torch.randperm(potential.items, generator=drawing)[: options.batch(potential.items)]
        losses, slope = potential.gradient(weights, some)
        away = weights - start
        rise[at] = hot * (losses.double().cpu() - setting.losses[some]).mean()
        distance[at] = away.norm().double()
        if not rise[at].isfinite():
            break
        slope.mul_(hot).add_(away, alpha=setting.localisation)
        weights.add_(slope, alpha=-step / 2)
        weights.add_(away.normal_(generator=noise), alpha=math.sqrt(step))
    return Chain(rise=rise[options.burn_in :], distance=distance[options.burn_in :])


def _of_bowl(
    curvature: float, weights: int, hot: float, localisation: float, step_size: float
) -> float:
    """What is estimated where all of so many directions have the same curvature."""
    a = hot * curvature + localisation
    if not 0 < step_size * a < 4:
        return math.nan
    return weights * hot * curvature / (2 * a * (1 - step_size * a / 4))


def _signs(like: Float[Tensor, " weight"], random: torch.Generator) -> Float[Tensor, " weight"]:
    """Entries of 1 and -1: products with them give the trace with the least variance."""
    signs = torch.randint(2, (len(like),), generator=random, dtype=torch.int8)
    return (2 * signs - 1).to(like)
