"""Analogies between words, a − b + c = d, as users name them, and the stimulus that shows them.

Shapes: `batch` sequences of `position` token ids; `quadruple` the words of one analogy.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from monitor.labels import EVALUATION, Labels
from monitor.names import check_label
from monitor.stimuli import Stimulus, labelled_stimulus

# Fewer say nothing of how sure a share of them is.
_FEWEST = 3

# Four sequences each, and a number for every two words in every layer.
_MOST_QUADRUPLES = 256
_MOST_WORDS = 512

# What stands before each word: nothing is read at the first position.
_LEAD = 1


@dataclass(frozen=True, slots=True, eq=False)
class Analogies:
    """Words between which there is one relation, as quadruples of token ids (a, b, c, d) of which
    a − b + c = d should hold: king − man + woman = queen. Each word is a single token.

    >>> king, man, woman, queen, prince, boy, girl, princess = range(8)
    >>> royalty = Analogies(
    ...     "royalty",
    ...     quadruples=[
    ...         (king, man, woman, queen),
    ...         (prince, boy, girl, princess),
    ...         (queen, woman, girl, princess),
    ...     ],
    ... )

    Raises `TypeError` where a word is no whole number, and `ValueError` where the name is of no
    use, a quadruple does not have four different words, one is there twice, or there are too few.
    """

    name: str
    quadruples: Sequence[Sequence[int]] = field(kw_only=True)

    def __post_init__(self) -> None:
        name = self.name
        check_label(name, "analogies", "royalty")
        quadruples = _checked(name, self.quadruples)
        asked: dict[tuple[frozenset[int], int, int], tuple[int, ...]] = {}
        for quadruple in quadruples:
            a, b, c, d = quadruple
            # The same question with a and c exchanged has the same answer, and is no second one.
            question = (frozenset((a, c)), b, d)
            if question in asked:
                raise ValueError(
                    f"analogies {name!r}: {quadruple} asks the same as {asked[question]}; expected "
                    "each analogy once: leave one out"
                )
            asked[question] = quadruple
        object.__setattr__(self, "quadruples", quadruples)


def analogies_stimulus(
    analogies: Sequence[Analogies], *, bos: int | None, context: int, vocab_size: int
) -> Stimulus:
    """The stimulus `analogies`: for each quadruple four sequences of one word each.

    Before each word stands `bos` or, where the model has none, token 0: it is the same before all
    words, so that it cannot tell them apart. Labels say which words belong to which relation;
    nothing is fitted, and all sequences are for evaluation.

    Raises `ValueError` where there are no analogies or too many, two have one name, a word is not
    in the vocabulary, or `context` is too short.
    """
    names = [given.name for given in analogies]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"analogies {', '.join(map(repr, twice))} are there more than once; expected a name "
            "of its own for each relation"
        )
    if not names:
        raise ValueError("no analogies: expected at least one Analogies(...)")
    if context <= _LEAD:
        raise ValueError(
            f"context={context}: expected at least {_LEAD + 1} for analogies, a leading token and "
            "a word"
        )
    words = [word for given in analogies for words in given.quadruples for word in words]
    _check_size(words, vocab_size)
    tokens = torch.tensor([[0 if bos is None else bos, word] for word in words])
    relation = torch.tensor(
        [r for r, given in enumerate(analogies) for _ in range(4 * len(given.quadruples))]
    )
    values = torch.zeros(len(names), *tokens.shape, dtype=torch.int8)
    values[relation, torch.arange(len(words)), _LEAD] = 1
    labels = Labels(
        names=tuple(names),
        values=values,
        split=torch.full((len(words),), EVALUATION),
        length=torch.full((len(words),), tokens.shape[1]),
        source=torch.arange(len(words)),
    )
    return labelled_stimulus("analogies", tokens, labels)


def quadruples_in(stimulus: Stimulus) -> dict[str, Int[Tensor, "quadruple 4"]]:
    """By the name of each relation, its quadruples of token ids: what `analogies_stimulus` took.

    Raises `ValueError` where the stimulus has no labels.
    """
    labels = stimulus.labels
    if labels is None:
        raise ValueError(f"stimulus {stimulus.name!r}: expected one with labels")
    words = stimulus.tokens[:, _LEAD]
    return {
        name: words[values[:, _LEAD] == 1].reshape(-1, 4)
        for name, values in zip(labels.names, labels.values, strict=True)
    }


def _checked(name: str, given: Any) -> tuple[tuple[int, int, int, int], ...]:
    expected = f"analogies {name!r}: expected quadruples of token ids (a, b, c, d)"
    if isinstance(given, Tensor | np.ndarray):
        given = given.tolist()
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"{expected}; got {type(given).__name__}: put them in a list")
    quadruples = []
    for one in given:
        if isinstance(one, str) or not isinstance(one, Sequence | Tensor | np.ndarray):
            raise TypeError(f"{expected}; got {one!r:.80} as one of them")
        words = [_token_id(word, expected) for word in one]
        if len(words) != 4 or len(set(words)) != 4:
            raise ValueError(f"{expected}, all different; got {tuple(words)!s:.80}")
        quadruples.append((words[0], words[1], words[2], words[3]))
    if len(quadruples) < _FEWEST:
        raise ValueError(
            f"{expected}, at least {_FEWEST} of them; got {len(quadruples)}: fewer say nothing of "
            "how sure a share of them is"
        )
    return tuple(quadruples)


def _token_id(word: Any, expected: str) -> int:
    try:
        if isinstance(word, bool):
            raise TypeError  # It would count as token 0 or 1.
        return operator.index(word)
    except TypeError:
        raise TypeError(
            f"{expected}; got {word!r:.80} as a word: give the token id that the model's tokenizer "
            "has for it"
        ) from None


def _check_size(words: Sequence[int], vocab_size: int) -> None:
    if min(words) < 0 or max(words) >= vocab_size:
        raise ValueError(
            f"analogies have token ids from {min(words)} to {max(words)}; expected 0 to "
            f"{vocab_size - 1}: take them from the model's own tokenizer"
        )
    quadruples, distinct = len(words) // 4, len(set(words))
    if quadruples > _MOST_QUADRUPLES or distinct > _MOST_WORDS:
        raise ValueError(
            f"analogies have {quadruples} quadruples of {distinct} words; expected at most "
            f"{_MOST_QUADRUPLES} of {_MOST_WORDS} in all: every word is run through the model at "
            "every measurement; take some of them"
        )
