"""Attention from the whole softmax, and every `induction` field from whole patterns and token ids.

Plain loops over sequences, queries and keys. Earlier occurrences are found by comparing tokens:
nothing here knows of periods, targets, log-sum-exps or blocks.

Shapes: `batch head query key` for patterns, as nested lists or tensors of float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# Fields of `induction` that are a mean attention on some keys, as (query, key) conditions.
Wanted = Callable[[list[int], int, int], bool]


def pattern(
    query: Tensor,
    key: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The softmax of every row in float64, and which keys each query may see.

    A row whose every key is hidden holds zeros.
    """
    scores, visible = masked_scores(
        query, key, attn_mask=attn_mask, is_causal=is_causal, scale=scale
    )
    weights = torch.zeros_like(scores)
    for row in map(tuple, visible.any(-1).nonzero().tolist()):
        keys = visible[row]
        weights[row][keys] = scores[row][keys].softmax(0)
    return weights, visible


def masked_scores(
    query: Tensor,
    key: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The scores that the softmax is taken of, in float64, and which keys each query may see."""
    heads, features = query.shape[1], query.shape[-1]
    key = torch.stack([key[:, head * key.shape[1] // heads] for head in range(heads)], dim=1)
    scores = query.double() @ key.double().transpose(-1, -2)
    scores *= features**-0.5 if scale is None else scale
    visible = torch.ones_like(scores, dtype=torch.bool)
    if is_causal:
        visible = visible.tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = visible & attn_mask
    elif attn_mask is not None:
        scores = scores + attn_mask.double()
        visible = visible & (attn_mask > -1e4)
    return scores, visible


def occurred_before(tokens: list[int], query: int, key: int) -> bool:
    return tokens[key] == tokens[query] and key < query


def after_an_occurrence(tokens: list[int], query: int, key: int) -> bool:
    return key > 0 and occurred_before(tokens, query, key - 1)


def just_before(tokens: list[int], query: int, key: int) -> bool:
    return key == query - 1


def the_first(tokens: list[int], query: int, key: int) -> bool:
    return key == 0 and query > 0


ON_KEYS: dict[str, Wanted] = {
    "prefix_matching": after_an_occurrence,
    "previous_token": just_before,
    "duplicate_token": occurred_before,
    "first_token": the_first,
}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over all queries of all sequences, its standard error over sequences, and its null."""

    mean: float
    stderr: float
    null: float


def estimate(per_sequence: Iterable[tuple[float, float, int]]) -> Estimate:
    """From each sequence's sum, the same under uniform attention, and its number of queries.

    The standard error is that of the ratio of two totals over independent sequences.
    """
    sums, uniforms, counts = map(list, zip(*per_sequence, strict=True))
    mean = sum(sums) / sum(counts)
    batch = len(sums)
    squares = sum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return Estimate(
        mean=mean,
        stderr=math.sqrt(batch / (batch - 1) * squares) / sum(counts),
        null=sum(uniforms) / sum(counts),
    )


def attention_on(
    wanted: Wanted, weights: Tensor, tokens: Tensor, visible: Tensor | None = None
) -> Estimate:
    """The mean attention of one head ([batch query key]) on the keys that are wanted.

    Queries count whether or not they can see what is wanted; `visible` is [query key], by default
    all that is not later.
    """
    seen = _seen(weights, visible)
    per_sequence = []
    for rows, row_tokens in zip(weights.tolist(), tokens.tolist(), strict=True):
        attended, uniform, queries = 0.0, 0.0, 0
        for query, row in enumerate(rows):
            keys = [k for k in range(query + 1) if wanted(row_tokens, query, k)]
            attended += sum(row[k] for k in keys)
            uniform += sum(seen[query][k] for k in keys) / sum(seen[query])
            queries += bool(keys)
        per_sequence.append((attended, uniform, queries))
    return estimate(per_sequence)


def _seen(weights: Tensor, visible: Tensor | None) -> list[list[bool]]:
    return (torch.ones_like(weights[0]).tril().bool() if visible is None else visible).tolist()


def entropy(weights: Tensor, *, normalized: bool, visible: Tensor | None = None) -> Estimate:
    """The mean entropy of one head's rows ([batch query key]), the first row left out."""
    seen = _seen(weights, visible)
    per_sequence = []
    for rows in weights.tolist():
        total, uniform = 0.0, 0.0
        for query, row in enumerate(rows[1:], start=1):
            largest = math.log(sum(seen[query]))
            surprise = -sum(p * math.log(p) for p in row if p > 0)
            total += surprise / largest if normalized else surprise
            uniform += 1.0 if normalized else largest
        per_sequence.append((total, uniform, len(rows) - 1))
    return estimate(per_sequence)


def beyond_position(weights: Tensor, tokens: Tensor, visible: Tensor | None = None) -> Estimate:
    """The mean attention of one head ([batch query key]) on the keys of prefix matching, less that
    on those that would be such keys if the sequence had the period of another one; its standard
    error by leaving sequences out.

    The sequences stand in a ring by their period, and each takes the one so many places on as the
    most frequent period is often. What is a key of prefix matching all the same is left out.
    """
    rows, batch = tokens.tolist(), len(tokens)
    lead = 0 if rows[0][0] in rows[0][1:] else 1
    periods = [_period(row) for row in rows]
    ring = sorted(range(batch), key=lambda sequence: periods[sequence])
    most = max(periods.count(period) for period in periods)
    seen = _seen(weights, visible)

    def on(wanted: Wanted) -> list[tuple[float, float, int]]:
        found = []
        for sequence in range(batch):
            attended, uniform, queries = 0.0, 0.0, 0
            for query, row in enumerate(weights[sequence].tolist()):
                keys = [k for k in range(query + 1) if wanted(sequence, query, k)]
                attended += sum(row[k] for k in keys)
                uniform += sum(seen[query][k] for k in keys) / sum(seen[query])
                queries += bool(keys)
            found.append((attended, uniform, queries))
        return found

    def matches(sequence: int, query: int, key: int) -> bool:
        return after_an_occurrence(rows[sequence], query, key)

    def would_match(sequence: int, query: int, key: int) -> bool:
        other = periods[ring[(ring.index(sequence) + most) % batch]]
        multiple = (query - key + 1) % other == 0 and key > lead
        return multiple and not matches(sequence, query, key)

    own, elsewhere = on(matches), on(would_match)

    def difference(sequences: list[int], number: int) -> float:
        means = [
            sum(of[s][number] for s in sequences) / sum(of[s][2] for s in sequences)
            for of in (own, elsewhere)
        ]
        return means[0] - means[1]

    everything = list(range(batch))
    without = [difference([s for s in everything if s != left], 0) for left in everything]
    middle = sum(without) / batch
    return Estimate(
        mean=difference(everything, 0),
        stderr=math.sqrt((batch - 1) / batch * sum((w - middle) ** 2 for w in without)),
        null=difference(everything, 1),
    )


def _period(row: list[int]) -> int:
    return next(d for d in range(1, len(row)) if row[-1] == row[-1 - d])


def same_offset(
    weights: Tensor, tokens: Tensor, sampled: Tensor, visible: Tensor | None = None
) -> Estimate:
    """How often one head ([batch query key]) attends equally far back in two sequences of different
    periods, at the sampled queries of each; its standard error by leaving sequences out.
    """
    periods = [_period(row) for row in tokens.tolist()]
    seen = _seen(weights, visible)

    def profile(sequence: int, *, evenly: bool) -> list[float]:
        back = [0.0] * len(seen)
        for query in sampled[sequence].tolist():
            for key in range(query + 1):
                even = seen[query][key] / sum(seen[query])
                attended = even if evenly else float(weights[sequence, query, key])
                back[query - key] += attended / sampled.shape[1]
        return back

    def agreement(profiles: dict[int, list[float]]) -> float:
        agreeing = [
            sum(p * q for p, q in zip(profiles[a], profiles[b], strict=True))
            for a in profiles
            for b in profiles
            if periods[a] != periods[b]
        ]
        return sum(agreeing) / len(agreeing)

    batch = len(tokens)
    own = {b: profile(b, evenly=False) for b in range(batch)}
    without = [agreement({b: p for b, p in own.items() if b != left}) for left in range(batch)]
    middle = sum(without) / batch
    return Estimate(
        mean=agreement(own),
        stderr=math.sqrt((batch - 1) / batch * sum((w - middle) ** 2 for w in without)),
        null=agreement({b: profile(b, evenly=True) for b in range(batch)}),
    )


def induction(
    repeated: list[Tensor],
    repeated_tokens: Tensor,
    text: list[Tensor],
    text_tokens: Tensor,
    *,
    sampled: Tensor,
    visible: list[Tensor] | None = None,
) -> dict[str, list[Estimate]]:
    """Every field of `induction` that a pattern shows, a list over heads of all layers, from each
    layer's patterns.

    `sampled` are the queries at which offsets are compared ([batch sample]); `visible` says, for
    each layer, which keys a query may see: [#head query key].
    """
    heads = [layer[:, head] for layer in repeated for head in range(layer.shape[1])]
    on_text = [layer[:, head] for layer in text for head in range(layer.shape[1])]
    seen: list[Tensor | None] = [None] * len(heads)
    if visible is not None:
        layers = zip(visible, repeated, strict=True)
        seen = [keys for one, layer in layers for keys in one.expand(layer.shape[1], -1, -1)]
    return {
        **{
            field: [
                attention_on(wanted, weights, repeated_tokens, keys)
                for weights, keys in zip(heads, seen, strict=True)
            ]
            for field, wanted in ON_KEYS.items()
        },
        "previous_token_text": [
            attention_on(just_before, weights, text_tokens, keys)
            for weights, keys in zip(on_text, seen, strict=True)
        ],
        "beyond_position": [
            beyond_position(weights, repeated_tokens, keys)
            for weights, keys in zip(heads, seen, strict=True)
        ],
        "same_offset": [
            same_offset(weights, repeated_tokens, sampled, keys)
            for weights, keys in zip(heads, seen, strict=True)
        ],
        "entropy": [
            entropy(weights, normalized=False, visible=keys)
            for weights, keys in zip(heads, seen, strict=True)
        ],
        "normalized_entropy": [
            entropy(weights, normalized=True, visible=keys)
            for weights, keys in zip(heads, seen, strict=True)
        ],
    }
