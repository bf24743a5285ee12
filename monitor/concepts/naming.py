"""Concepts as users name them.

Shapes: `batch` sequences of `position` token ids, padded at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Int8
from torch import Tensor

from monitor.analogies import Analogies
from monitor.names import check_label

# Nothing is ever read at the first position.
_SHORTEST_TEXT = 2


@dataclass(frozen=True, slots=True, eq=False)
class Concept:
    """Something that tokens of held-out text have or lack.

    `label` is called with token ids [batch, position] and returns as many booleans, or integers: 1
    where a token has it, -1 where it lacks it, 0 where it does not count.

    >>> even = Concept("even", help="has an even token id", label=lambda ids: ids % 2 == 0)

    Raises `ValueError` for a name that cannot be one, and `TypeError` where `label` is no function.
    """

    name: str
    help: str = field(default="", kw_only=True)
    label: Callable[[Tensor], Any] = field(kw_only=True)

    def __post_init__(self) -> None:
        check_name(self.name)
        if not callable(self.label):
            raise TypeError(
                f"concept {self.name!r}: label= is {type(self.label).__name__}; expected a "
                "function from token ids [batch, position] to as many booleans; for text that is "
                "labelled already use labelled_texts or labelled_tokens"
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelledTokens:
    """Sequences of which it is known which tokens have which concepts: what `labelled_texts`,
    `labelled_tokens` and `python_source` make.

    `length` says how many tokens of a sequence are no padding, `labels` are 1, -1 or 0 by concept,
    `help` says what concepts are, and sequences with the same `source` serve the same purpose: what
    is fitted on one is never evaluated on another.
    """

    tokens: Int[Tensor, "batch position"]
    length: Int[Tensor, " batch"]
    labels: Mapping[str, Int8[Tensor, "batch position"]]
    source: Int[Tensor, " batch"]
    help: Mapping[str, str] = field(default_factory=dict)


def labelled_texts(name: str, *, having: Any, lacking: Any, help: str = "") -> LabelledTokens:  # noqa: A002 -- as a probe's fields call it
    """A concept of whole texts: those `having` it and those `lacking` it, each a sequence of token
    ids. It is looked for at the last token of each, which has read all the others.

    >>> sorted(labelled_texts("french", having=[[5, 7], [5, 8, 9]], lacking=[[6, 3]]).labels)
    ['french']

    Raises `TypeError` where texts are no token ids, and `ValueError` where there are none or one
    has a single token: nothing is read at the first position, which a leading token can take.
    """
    check_name(name)
    texts = [
        (ids, side)
        for argument, given, side in (("having", having, 1), ("lacking", lacking, -1))
        for ids in _texts(name, argument, given)
    ]
    length = torch.tensor([len(ids) for ids, _ in texts])
    tokens = torch.nn.utils.rnn.pad_sequence([ids for ids, _ in texts], batch_first=True)
    values = torch.zeros(tokens.shape, dtype=torch.int8)
    sides = torch.tensor([side for _, side in texts], dtype=torch.int8)
    values[torch.arange(len(texts)), length - 1] = sides
    return LabelledTokens(
        tokens=tokens,
        length=length,
        labels={name: values},
        source=torch.arange(len(texts)),
        help={name: help},
    )


def labelled_tokens(
    labels: Mapping[str, Any],
    *,
    tokens: Any,
    length: Any = None,
    source: Any = None,
    help: Mapping[str, str] | None = None,  # noqa: A002 -- as a probe's fields call it
) -> LabelledTokens:
    """Concepts of single tokens.

    Args:
        labels: by the name of each concept, booleans [batch, position], or integers: 1 where a
            token has it, -1 where it lacks it, 0 where it does not count.
        tokens: the token ids [batch, position].
        length: how many tokens of each sequence are no padding; default: all.
        source: a number for each sequence; those with the same number, windows of one file say,
            serve the same purpose. Default: each its own.
        help: by name, what the concepts are.

    Raises:
        TypeError, ValueError: an argument has a type, shape or value of no use.
    """
    ids = integers(tokens, "tokens=", "token ids [batch, position]")
    if ids.ndim != 2 or ids.numel() == 0:
        raise ValueError(f"tokens= has shape {list(ids.shape)}; expected [batch, position]")
    if not isinstance(labels, Mapping) or not labels:
        raise TypeError(
            f"labels: got {type(labels).__name__}; expected a mapping from at least one name of a "
            "concept to labels [batch, position]"
        )
    rows, positions = ids.shape
    per_row = {"length": torch.full((rows,), positions), "source": torch.arange(rows)}
    for name, given in (("length", length), ("source", source)):
        if given is not None:
            per_row[name] = integers(given, f"{name}=", "a whole number for each sequence")
            if per_row[name].shape != (rows,):
                raise ValueError(
                    f"{name}= has shape {list(per_row[name].shape)}; expected one number for each "
                    f"of the {rows} sequences in tokens="
                )
    shortest, longest = (int(end) for end in per_row["length"].aminmax())
    if shortest < 1 or longest > positions:
        raise ValueError(
            f"length= is {per_row['length'].tolist()!s:.80}; expected 1 to {positions}, the "
            "positions of tokens="
        )
    return LabelledTokens(
        tokens=ids,
        **per_row,
        labels={check_name(n): check_labels(n, given, ids) for n, given in labels.items()},
        help=dict(help or {}),
    )


Named = Concept | LabelledTokens | Analogies
"""What can be in the list that users pass as `concepts=`."""


def check_concepts(concepts: Any) -> tuple[Named, ...]:
    """The concepts and analogies that a user passed, None for none.

    Raises `TypeError` where they are no such thing, and `ValueError` where two have one name.
    """
    expected = (
        "concepts= needs a list of Concept(...), labelled_texts(...), labelled_tokens(...), "
        "python_source(...), Analogies(...) and what from_tokenizer(...) returns"
    )
    if concepts is None:
        return ()
    if isinstance(concepts, str | Mapping | Tensor) or not isinstance(concepts, Sequence):
        raise TypeError(f"{expected}; got {type(concepts).__name__}: put it in a list")
    for concept in concepts:
        if isinstance(concept, list | tuple):
            raise TypeError(f"{expected}; got a list in it: write it with a star, *from_tokenizer")
        if not isinstance(concept, Named):
            raise TypeError(f"{expected}; got {type(concept).__name__} in it")
    names = [name for concept in concepts for name in _meanings(concept)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"concepts= has {', '.join(map(repr, twice))} more than once; expected a name of its "
            "own for each concept: leave one out, or rename a Concept with "
            "dataclasses.replace(concept, name=...)"
        )
    return tuple(concepts)


def meanings(concepts: Any) -> dict[str, str]:
    """By the name of each concept and relation that a user passed, what it is."""
    found: dict[str, str] = {}
    for concept in check_concepts(concepts):
        found |= _meanings(concept)
    return found


def _meanings(concept: Named) -> dict[str, str]:
    if isinstance(concept, Analogies):
        return {concept.name: f"a − b + c = d, for {len(concept.quadruples)} quadruples of words"}
    if isinstance(concept, Concept):
        return {concept.name: concept.help}
    return {name: concept.help.get(name, "") for name in concept.labels}


def check_name(name: Any) -> str:
    """Returns the name of a concept.

    Raises `TypeError` where it is no text, and `ValueError` where it does not fit a column or the
    label of a metric.
    """
    return check_label(name, "a concept", "french")


def check_labels(
    name: str, given: Any, tokens: Int[Tensor, "batch position"]
) -> Int8[Tensor, "batch position"]:
    """Returns a concept's labels as 1, -1 and 0.

    Raises `TypeError` and `ValueError` where they are something else.
    """
    expected = (
        f"concept {name!r}: expected as labels booleans, or integers that are 1, -1 or 0, of the "
        f"shape of the token ids, {list(tokens.shape)}"
    )
    if isinstance(given, np.ndarray | list | tuple):
        try:
            given = torch.as_tensor(given)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{expected}; got {type(given).__name__} ({error})") from error
    if not isinstance(given, Tensor):
        raise TypeError(f"{expected}; got {type(given).__name__}")
    if given.is_floating_point() or given.is_complex():
        raise TypeError(f"{expected}; got dtype {given.dtype}: compare scores with a threshold")
    if given.shape != tokens.shape:
        raise ValueError(f"{expected}; got shape {list(given.shape)}")
    labels = given.detach().cpu()
    if labels.dtype == torch.bool:
        return labels.to(torch.int8) * 2 - 1
    wrong = labels[(labels != 1) & (labels != -1) & (labels != 0)]
    if len(wrong):
        raise ValueError(f"{expected}; got {int(wrong[0])}: make one concept of each value")
    return labels.to(torch.int8)


def integers(given: Any, argument: str, what: str) -> Int[Tensor, "..."]:
    """Returns whole numbers as an int64 tensor on the CPU.

    Raises `TypeError` where they are something else.
    """
    try:
        tensor = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{argument} is {type(given).__name__} ({error}); expected {what}"
        ) from error
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{argument} has dtype {tensor.dtype}; expected {what}")
    return tensor.detach().cpu().long()


def _texts(name: str, argument: str, given: Any) -> list[Int[Tensor, " position"]]:
    """The texts of one side of a concept."""
    place = f"concept {name!r}: {argument}="
    expected = "a list of texts, each a sequence of token ids"
    if isinstance(given, str) or not isinstance(given, Sequence | Tensor | np.ndarray):
        raise TypeError(f"{place} is {type(given).__name__}; expected {expected}")
    if len(given) == 0:
        raise ValueError(f"{place} is empty; expected {expected}")
    texts = []
    for number, text in enumerate(given):
        one = f"{place}[{number}]"
        if isinstance(text, str):
            raise TypeError(
                f"{one} is text; expected token ids: encode it with the model's tokenizer"
            )
        ids = integers(text, one, "a sequence of token ids")
        if ids.ndim != 1:
            raise ValueError(f"{one} has shape {list(ids.shape)}; expected a sequence of token ids")
        if len(ids) < _SHORTEST_TEXT:
            raise ValueError(
                f"{one} has {len(ids)} tokens; expected at least {_SHORTEST_TEXT}, for nothing is "
                "read at the first position: put a token such as the model's BOS before each text"
            )
        texts.append(ids)
    return texts
