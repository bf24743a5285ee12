"""The token batches on which a model is measured: built once per run, the same at every step.

Shapes: `batch` sequences of `position` token ids; `pair` one (query, key) attention entry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from monitor.labels import Labels
from monitor.record import STIMULI

# Below this the periods, and the early and late bands of the in-context score, run into each other.
SHORTEST_CONTEXT = 16

NO_PERIOD = -1

# Enough to see whether a head always attends equally far back.
_SAMPLED_QUERIES = 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionTarget:
    """Where a head with some behaviour would look: the pairs whose attention is summed.

    A query may have several keys (every earlier copy of a token); the mean is over queries.
    """

    sequence: Int[Tensor, " pair"]
    query: Int[Tensor, " pair"]
    key: Int[Tensor, " pair"]
    queries: Int[Tensor, " batch"]

    def rows(self, start: int, stop: int, device: torch.device) -> AttentionTarget:
        """The target in sequences `start` to `stop`, counted from 0 again, on `device`."""
        inside = (self.sequence >= start) & (self.sequence < stop)
        return AttentionTarget(
            sequence=(self.sequence[inside] - start).to(device),
            query=self.query[inside].to(device),
            key=self.key[inside].to(device),
            queries=self.queries[start:stop].to(device),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stimulus:
    """A fixed token batch, and what to look for in the attention it elicits.

    `period` is the length of the repeated block in each sequence (`NO_PERIOD`: not repeated),
    `lead` the number of positions before the first copy. `targets` says which attention entries are
    summed, `entropy` whether the attention entropy is wanted too (a second pass over the keys), and
    `sampled` at which queries it is wanted how far back each head attends. `labels` say which
    concepts its tokens have.
    """

    name: str
    tokens: Int[Tensor, "batch position"]
    period: Int[Tensor, " batch"]
    lead: int = 0
    targets: Mapping[str, AttentionTarget] = field(default_factory=dict)
    entropy: bool = False
    sampled: Int[Tensor, "batch sample"] | None = None
    labels: Labels | None = None

    def rows(self, start: int, stop: int, device: torch.device) -> Stimulus:
        """Sequences `start` to `stop` of the stimulus, on `device`."""
        return dataclasses.replace(
            self,
            tokens=self.tokens[start:stop].to(device),
            period=self.period[start:stop].to(device),
            sampled=None if self.sampled is None else self.sampled[start:stop].to(device),
            targets={name: t.rows(start, stop, device) for name, t in self.targets.items()},
            labels=None if self.labels is None else self.labels.rows(start, stop, device),
        )

    @property
    def first_copy(self) -> Bool[Tensor, "batch query"]:
        """Queries that predict a token of the first copy."""
        query = torch.arange(self.tokens.shape[1])
        return (query >= self.lead - 1) & (query < self.lead - 1 + self.period[:, None])

    @property
    def later_copy(self) -> Bool[Tensor, "batch query"]:
        """Queries in a later copy: their own token has occurred before."""
        return torch.arange(self.tokens.shape[1]) >= self.lead + self.period[:, None]


def repeated(
    *, vocab_size: int, sequences: int, context: int, bos: int | None, seed: int
) -> Stimulus:
    """Random tokens repeated at a random period: what induction heads predict and nothing else can.

    Every sequence is one leading token (`bos`, or token 0 where the model has none) and then copies
    of a block of distinct random tokens until the context is full. The block's length is drawn
    anew for each sequence, from an eighth to half of the context: at one fixed period a head that
    copies by position alone would look like an induction head. Distinct tokens within a block make
    the earlier occurrences of a token unambiguous.

    Raises `ValueError` where the context or the vocabulary is too small for that.
    """
    if context < SHORTEST_CONTEXT:
        raise ValueError(
            f"context={context} is too short to repeat random tokens in: "
            f"expected at least {SHORTEST_CONTEXT} positions"
        )
    leading = 0 if bos is None else bos
    shortest = max(4, context // 8)
    longest = min((context - 1) // 2, vocab_size - 1)
    if longest < shortest:
        raise ValueError(
            f"vocab_size={vocab_size} is too small for blocks of {shortest} distinct random tokens "
            f"at context={context}: expected a vocabulary of at least {shortest + 1}, or pass a "
            "smaller context="
        )
    random = np.random.default_rng([seed, 0])
    tokens = np.full((sequences, context), leading)
    period = random.integers(shortest, longest, size=sequences, endpoint=True)
    for row, length in zip(tokens, period, strict=True):
        block = random.choice(vocab_size - 1, size=length, replace=False)
        block += block >= leading
        row[1:] = np.resize(block, context - 1)
    return repeated_from(torch.from_numpy(tokens), torch.from_numpy(period), lead=1)


def repeated_from(
    tokens: Int[Tensor, "batch position"], period: Int[Tensor, " batch"], *, lead: int
) -> Stimulus:
    """The stimulus of given tokens: after `lead` others, copies of `period` tokens each."""
    batch, positions = tokens.shape
    # A token occurred before a whole number of periods back, but not before the first copy.
    earlier = [range(length, positions, length) for length in period.tolist()]
    after_earlier = [[offset - 1 for offset in offsets] for offsets in earlier]
    # Where it would look in another sequence, and is right in this one only by chance.
    elsewhere = [
        [offset - 1 for offset in range(other, positions, other) if offset % own]
        for own, other in zip(period.tolist(), _of_another(period).tolist(), strict=True)
    ]
    return Stimulus(
        name="repeated",
        tokens=tokens,
        period=period,
        lead=lead,
        entropy=True,
        sampled=_spread(batch, positions),
        targets={
            "prefix_matching": _back(after_earlier, positions, first_key=lead + 1),
            "other_period": _back(elsewhere, positions, first_key=lead + 1),
            "previous_token": _back([[1]] * batch, positions),
            "duplicate_token": _back(earlier, positions, first_key=lead),
            "first_token": _first(batch, positions),
        },
    )


def text_stimulus(tokens: Int[Tensor, "batch position"]) -> Stimulus:
    """Held-out text, whole windows of the context."""
    return Stimulus(
        name="text",
        tokens=tokens,
        period=torch.full((len(tokens),), NO_PERIOD),
        targets={"previous_token": _back([[1]] * len(tokens), tokens.shape[1])},
    )


def text_tail(whole: Stimulus) -> Stimulus:
    """The last quarter of every text window on its own: the same targets with little context."""
    tokens = whole.tokens[:, -(whole.tokens.shape[1] // 4) :]
    return Stimulus(name="text_tail", tokens=tokens, period=whole.period)


def windows(
    tokens: Int[Tensor, "sequence position"], *, context: int, sequences: int
) -> Int[Tensor, "batch context"]:
    """At most `sequences` windows of `context` positions, spread evenly over all of `tokens`.

    Raises `ValueError` where the sequences are shorter than a window.
    """
    rows, positions = tokens.shape
    if positions < context:
        raise ValueError(
            f"text= has sequences of {positions} positions; expected at least context={context}: "
            "pass longer sequences or a smaller context="
        )
    per_row = positions // context
    cut = tokens[:, : per_row * context].reshape(rows * per_row, context)
    chosen = torch.linspace(0, len(cut) - 1, min(sequences, len(cut))).round().long()
    return cut[chosen].clone()


def check_text(
    text: object, *, vocab_size: int | None = None, called: str = "text="
) -> Int[Tensor, "sequence position"]:
    """Returns `text` as int64 token ids on the CPU; errors call it as it is `called`.

    Raises `TypeError` where it is no integer tensor, and `ValueError` where it has another shape or
    ids beyond the vocabulary (None: not known yet).
    """
    expected = f"{called} needs token ids as an integer tensor [sequence, position]"
    if not isinstance(text, Tensor):
        raise TypeError(f"{expected}; got {type(text).__name__}")
    shape = f"shape {list(text.shape)}, dtype {text.dtype}"
    if text.is_floating_point() or text.is_complex() or text.dtype == torch.bool:
        raise TypeError(f"{expected}; got {shape}: pass token ids, not embeddings or characters")
    if text.ndim != 2 or text.numel() == 0:
        raise ValueError(f"{expected}; got {shape}: reshape it to one sequence a row")
    ids = text.detach().cpu().long()
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        raise ValueError(
            f"{called} has token ids from {low} to {high}; expected 0 to "
            f"{'the vocabulary size' if vocab_size is None else vocab_size - 1}: "
            "tokenise it with the model's own tokenizer"
        )
    return ids


def labelled_stimulus(name: str, tokens: Int[Tensor, "batch position"], labels: Labels) -> Stimulus:
    """Text of whose tokens it is known which concepts they have."""
    return Stimulus(
        name=name, tokens=tokens, period=torch.full((len(tokens),), NO_PERIOD), labels=labels
    )


def stimuli_to_arrow(stimuli: Mapping[str, Stimulus]) -> pa.Table:
    """The stimuli as one table, a row a sequence, from which `stimuli_from_arrow` rebuilds them."""
    rows = [
        {
            "stimulus": name,
            "sequence": sequence,
            "period": int(stimulus.period[sequence]),
            "token_ids": row.tolist(),
            **_labels_of(stimulus, sequence),
        }
        for name, stimulus in stimuli.items()
        for sequence, row in enumerate(stimulus.tokens)
    ]
    return pa.Table.from_pylist(rows, schema=STIMULI)


def stimuli_from_arrow(table: pa.Table) -> dict[str, Stimulus]:
    """The stimuli that `stimuli_to_arrow` wrote."""
    stored: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        stored.setdefault(row["stimulus"], []).append(row)
    rebuilt: dict[str, Stimulus] = {}
    for name, rows in stored.items():
        tokens = torch.tensor([row["token_ids"] for row in rows])
        if name == "repeated":
            period = torch.tensor([row["period"] for row in rows])
            rebuilt[name] = repeated_from(tokens, period, lead=1)
        elif name == "text":
            rebuilt[name] = text_stimulus(tokens)
            rebuilt["text_tail"] = text_tail(rebuilt[name])
        elif name != "text_tail":
            rebuilt[name] = labelled_stimulus(name, tokens, _stored_labels(rows, tokens))
    return rebuilt


def _labels_of(stimulus: Stimulus, sequence: int) -> dict[str, Any]:
    labels = stimulus.labels
    if labels is None:
        return {}
    values = labels.values[:, sequence].tolist()
    return {
        "split": int(labels.split[sequence]),
        "length": int(labels.length[sequence]),
        "source": int(labels.source[sequence]),
        "labels": list(zip(labels.names, values, strict=True)),
    }


def _stored_labels(rows: Sequence[dict[str, Any]], tokens: Tensor) -> Labels:
    values = [[of_concept for _, of_concept in row["labels"]] for row in rows]
    names = tuple(name for name, _ in rows[0]["labels"])
    shape = (len(rows), len(names), tokens.shape[1])
    return Labels(
        names=names,
        values=torch.tensor(values, dtype=torch.int8).reshape(shape).transpose(0, 1).clone(),
        split=torch.tensor([row["split"] for row in rows]),
        length=torch.tensor([row["length"] for row in rows]),
        # Runs begun by a version that did not know of sources have none.
        source=torch.tensor(
            [row["sequence"] if row.get("source") is None else row["source"] for row in rows]
        ),
    )


def _back(
    offsets: Sequence[Iterable[int]], positions: int, *, first_key: int = 0
) -> AttentionTarget:
    """The keys of each sequence that lie any of its `offsets` before the query."""
    none = torch.empty(3, 0, dtype=torch.long)
    pairs = [
        torch.stack([torch.full_like(query, sequence), query, query - offset])
        for sequence, distances in enumerate(offsets)
        for offset in distances
        for query in [torch.arange(first_key + offset, positions)]
    ]
    return _target(torch.cat([none, *pairs], dim=1), len(offsets))


def _of_another(period: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """For each sequence the period of another, as near as may be, so that each lends its own once.
    They differ as far as they can.
    """
    order = period.argsort(stable=True)
    most = int(period.unique(return_counts=True)[1].max())
    return torch.empty_like(period).scatter_(0, order, period[order].roll(-most))


def _first(batch: int, positions: int) -> AttentionTarget:
    """Key 0, from every query but the first, which sees nothing else."""
    each = torch.cartesian_prod(torch.arange(batch), torch.arange(1, positions))
    sequence, query = each.unbind(1)
    return _target(torch.stack([sequence, query, torch.zeros_like(query)]), batch)


def _spread(batch: int, positions: int) -> Int[Tensor, "batch sample"]:
    """Some queries of every sequence, spread over the second half of the positions. They differ
    between sequences as far as they can: what attends to one position is not equally far from all.
    """
    half = positions // 2
    stride = half // min(_SAMPLED_QUERIES, half)
    first = torch.arange(batch) * stride // batch
    return positions - half + first[:, None] + torch.arange(0, half - stride + 1, stride)


def _target(pairs: Int[Tensor, "3 pair"], batch: int) -> AttentionTarget:
    sequence, query, key = pairs
    distinct = torch.unique(torch.stack([sequence, query]), dim=1)[0]
    return AttentionTarget(
        sequence=sequence, query=query, key=key, queries=distinct.bincount(minlength=batch)
    )
