"""Sums of the neurons of one layer, and of random directions of their space, and what these tell.

Random directions, of neurons in their own standard deviations (those of the first chunk), have the
information that the neurons have, and no privileged axes: what neurons show and they do not is owed
to the neurons.

Shapes: `token` some of a chunk; `unit` the neurons, then the `direction`s; `group` sequences that
are left out together; `subset` all groups, then all but each; `side` 0 where a token has the
concept, 1 where not; `set` the concepts' own labels, then permuted ones; `permutation` these alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from monitor.estimate import jackknife_stderr

GROUPS = 8
PERMUTATIONS = 8
DIRECTIONS = 64

# A unit is selective for a concept where the means of the two sides are at least so many standard
# deviations apart, and further than those of this share of the layer's neurons are where labels
# are permuted.
APART = 0.5
BEYOND_CHANCE = 0.99

# Dead: never larger than this share of the layer's typical activation, in either direction.
DEAD = 0.01

# Below this share of its mean a standard deviation is what rounding leaves.
_ROUNDING = 1e-6

# So many tokens of all units are held in float32 at a time.
_ROWS = 1024


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grouped:
    """The tokens of one group in a chunk: where they are, and which of them count on which side."""

    group: int
    place: Int[Tensor, " token"]
    sides: Float[Tensor, "set side concept token"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokens:
    """How many tokens were seen of each group, and how many counted on each side; of permuted
    labels in all groups together. `enough` says of which concepts they are enough.
    """

    seen: Float[Tensor, " group"]
    sides: Float[Tensor, "group side concept"]
    permuted: Float[Tensor, "permutation side concept"]
    enough: Bool[Tensor, " concept"]

    def to(self, device: torch.device) -> Tokens:
        """The same on a device."""
        return Tokens(
            seen=self.seen.to(device),
            sides=self.sides.to(device),
            permuted=self.permuted.to(device),
            enough=self.enough.to(device),
        )


class Told(NamedTuple):
    """A number of a layer, its standard error, and what it would be without structure; NaN where
    there is none.
    """

    value: float
    stderr: float
    null: float


def random_directions(neurons: int, *, seed: int = 0) -> Float[Tensor, "neuron direction"]:
    """Orthonormal directions of the neurons' space, as many as there can be up to `DIRECTIONS`."""
    random = torch.Generator().manual_seed(seed)
    drawn = torch.randn(neurons, min(neurons, DIRECTIONS), generator=random)
    directions: Tensor = torch.linalg.qr(drawn).Q
    return directions


class UnitSums:
    """Adds up the units of one layer, in standard deviations about their means in the first chunk:
    then a mean that is large beside the variance costs no digits, nor do fourth powers.
    """

    def __init__(
        self,
        first: Float[Tensor, "token neuron"],
        directions: Float[Tensor, "neuron direction"],
        *,
        groups: int,
        concepts: int,
    ) -> None:
        device = first.device
        self.neurons = first.shape[1]
        first = first.float()
        self.shift = first.mean(0)
        self.scale = _scale(first - self.shift, self.shift)
        # Of neurons on one scale: else the largest would be most of every direction.
        turned = (first - self.shift) / self.scale @ directions
        self._turn = directions / _scale(turned, torch.zeros_like(turned[0]))
        units = self.neurons + directions.shape[1]
        zeros = first.new_zeros
        exact = torch.float32 if device.type == "mps" else torch.float64
        self.powers = zeros(groups, 4, units, dtype=exact)
        self.low = torch.full((groups, self.neurons), torch.inf, device=device)
        self.high = torch.full((groups, self.neurons), -torch.inf, device=device)
        self.sums = zeros(groups, 2, concepts, units)
        self.squares = zeros(groups, concepts, units)
        self.permuted = zeros(PERMUTATIONS, 2, concepts, units)

    def add(self, rows: Float[Tensor, "token neuron"], groups: list[Grouped]) -> None:
        """Takes the neurons of some tokens."""
        for its in groups:
            pieces = zip(its.place.split(_ROWS), its.sides.split(_ROWS, dim=-1), strict=True)
            for place, sides in pieces:
                self._add(rows[place], its.group, sides)

    def _add(
        self,
        rows: Float[Tensor, "token neuron"],
        group: int,
        sides: Float[Tensor, "set side concept token"],
    ) -> None:
        low, high = rows.aminmax(dim=0)
        self.low[group] = torch.minimum(self.low[group], low.float())
        self.high[group] = torch.maximum(self.high[group], high.float())
        moved = rows.new_empty(len(rows), self.powers.shape[-1], dtype=torch.float32)
        neurons = moved[:, : self.neurons]
        torch.sub(rows, self.shift, out=neurons).div_(self.scale)
        moved[:, self.neurons :] = neurons @ self._turn
        sums = (sides.flatten(0, 2) @ moved).unflatten(0, sides.shape[:3])
        self.sums[group] += sums[0]
        self.permuted += sums[1:]
        self.powers[group, 0] += moved.sum(0)
        square = moved.square()
        self.powers[group, 1] += square.sum(0)
        self.squares[group] += sides[0].sum(0) @ square
        self.powers[group, 2] += moved.mul_(square).sum(0)
        self.powers[group, 3] += square.square_().sum(0)

    def summed(self, tokens: Tokens) -> Summary:
        """What the sums tell, of all groups and as each is left out."""
        return Summary(self, tokens)


class Summary:
    """What the sums of a layer tell."""

    def __init__(self, sums: UnitSums, tokens: Tokens) -> None:
        neurons = self._neurons = sums.neurons
        self.finite = bool(sums.powers.isfinite().all())
        self._concepts = int(tokens.enough.sum())
        self._several = int((tokens.seen > 0).sum()) > 1
        powers = _left_out(sums.powers)
        seen = _left_out(tokens.seen.to(powers))[:, None]
        mean, raw = powers[:, 0] / seen, powers.movedim(1, 0) / seen
        variance = raw[1] - mean.square()
        fourth = raw[3] - 4 * mean * raw[2] + 6 * mean.square() * raw[1] - 3 * mean**4
        own_mean = sums.shift + sums.scale * mean[:, :neurons]
        own_sd = sums.scale * variance[:, :neurons].clamp(min=0).sqrt()
        varies = variance > torch.finfo(variance.dtype).eps ** 0.5 * raw[1]
        varies[:, :neurons] &= own_sd > _ROUNDING * own_mean.abs()
        nan = variance.new_tensor(torch.nan)
        self.kurtosis = torch.where(varies, fourth / variance.square(), nan).float()
        low, high = _lowest(sums.low), -_lowest(-sums.high)
        typical = (own_mean.square() + own_sd.square()).sqrt().mean(1, keepdim=True)
        dead = torch.maximum(low.abs(), high.abs()) <= DEAD * typical
        self.dead_share = torch.where(seen[:, 0] > 0, dead.float().mean(1), torch.nan)
        self._living = torch.cat([~dead, varies[:, neurons:]], dim=1)
        self._never_negative = bool(low[0].min() >= 0)
        self._select(sums, tokens, varies)

    def _select(self, sums: UnitSums, tokens: Tokens, varies: Bool[Tensor, "subset unit"]) -> None:
        neurons = self._neurons
        sides, count = _left_out(sums.sums), _left_out(tokens.sides)[..., None]
        means = sides / count
        total = count.sum(1)
        square = _left_out(sums.squares) / total
        variance = square - (sides.sum(1) / total).square()
        known = (variance > _ROUNDING * square) & varies[:, None] & tokens.enough[:, None]
        deviation = torch.where(known, variance, torch.nan).sqrt()
        # [subset concept unit], and of permuted labels [permutation concept unit].
        self.scores = (means[:, 0] - means[:, 1]) / deviation
        permuted = sums.permuted / tokens.permuted[..., None]
        self.chance = ((permuted[:, 0] - permuted[:, 1]) / deviation[0]).abs()
        # One at a time: torch takes no quantiles of more than 16 million numbers.
        by_chance = torch.stack([_quantile(each[:, :neurons]) for each in self.chance])
        self.threshold = by_chance.nanmean(0).clamp(min=APART)
        self._selective = (self.scores.abs() > self.threshold[:, None]).sum(1)
        # Each permutation by the threshold that the others give.
        others = by_chance.nansum(0) - by_chance.nan_to_num()
        number = ((~by_chance.isnan()).sum(0) - (~by_chance.isnan()).int()).clamp(min=1)
        self._by_chance = (self.chance > (others / number).clamp(min=APART)[..., None]).sum(1)
        self.middle = sums.shift + sums.scale * means[0].mean(0)[:, :neurons]
        self.deviation = sums.scale * deviation[0, :, :neurons]
        shift, scale = sums.shift, sums.scale
        own = shift + scale * means[:, 0, tokens.enough, :neurons]
        other = shift + scale * permuted[:, 0, tokens.enough, :neurons]
        self._class_means, self._permuted_means = own.clamp(min=0), other.clamp(min=0)

    def estimates(self) -> dict[str, Told]:
        """The numbers of the layer."""
        of, directions = slice(self._neurons), slice(self._neurons, None)
        living, held = self._living[:, of], self._living[:, directions]
        kurtosis = _median(self.kurtosis[:, of], living)
        told = {
            "dead_share": _told(self.dead_share, torch.zeros(())),
            "kurtosis": _told(kurtosis, _median(self.kurtosis[:1, directions], held[:1])[0]),
        }
        nothing = Told(torch.nan, torch.nan, torch.nan)
        told |= dict.fromkeys(LABELLED, nothing)
        if self._concepts:
            told |= self._labelled(living, held)
        # What was seen in one group alone has no error, though it has a share of neurons.
        return told if self._several else {n: t._replace(stderr=torch.nan) for n, t in told.items()}

    def _labelled(self, living: Tensor, held: Tensor) -> dict[str, Told]:
        of, directions = slice(self._neurons), slice(self._neurons, None)
        told = {}
        for name, units, there in (
            ("concepts_per_neuron", of, living),
            ("concepts_per_direction", directions, held),
        ):
            null = _mean(self._by_chance[:, units].float(), there[:1])
            told[name] = _told(_mean(self._selective[:, units].float(), there), null.mean())
        for name, least in (("selective_share", 1), ("polysemantic_share", 2)):
            if least <= self._concepts:
                several = (self._selective >= least).float()
                null = _mean(several[:1, directions], held[:1])[0]
                told[name] = _told(_mean(several[:, of], living), null)
        if self._concepts > 1 and self._never_negative:
            null = _class_selectivity(self._permuted_means).mean()
            told["class_selectivity"] = _told(_class_selectivity(self._class_means), null)
        return told

    def of_neurons(self, scores: Float[Tensor, "*subset concept unit"]) -> Tensor:
        """Scores of the neurons that are alive, without their signs; 0 where there are none."""
        own = scores[..., : self._neurons].abs().nan_to_num(nan=0.0)
        return own * self._living[0, : self._neurons]

    @property
    def directions_kurtosis(self) -> float:
        """The median over random directions."""
        units = slice(self._neurons, None)
        return float(_median(self.kurtosis[:1, units], self._living[:1, units])[0])


LABELLED = (
    "concepts_per_neuron",
    "concepts_per_direction",
    "selective_share",
    "polysemantic_share",
    "class_selectivity",
)


def _scale(moved: Tensor, mean: Tensor) -> Tensor:
    deviation = moved.square().mean(0).sqrt()
    return torch.where(deviation > _ROUNDING * mean.abs(), deviation, 1.0)


def _left_out(sums: Float[Tensor, "group *summed"]) -> Float[Tensor, "subset *summed"]:
    whole = sums.sum(0, keepdim=True)
    return torch.cat([whole, whole - sums])


def _lowest(low: Float[Tensor, "group neuron"]) -> Float[Tensor, "subset neuron"]:
    others = ~torch.eye(len(low), dtype=torch.bool, device=low.device)
    return torch.stack([low.amin(0), *(low[kept].amin(0) for kept in others)])


def _quantile(scores: Float[Tensor, "concept neuron"]) -> Float[Tensor, " concept"]:
    return scores.nanquantile(BEYOND_CHANCE, dim=1) if len(scores) else scores.new_zeros(0)


def _median(values: Tensor, there: Tensor) -> Tensor:
    return torch.where(there, values, torch.nan).nanquantile(0.5, dim=1)


def _mean(values: Tensor, there: Tensor) -> Tensor:
    return (values * there).sum(1) / there.sum(1)


def _told(subsets: Float[Tensor, " subset"], null: Float[Tensor, ""]) -> Told:
    return Told(float(subsets[0]), float(jackknife_stderr(subsets[1:])), float(null))


def _class_selectivity(means: Float[Tensor, "many concept neuron"]) -> Float[Tensor, " many"]:
    """Mean over neurons of (μmax − μ-max) / (μmax + μ-max); what is 0 throughout has none."""
    top = means.amax(1)
    rest = (means.sum(1) - top) / (means.shape[1] - 1)
    return ((top - rest) / (top + rest)).nanmean(1)
