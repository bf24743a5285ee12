"""The text that shows concepts: which sequences it has, what each is for, and which tokens count.

Shapes: `concept` what tokens are labelled with; `batch` sequences of `position` token ids.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int, Int8
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from monitor.concepts.naming import Concept, LabelledTokens, check_labels, meanings
from monitor.labels import (
    EVALUATION,
    FEWEST,
    FEWEST_SOURCES,
    FIRST_HALF,
    SECOND_HALF,
    Labels,
)
from monitor.stimuli import Stimulus, labelled_stimulus, windows

_log = logging.getLogger("phasewatch")

# What part of the sequences serves which purpose.
_SHARES = {FIRST_HALF: 0.25, SECOND_HALF: 0.25, EVALUATION: 0.5}
_CALLED = {FIRST_HALF: "first half", SECOND_HALF: "second half", EVALUATION: "evaluation"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Rows:
    """Some of the sequences, and what is known of their tokens."""

    tokens: Int[Tensor, "batch position"]
    length: Int[Tensor, " batch"]
    source: Int[Tensor, " batch"]
    labels: dict[str, Int8[Tensor, "batch position"]]


def text_rows(sequences: int) -> int:
    """How many windows of held-out text are labelled, for the `sequences` on which all else is
    measured. Evenly spread, every second of them is one of those.
    """
    return 2 * sequences - 1


def concept_stimulus(
    concepts: Sequence[Concept | LabelledTokens],
    *,
    text: Int[Tensor, "sequence position"] | None,
    context: int,
    sequences: int,
    vocab_size: int,
    seed: int,
) -> Stimulus:
    """Windows of held-out text, where functions label them or there is nothing else, and the user's
    own sequences, with the labels of their tokens.

    A quarter of the sequences is for each half of fitting, the others for evaluation: drawn at
    random within each set of sequences, and of texts that are labelled as a whole within each
    side. Sequences of the same tokens, or from the same source, serve the same purpose. As many
    tokens of each purpose have a concept as lack it: of the side with more of them some are drawn.
    The first position of a sequence never counts, nor does padding.

    Raises `ValueError` and `TypeError` where label functions fail or have no text to label, or the
    user's own sequences do not fit the model.
    """
    blocks = [
        _own(concept, context, vocab_size)
        for concept in concepts
        if isinstance(concept, LabelledTokens)
    ]
    functions = [concept for concept in concepts if isinstance(concept, Concept)]
    labelled_text = text is not None and (functions or not blocks)
    if text is not None and labelled_text:
        blocks.insert(0, _windows(text, context, text_rows(sequences)))
    if not blocks:
        raise ValueError(
            f"concepts= has label functions ({', '.join(c.name for c in functions)}), and there is "
            "no text whose tokens they could label: pass held-out token ids with text="
        )
    # Windows of the same text could be in both, and then on both sides.
    for block in blocks[:1] if labelled_text else blocks:
        for concept in functions:
            block.labels[concept.name] = _called(concept, block.tokens)
    names = tuple(meanings(concepts))
    labels = _joined(blocks, names)
    random_numbers = np.random.default_rng([seed, 3])
    labels = dataclasses.replace(labels, split=_split(blocks, labels, random_numbers))
    _warn_of_few(labels)
    labels = dataclasses.replace(labels, values=_balanced(labels, seed))
    width = labels.values.shape[2]
    tokens = torch.cat([_padded(block.tokens, width) for block in blocks])
    return labelled_stimulus("concepts", tokens, labels)


def _windows(text: Int[Tensor, "sequence position"], context: int, sequences: int) -> _Rows:
    """At most so many windows of held-out text. Those of one row are of one source, where there are
    rows enough.
    """
    cut = windows(text, context=context, sequences=sequences)
    row = torch.arange(len(text))[:, None].expand_as(text)
    source = windows(row, context=context, sequences=sequences)[:, 0]
    return _Rows(
        tokens=cut,
        length=torch.full((len(cut),), context),
        source=source if len(source.unique()) >= FEWEST_SOURCES else torch.arange(len(cut)),
        labels={},
    )


def _own(given: LabelledTokens, context: int, vocab_size: int) -> _Rows:
    """The last `context` tokens of the user's own sequences."""
    low, high = int(given.tokens.min()), int(given.tokens.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"concepts {', '.join(given.labels)}: token ids from {low} to {high}; expected 0 to "
            f"{vocab_size - 1}: tokenise them with the model's own tokenizer"
        )
    width = min(context, int(given.length.max()))
    first = (given.length - context).clamp(min=0)
    kept = first[:, None] + torch.arange(width)
    kept = kept.clamp(max=given.tokens.shape[1] - 1)
    return _Rows(
        tokens=given.tokens.gather(1, kept),
        length=given.length.clamp(max=context),
        source=given.source,
        labels={name: values.gather(1, kept) for name, values in given.labels.items()},
    )


def _called(
    concept: Concept, tokens: Int[Tensor, "batch position"]
) -> Int8[Tensor, "batch position"]:
    """The labels that a user's function gives."""
    try:
        with _random_streams_kept():
            given = concept.label(tokens.clone())
    except Exception as error:
        raise ValueError(
            f"concept {concept.name!r}: its label function raised {type(error).__name__}: {error}; "
            f"it was given token ids as an int64 tensor of shape {list(tokens.shape)}"
        ) from error
    return check_labels(concept.name, given, tokens)


def _joined(blocks: Sequence[_Rows], names: tuple[str, ...]) -> Labels:
    """The labels of all sequences, among them only tokens that may count; nothing is split yet.
    Sequences of the same source, and those of the same tokens, are from one source.
    """
    width = max(block.tokens.shape[1] for block in blocks)
    length = torch.cat([block.length for block in blocks])
    values = torch.zeros(len(names), len(length), width, dtype=torch.int8)
    begin = 0
    for block in blocks:
        end = begin + len(block.tokens)
        for name, own in block.labels.items():
            values[names.index(name), begin:end] = _padded(own, width)
        begin = end
    labels = Labels(
        names=names,
        values=values,
        split=torch.zeros_like(length),
        length=length,
        source=torch.from_numpy(_together(blocks)).long(),
    )
    values *= labels.used
    return labels


def _split(
    blocks: Sequence[_Rows], labels: Labels, random_numbers: np.random.Generator
) -> Int[Tensor, " batch"]:
    """What each sequence is for."""
    block = np.repeat(np.arange(len(blocks)), [len(one.tokens) for one in blocks])
    sources = [np.flatnonzero(labels.source == source) for source in labels.source.unique()]
    of_source = np.array([block[rows[0]] for rows in sources])
    sides = _sides(labels, sources, of_source)
    strata: dict[tuple[int, ...], list[np.ndarray]] = {}
    for number, rows in enumerate(sources):
        strata.setdefault((of_source[number], *sides[number]), []).append(rows)
    split = torch.zeros(len(labels.source), dtype=torch.int64)
    for stratum in sorted(strata):
        groups = [
            strata[stratum][place] for place in random_numbers.permutation(len(strata[stratum]))
        ]
        taken = dict.fromkeys(_SHARES, 0)
        # The largest first: what comes last evens out.
        for rows in sorted(groups, key=len, reverse=True):
            purpose = min(
                _SHARES, key=lambda one: ((taken[one] + len(rows)) / _SHARES[one], taken[one])
            )
            split[torch.from_numpy(rows)] = purpose
            taken[purpose] += len(rows)
    return split


def _sides(
    labels: Labels, sources: Sequence[np.ndarray], block: np.ndarray
) -> list[tuple[int, ...]]:
    """Of every source the side that it is on for each concept, as a whole: 0 where its tokens, or
    those of another source in its block, are on both.
    """
    having, lacking = (
        np.stack([(labels.values[:, rows] == side).any(2).any(1).numpy() for rows in sources])
        for side in (1, -1)
    )
    sides = having.astype(int) - lacking.astype(int)
    for number in np.unique(block):
        there = block == number
        sides[there] *= ~(having & lacking)[there].any(0)
    return [tuple(side) for side in sides.tolist()]


def _together(blocks: Sequence[_Rows]) -> np.ndarray:
    """The number of every sequence's source: sequences of one source must serve the same purpose,
    and so must those of the same tokens.
    """
    keys: list[tuple[object, ...]] = []
    for number, block in enumerate(blocks):
        keys += [("source", number, source) for source in block.source.tolist()]
    total = len(keys)
    for block in blocks:
        rows = zip(block.tokens.tolist(), block.length.tolist(), strict=True)
        keys += [("tokens", *row[:length]) for row, length in rows]
    # The first sequence with each key: a sequence is tied to those of its source and of its tokens.
    first: dict[tuple[object, ...], int] = {}
    ties = [first.setdefault(key, place % total) for place, key in enumerate(keys)]
    graph = coo_array(
        (np.ones(2 * total), (np.tile(np.arange(total), 2), ties)), shape=(total, total)
    )
    found: np.ndarray = connected_components(graph, directed=False)[1]
    return found


def _balanced(labels: Labels, seed: int) -> Int8[Tensor, "concept batch position"]:
    """As many tokens that have a concept as lack it, in what serves each purpose."""
    values = labels.values.numpy().copy()
    for name, of_concept in zip(labels.names, values, strict=True):
        # Of its own: other concepts change nothing about which tokens count for this one.
        random_numbers = np.random.default_rng([seed, 4, zlib.crc32(name.encode())])
        for purpose in _SHARES:
            there = (labels.split == purpose).numpy()[:, None]
            sides = [np.argwhere((of_concept == side) & there) for side in (1, -1)]
            fewest = min(map(len, sides))
            for side in sides:
                left_out = side[random_numbers.permutation(len(side))[fewest:]]
                of_concept[tuple(left_out.T)] = 0
    return torch.from_numpy(values)


def _warn_of_few(labels: Labels) -> None:
    few, never = [], []
    for name, values in zip(labels.names, labels.values, strict=True):
        for purpose, called in _CALLED.items():
            there = values[labels.split == purpose]
            having, lacking = int(there.eq(1).sum()), int(there.eq(-1).sum())
            if min(having, lacking) < FEWEST:
                few.append(f"{name} ({called}: {having} tokens have it, {lacking} lack it)")
                never += [name] if not values.eq(-1).any() else []
                break
    if few:
        _log.warning(
            "too few tokens to tell much of %d concepts: %s; expected at least %d of each side in "
            "each part of the text: pass more of it, or more sequences=%s",
            len(few),
            ", ".join(few),
            FEWEST,
            f"; nothing lacks {', '.join(never)}: among integers -1 says so, and 0 that a token "
            "does not count"
            if never
            else "",
        )


def _padded(tensor: Int[Tensor, "batch position"], width: int) -> Int[Tensor, "batch width"]:
    return F.pad(tensor, (0, width - tensor.shape[1]))


@contextmanager
def _random_streams_kept() -> Iterator[None]:
    """Training draws from them too."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
