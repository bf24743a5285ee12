"""Directions along which concepts lie in the residual stream.

Shapes: `layer` what enters the first block and then what each returns; `concept` what tokens are
labelled with; `method` how a direction was found; `half` of the sequences to fit on; `task` the
concept and its control task, `target` the concepts and then their control tasks; `side` tokens that
have it and tokens that have it not; `token` those of a chunk.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor

from monitor.features.collecting import NO_CONCEPTS, Chunk
from monitor.features.contexts import Contexts
from monitor.features.fitting import Moments, logistic, mass_means, noise_dimensions
from monitor.features.scores import GROUPS, Counts, Scores
from monitor.features.tasks import control_labels, tokens_counted
from monitor.labels import EVALUATION, FEWEST, FIRST_HALF, SECOND_HALF, Labels
from monitor.parts import Parts, Site
from monitor.stimuli import Stimulus
from monitor.streams import UnseenError

METHODS = ("diff_in_means", "mass_mean", "logistic")

_NO_SEQUENCES = "there are no sequences to fit directions on: pass more text"

# Logistic regression looks at all its tokens again and again, so these are kept; those of a large
# model's layer are 3 MB.
_KEPT = 1024


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Directions:
    """The directions of each concept after each of the `layers` (-1: before the first block), by
    each of `METHODS`, as long as the method makes them: from tokens that have it not to those that
    have it. NaN where there are too few tokens to fit.

    A token is taken to have the concept where its product with the direction is above
    `thresholds`. `halves` were found on one half of the fitted sequences each; `counts` say how
    tokens score along directions in sequences that were not fitted, by concept and by control task
    (None: not kept). `dimensions` is how many the noise of each method is spread over, `tokens` how
    many are labelled, `controlled` whether the control task has enough of them too, and `sources`
    how many of those not fitted on have some. `contexts`, layer by layer, concept by concept and
    method by method, show the tokens furthest along each.
    """

    layers: tuple[int, ...]
    names: tuple[str, ...]
    vectors: Float[Tensor, "layer concept method feature"]
    thresholds: Float[Tensor, "layer concept method"]
    halves: Float[Tensor, "half layer concept method feature"]
    counts: Counts | None  # [layer concept method task group side bin]
    dimensions: Float[Tensor, "layer method"]
    tokens: Int[Tensor, "split concept side"]
    controlled: Bool[Tensor, " concept"]
    sources: Int[Tensor, " concept"]
    contexts: tuple[str, ...] = ()

    @property
    def too_few(self) -> Bool[Tensor, " concept"]:
        """Of which concepts there are too few tokens of a side somewhere to say anything."""
        return (self.tokens < FEWEST).any(2).any(0)

    @property
    def split_half(self) -> Float[Tensor, "layer concept method"]:
        """The cosine of the directions that were found on two halves."""
        first, second = self.halves
        return torch.cosine_similarity(first, second, dim=-1)

    @property
    def reliability(self) -> Float[Tensor, "layer concept method"]:
        """The cosine to expect of directions that are fitted, each, on so many other tokens, from
        that of the two halves (Spearman and Brown, 1910).
        """
        half = self.split_half.clamp(min=0)
        return 2 * half / (1 + half)


class DirectionsCollector:
    """Fits directions on two halves of the sequences, and scores the others along them."""

    sites: Collection[Site] = ("residual_before", "residual_after")

    def __init__(self, parts: Parts, stimulus: Stimulus) -> None:
        labels = stimulus.labels
        if labels is None or not labels.names:
            raise UnseenError(NO_CONCEPTS)
        self._labels, self._stimulus = labels, stimulus
        self._targets = torch.cat([labels.values, control_labels(stimulus)]) * labels.used
        self._kept = _spread(labels)
        self._group = labels.place % GROUPS
        self._layers: dict[int, _Layer] = {}
        self._reasons = [block.reasons.get("residual") for block in parts.blocks]

    def see(
        self, site: Site, layer: int, rows: Float[Tensor, "token feature"], chunk: Chunk
    ) -> None:
        """Adds up what is fitted on, and scores the rest."""
        if site == "residual_before" and layer > 0:
            return
        place = self._layers.setdefault(-1 if site == "residual_before" else layer, _Layer())
        labels = chunk.of(self._targets).to(rows.device)
        if chunk.split == EVALUATION:
            place.score(rows, labels, self._group[chunk.row].to(rows.device), chunk)
        else:
            kept = self._kept[chunk.row, chunk.position].to(rows.device)
            place.add(rows, labels, kept, chunk.split)

    def turn(self, split: int) -> None:
        """Fits, once there is something to score."""
        if split == SECOND_HALF:
            for layer in self._layers.values():
                layer.fit()

    def collected(self) -> Directions:
        """What was found in the layers that were seen."""
        if not self._layers:
            raise UnseenError(next(filter(None, self._reasons), _NO_SEQUENCES))
        numbers = sorted(self._layers)
        layers = [self._layers[number] for number in numbers]
        concepts = len(self._labels.names)
        counts = torch.stack([layer.counts() for layer in layers])
        vectors = torch.stack([layer.vectors for layer in layers]).cpu()
        thresholds = torch.stack([layer.thresholds_from_0() for layer in layers]).cpu()
        halves = torch.stack([layer.halves for layer in layers], dim=1).cpu()
        values, split = self._targets[:concepts], self._labels.split
        tokens = tokens_counted(self._targets.unflatten(0, (2, -1)), split)
        return Directions(
            layers=tuple(numbers),
            names=self._labels.names,
            vectors=rearrange(vectors, "l m t f -> l t m f")[:, :concepts],
            thresholds=rearrange(thresholds, "l m t -> l t m")[:, :concepts],
            halves=rearrange(halves, "h l m t f -> h l t m f"),
            counts=rearrange(counts, "l m (k c) g s b -> l c m k g s b", k=2),
            dimensions=torch.stack([layer.dimensions for layer in layers]).cpu(),
            tokens=rearrange(tokens[0], "concept split side -> split concept side"),
            controlled=tokens.amin((0, 2, 3)) >= FEWEST,
            sources=self._labels.sources((values != 0).any(2) & (split == EVALUATION)),
            contexts=tuple(
                words
                for layer in layers
                if layer.contexts is not None
                for words in layer.contexts.words(self._stimulus)
            ),
        )


@dataclass(slots=True, eq=False)
class _Half:
    """What one half of the fitted sequences adds up to in one layer."""

    moments: Moments
    count: Int[Tensor, "target side"]
    sum: Float[Tensor, "target side feature"]
    rows: list[Float[Tensor, "token feature"]] = field(default_factory=list)
    labels: list[Int8[Tensor, "target token"]] = field(default_factory=list)

    def of(self, targets: int) -> _Half:
        """What there is of the first few targets."""
        return _Half(
            moments=self.moments,
            count=self.count[:targets],
            sum=self.sum[:targets],
            rows=self.rows,
            labels=[labels[:targets] for labels in self.labels],
        )


@dataclass(slots=True, eq=False)
class _Layer:
    """One layer's sums, then its directions, [method target feature], then how tokens score. All
    as seen from `origin`, the mean of the first tokens: one that is large beside what tokens differ
    by would cost digits.
    """

    origin: Tensor = field(default_factory=lambda: torch.empty(0))
    sums: dict[int, _Half] = field(default_factory=dict)
    vectors: Tensor = field(default_factory=lambda: torch.empty(0))
    thresholds: Tensor = field(default_factory=lambda: torch.empty(0))
    halves: Tensor = field(default_factory=lambda: torch.empty(0))
    scores: Scores | None = None
    contexts: Contexts | None = None
    dimensions: Tensor = field(default_factory=lambda: torch.empty(0))

    def add(
        self,
        rows: Float[Tensor, "token feature"],
        labels: Int8[Tensor, "target token"],
        kept: Bool[Tensor, " token"],
        half: int,
    ) -> None:
        if not self.sums:
            self.origin = rows.float().mean(0)
        rows = rows.float() - self.origin
        if half not in self.sums:
            shape = (len(labels), 2)
            self.sums[half] = _Half(
                moments=Moments(rows),
                count=labels.new_zeros(shape, dtype=torch.long),
                sum=rows.new_zeros(*shape, rows.shape[1]),
            )
        sums = self.sums[half]
        sums.moments.add(rows)
        for place, side in enumerate((1, -1)):
            has = labels == side
            sums.count[:, place] += has.sum(1)
            sums.sum[:, place] += has.to(rows) @ rows
        if bool(kept.any()):
            sums.rows.append(rows[kept])
            sums.labels.append(labels[:, kept])

    def fit(self) -> None:
        if set(self.sums) != {FIRST_HALF, SECOND_HALF}:
            raise UnseenError(_NO_SEQUENCES)
        first, second = self.sums[FIRST_HALF], self.sums[SECOND_HALF]
        concepts = len(first.count) // 2
        self.halves = torch.stack([_fitted(half.of(concepts))[0] for half in (first, second)])
        whole = _Half(
            moments=first.moments + second.moments,
            count=first.count + second.count,
            sum=first.sum + second.sum,
            rows=first.rows + second.rows,
            labels=first.labels + second.labels,
        )
        self.sums.clear()
        self.vectors, self.thresholds = _fitted(whole)
        covariance = whole.moments.covariance()
        self.dimensions = noise_dimensions(covariance, whole.moments.count)
        flat = self.vectors.flatten(0, 1)
        spread = (flat @ covariance * flat).sum(1).clamp(min=0).sqrt()
        self.scores = Scores(self.thresholds.flatten(), spread)
        self.contexts = Contexts(concepts * len(METHODS), flat.device)

    def score(
        self,
        rows: Float[Tensor, "token feature"],
        labels: Int8[Tensor, "target token"],
        group: Int[Tensor, " token"],
        chunk: Chunk,
    ) -> None:
        if self.scores is None or self.contexts is None:
            return
        along = self.vectors.flatten(0, 1) @ (rows.float() - self.origin).T
        self.scores.add(along, labels.repeat(len(METHODS), 1), group)
        concepts = rearrange(along, "(m k c) t -> t k (c m)", m=len(METHODS), k=2)[:, 0]
        self.contexts.add(concepts, chunk)

    def thresholds_from_0(self) -> Float[Tensor, "method target"]:
        """The thresholds of products with the stream as it is."""
        if self.scores is None:
            raise UnseenError(_NO_SEQUENCES)
        return self.thresholds + self.vectors @ self.origin

    def counts(self) -> Counts:
        if self.scores is None:
            raise UnseenError(_NO_SEQUENCES)
        return torch.unflatten(self.scores.counts, 0, self.vectors.shape[:2])


def _fitted(
    half: _Half,
) -> tuple[Float[Tensor, "method target feature"], Float[Tensor, "method target"]]:
    means = half.sum / half.count[:, :, None]
    differences, midpoints = means[:, 0] - means[:, 1], means.mean(1)
    # No mean of nothing enters what is computed for all targets together.
    missing = (half.count == 0).any(1)
    covariance = half.moments.covariance()
    whitened = mass_means(differences.nan_to_num(), covariance, half.moments.count)
    weights, intercepts = torch.zeros_like(differences), torch.zeros_like(differences[:, 0])
    if half.rows:
        weights, intercepts = logistic(torch.cat(half.rows), torch.cat(half.labels, dim=1))
    vectors = torch.stack([differences, whitened, weights])
    along = torch.einsum("mtf,tf->mt", vectors[:2], midpoints)
    thresholds = torch.cat([along, -intercepts[None]])
    vectors[:, missing], thresholds[:, missing] = float("nan"), float("nan")
    return vectors, thresholds


def _spread(labels: Labels) -> Bool[Tensor, "batch position"]:
    """At most `_KEPT` labelled tokens to fit on, half of them in each half: as many of each side of
    each concept as there can be, so that none is crowded out by one that is more frequent.
    """
    random = np.random.default_rng(0)
    sides = [values == side for values in labels.values for side in (1, -1)]
    kept = torch.zeros_like(labels.used)
    for half in (FIRST_HALF, SECOND_HALF):
        places = ((labels.split == half)[:, None] & labels.used).nonzero()
        turn = np.full(len(places), np.inf)
        for side in sides:
            of_side = side[places[:, 0], places[:, 1]].numpy().nonzero()[0]
            turn[of_side] = np.minimum(turn[of_side], random.permutation(len(of_side)))
        first = turn.argsort(kind="stable")[: min(_KEPT // 2, np.isfinite(turn).sum())]
        row, position = places[torch.from_numpy(first)].unbind(1)
        kept[row, position] = True
    return kept
