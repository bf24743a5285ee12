"""Dictionaries of a model's residual stream and of its untrained twins', trained further at each
measurement and told of on sequences that they were not trained on.

Sparse autoencoders need the same activations over and over, so this takes passes of its own: one
over the sequences to fit on, and four over those for evaluation: as the model is, with what the
dictionary makes of the stream in its place, with zeros and with the mean. Of a twin, which has no
loss to recover, the activations are enough.
No more than a fixed number of activations is held, and only while a dictionary is trained.

Shapes: `batch` sequences for evaluation; `token` those of some sequences that are looked at;
`feature` of the stream; `latent` of the dictionary; `position` token ids of a sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from monitor.dictionary.sae import SparseAutoencoder, Training, train
from monitor.dictionary.twin import shuffled
from monitor.labels import EVALUATION, Labels
from monitor.parts import Parts, Site, watch
from monitor.stimuli import Stimulus
from monitor.streams import UnseenError
from monitor.untouched import exact

# So many tokens go through the model at a time, or one sequence.
_TOKENS = 4096

# Logits of this size are held at a time.
_LOGIT_BYTES = 32 * 2**20

# Fewer sequences have no standard error, and fewer tokens make no dictionary.
_FEWEST_SEQUENCES, _FEWEST_TOKENS = 2, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Which `layers` have a dictionary (None: the one in the middle), of at most how many `tokens`
    it is made, beside that of how many `twins`, and how it is trained.
    """

    layers: tuple[int, ...] | None = None
    tokens: int = 16_384
    twins: int = 3
    training: Training = field(default_factory=Training)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Learned:
    """What one measurement leaves to the next: a dictionary, and which latents fired at all."""

    sae: SparseAutoencoder
    fired: Bool[Tensor, " latent"]


Dictionaries = Mapping[tuple[int, int], Learned]
"""By whose it is, the model's (0) or a twin's (1 and on), and by layer."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evaluated:
    """What a dictionary made of the sequences for evaluation, summed over their `tokens`.

    `squares` and `sums` are those of rows from a fixed point, `residual` of what the dictionary
    missed; `fires` counts the tokens on which a latent did. `losses` are summed over so many
    `predictions`: of the `model`, and with the `dictionary`, `zero` or the `mean` of the rows to
    fit on in the place of the stream; None of a twin, and where the logits are not known. `cosine`
    and `fired` say how near a latent is to where it was at the previous measurement, and whether it
    fired then; None at the first.
    """

    tokens: Int[Tensor, " batch"]
    squares: Float[Tensor, " batch"]
    sums: Float[Tensor, "batch feature"]
    residual: Float[Tensor, " batch"]
    fires: Int[Tensor, "batch latent"]
    losses: Mapping[str, Float[Tensor, " batch"]] | None
    steps: int
    cosine: Float[Tensor, " latent"] | None
    fired: Bool[Tensor, " latent"] | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerDictionary:
    """A layer's dictionary, on the model and on its untrained twins."""

    layer: int
    model: Evaluated
    twins: tuple[Evaluated, ...]


def observe_dictionaries(
    parts: Parts,
    stimulus: Stimulus,
    earlier: Dictionaries,
    options: Options | None = None,
) -> tuple[tuple[LayerDictionary, ...], Dictionaries]:
    """Trains dictionaries on from `earlier` ones, and says what they make of the model; returns
    them too. The clock is the model's: those of twins have as many steps, from other beginnings.

    Raises `UnseenError` where there is no stream, no twin or nothing to train on, and `ValueError`
    for layers that the model lacks.
    """
    options = options or Options()
    labels = stimulus.labels
    if labels is None:
        raise ValueError(f"stimulus {stimulus.name!r}: expected one with labels")
    if not parts.blocks:
        raise UnseenError(f"blocks: {parts.reasons.get('blocks', 'not found')}")
    if (found := len(_to_evaluate(labels))) < _FEWEST_SEQUENCES:
        raise UnseenError(f"{found} sequences to evaluate on: at least {_FEWEST_SEQUENCES} needed")
    layers = options.layers
    layers = ((len(parts.blocks) - 1) // 2,) if layers is None else layers
    if absent := set(layers) - set(range(len(parts.blocks))):
        raise ValueError(f"layers={sorted(absent)}: the model has {len(parts.blocks)} blocks")
    told, kept = [], dict(earlier)
    for layer in layers:
        place = _Place(parts=parts, stimulus=stimulus, labels=labels, layer=layer)
        twin_place = dataclasses.replace(place, predict=False)
        training = options.training
        model, kept[0, layer] = place.learned(earlier.get((0, layer)), options.tokens, training)
        twins = []
        for twin in range(1, options.twins + 1):
            # As long a training, however much time it takes.
            as_long = dataclasses.replace(training, seconds=None, seed=training.seed + twin)
            before = earlier.get((twin, layer))
            with shuffled(parts.model.module, twin):
                told_twin, kept[twin, layer] = twin_place.learned(
                    before, options.tokens, as_long, model.steps
                )
            twins.append(told_twin)
        told.append(LayerDictionary(layer=layer, model=model, twins=tuple(twins)))
    return tuple(told), kept


def _to_evaluate(labels: Labels) -> Int[Tensor, " sequence"]:
    """The sequences for evaluation in which there is something to look at."""
    return ((labels.split == EVALUATION) & labels.used.any(1)).nonzero().flatten()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Place:
    """The stream after a layer, on a stimulus; with `predict`, and what is predicted from it."""

    parts: Parts
    stimulus: Stimulus
    labels: Labels
    layer: int
    predict: bool = True

    def learned(
        self,
        earlier: Learned | None,
        tokens: int,
        training: Training,
        stop: int | None = None,
    ) -> tuple[Evaluated, Learned]:
        """The dictionary of the model as it is now, and what it makes of it."""
        # What is made in inference mode could not be trained on later.
        with (
            torch.inference_mode(mode=False),
            torch.no_grad(),
            exact(self.parts.model.device.type),
        ):
            rows = self._rows(tokens)
            mean = rows.mean(0)
            start = None if earlier is None else earlier.sae
            sae, steps = train(rows, training, start=start, stop=stop)
            del rows
            if not sae.decoder.isfinite().all():
                raise UnseenError("the training of the dictionary diverged")
            evaluated = self._evaluated(sae, mean, steps)
            if earlier is not None and earlier.sae.decoder.shape == sae.decoder.shape:
                cosine = (sae.decoder.cpu() * earlier.sae.decoder).sum(1)
                evaluated = dataclasses.replace(evaluated, cosine=cosine, fired=earlier.fired)
            kept = Learned(sae=sae.to(torch.device("cpu")), fired=evaluated.fires.sum(0) > 0)
        return evaluated, kept

    def _rows(self, tokens: int) -> Float[Tensor, "token feature"]:
        """Activations to train on, of sequences drawn at random until there are enough."""
        random = torch.Generator().manual_seed(0)
        fit = (self.labels.split != EVALUATION).nonzero().flatten()
        fit = fit[torch.randperm(len(fit), generator=random)]
        used = self.labels.used[fit].sum(1)
        seen: list[Tensor] = []
        for some in fit[used.cumsum(0) - used < tokens].split(self._at_once):
            _Pass(place=self, rows=some, keep=seen).run()
        found = sum(len(rows) for rows in seen)
        if found < _FEWEST_TOKENS:
            raise UnseenError(f"{found} tokens to train on: at least {_FEWEST_TOKENS} needed")
        rows = torch.cat(seen)[:tokens]
        if not rows.isfinite().all():
            raise UnseenError("the residual stream is not finite")
        return rows

    @property
    def _at_once(self) -> int:
        return max(1, _TOKENS // self.stimulus.tokens.shape[1])

    def _evaluated(
        self, sae: SparseAutoencoder, mean: Float[Tensor, " feature"], steps: int
    ) -> Evaluated:
        sequences = _to_evaluate(self.labels)
        chunks = [self._chunk(sae, mean, some) for some in sequences.split(self._at_once)]
        sums, losses = zip(*chunks, strict=True)
        predicted = {name: torch.cat([loss[name] for loss in losses]) for name in losses[0]}
        return Evaluated(
            **{name: torch.cat([part[name] for part in sums]) for name in sums[0]},
            losses=predicted or None,
            steps=steps,
            cosine=None,
            fired=None,
        )

    def _chunk(
        self, sae: SparseAutoencoder, mean: Tensor, sequences: Int[Tensor, " sequence"]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The sums of some sequences, and their losses."""
        seen: list[Tensor] = []
        losses = {"model": _Pass(place=self, rows=sequences, keep=seen, predict=self.predict).run()}
        rows = torch.cat(seen)
        codes = sae.encode(rows)
        made = sae.decode(codes)
        at = self.used(sequences)[0]

        def summed(values: Float[Tensor, "token *summed"]) -> Tensor:
            total = values.new_zeros((len(sequences), *values.shape[1:]), dtype=torch.float64)
            # One sequence at a time: the order in which a device adds up is then always the same.
            for row in range(len(sequences)):
                total[row] = values[at == row].sum(0, dtype=torch.float64)
            return total.cpu()

        away = rows - sae.centre
        sums = {
            "tokens": torch.bincount(at.cpu(), minlength=len(sequences)),
            "squares": summed(away.square().sum(1)),
            "sums": summed(away),
            "residual": summed((rows - made).square().sum(1)),
            "fires": summed((codes > 0).float()).long(),
        }
        if losses["model"] is None:
            return sums, {}
        exchanges = {
            "dictionary": made,
            "zero": torch.zeros_like(rows),
            "mean": mean.expand_as(rows),
        }
        for name, other in exchanges.items():
            losses[name] = _Pass(place=self, rows=sequences, exchange=other, predict=True).run()
        losses["predictions"] = self.predicting(sequences).sum(1).double()
        return sums, {name: loss for name, loss in losses.items() if loss is not None}

    def predicting(self, rows: Int[Tensor, " sequence"]) -> Bool[Tensor, "sequence prediction"]:
        """At which positions of some sequences losses are taken."""
        used = self.labels.used[rows]
        return used[:, :-1] & used[:, 1:]

    def used(
        self, rows: Int[Tensor, " sequence"]
    ) -> tuple[Int[Tensor, " token"], Int[Tensor, " token"]]:
        """Where the tokens of some sequences are: in which of these, and at which position."""
        row, position = self.labels.used[rows].nonzero(as_tuple=True)
        device = self.parts.model.device
        return row.to(device), position.to(device)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Pass:
    """One pass over some sequences: the stream at the place is appended to `keep`, and `exchange`
    takes its place where the tokens are looked at. With `predict` it gives losses.
    """

    place: _Place
    rows: Int[Tensor, " sequence"]
    keep: list[Tensor] | None = None
    exchange: Float[Tensor, "token feature"] | None = None
    predict: bool = False

    def run(self) -> Float[Tensor, " sequence"] | None:
        """The losses of each sequence, summed over predictions at tokens that are looked at; None
        where the model's logits are not known, or not asked for.
        """
        place, parts = self.place, self.place.parts
        used = place.used(self.rows)
        predicts = self.predict and "unembedding_input" in parts.taps
        predicts = predicts and parts.unembedding_map is not None
        losses: list[Tensor] = []

        def see(site: Site, _layer: int, tensor: Tensor) -> Tensor | None:
            # What is made of it here is no part of the model, and nobody who follows its functions
            # should take it for one.
            with torch._C.DisableTorchFunction():
                if site == "unembedding_input":
                    losses.append(self._losses(tensor))
                elif self.exchange is not None:
                    exchanged = tensor.clone()
                    exchanged[used] = self.exchange.to(tensor)
                    return exchanged
                elif self.keep is not None:
                    self.keep.append(tensor[used].float())
            return None

        sites: list[Site] = ["residual_after"]
        sites += ["unembedding_input"] if predicts else []
        if len(used[0]) and (predicts or self.keep is not None):
            watch(
                parts, place.stimulus.tokens[self.rows], see, sites=sites, layers=[-1, place.layer]
            )
        return torch.cat(losses) if losses else None

    def _losses(
        self, normed: Float[Tensor, "sequence position feature"]
    ) -> Float[Tensor, " sequence"]:
        """From a chunk of logits at a time."""
        parts, tokens = self.place.parts, self.place.stimulus.tokens[self.rows]
        row, position = self.place.predicting(self.rows).nonzero(as_tuple=True)
        targets = tokens[row, position + 1].to(normed.device)
        at_once = max(1, _LOGIT_BYTES // (4 * parts.model.width))
        read = normed[row.to(normed.device), position.to(normed.device)].split(at_once)
        chunks = zip(read, targets.split(at_once), strict=True)
        each = torch.cat(
            [F.cross_entropy(parts.unembed(r).float(), ids, reduction="none") for r, ids in chunks]
        )
        total = torch.zeros(len(tokens), dtype=torch.float64)
        return total.index_add(0, row, each.double().cpu())
