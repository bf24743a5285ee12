"""Tasks with training questions and held-out ones, as users name them, and the stimulus that asks
all of them.

Shapes: `question` sequences of `position` token ids, the answer last; `pair` of numbers; `number`
those from 0 up to the modulus.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from monitor.labels import EVALUATION, FIRST_HALF, Labels
from monitor.stimuli import Stimulus, check_text, labelled_stimulus

# Below, there is next to no spectrum; above, the logits of all pairs no longer fit.
_SMALLEST, _LARGEST = 5, 257

# What the labels of the stimulus call the tokens of an answer; and what is no token's, but told by
# their names and stored with them.
_ANSWER = "answer"
_MODULUS, _ZERO, _KEY = "modulus ", "zero ", "key frequency "


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """Sequences that a model is trained on and others, of the same length, that it is not: how well
    does it predict the last `answer` tokens of each from those before?

    >>> rows = torch.arange(12).reshape(4, 3) % 5
    >>> task = Task(train=rows[:3], held_out=rows[3:])

    Text will do, with `answer` one less than the positions.

    Raises `TypeError` where the sequences are no token ids, and `ValueError` where they are not of
    one length or leave nothing before the answer.
    """

    train: Int[Tensor, "question position"]
    held_out: Int[Tensor, "question position"]
    answer: int = 1

    def __post_init__(self) -> None:
        for name in ("train", "held_out"):
            object.__setattr__(self, name, check_text(getattr(self, name), called=f"{name}="))
        positions = self.train.shape[1]
        if self.held_out.shape[1] != positions:
            raise ValueError(
                f"train= has sequences of {positions} positions and held_out= of "
                f"{self.held_out.shape[1]}: expected the same; cut the longer ones"
            )
        if type(self.answer) is not int or not 1 <= self.answer < positions:
            raise ValueError(
                f"answer={self.answer!r}: expected how many of the {positions} tokens of a "
                f"sequence are the answer, from 1 to {positions - 1}"
            )

    def questions(self) -> _Questions:
        """All questions, those trained on first."""
        tokens = torch.cat([self.train, self.held_out])
        return _Questions(
            tokens=tokens,
            train=torch.arange(len(tokens)) < len(self.train),
            answer=self.answer,
        )


@dataclass(frozen=True, slots=True, eq=False)
class ModularAddition:
    """a + b modulo `p`, of which the pairs in `train` are trained on; all others are held out.

    >>> every = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    >>> task = ModularAddition(7, train=every[::2])
    >>> task.questions().tokens[9].tolist()  # 1 + 2 = 3
    [1, 2, 7, 3]

    Args:
        p: the modulus, from 5 to 257.
        train: the pairs (a, b) that the model is trained on, [pair, 2].
        sequence: what the model reads before it answers: "a", "b" and token ids; default: a, b
            and, for "=", the token after the last number; ("a", "b") for two numbers alone.
        zero: the token id of the number 0; those of 1 to p - 1 follow it.
        keys: frequencies that are to be looked at beside those found at each measurement; those
            that a finished training ended with, say, in a second pass over its checkpoints.

    Raises `TypeError` and `ValueError` where one of these is something else.
    """

    p: int
    train: Any = field(kw_only=True)
    sequence: Sequence[str | int] | None = field(default=None, kw_only=True)
    zero: int = field(default=0, kw_only=True)
    keys: Sequence[int] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        p = self.p
        if type(p) is not int or not _SMALLEST <= p <= _LARGEST:
            raise ValueError(
                f"ModularAddition({p!r}): expected a modulus from {_SMALLEST} to {_LARGEST}, so "
                "that there are frequencies and the logits of all pairs fit into memory"
            )
        (zero,) = _whole([self.zero], "zero")
        default = ("a", "b", zero + p)
        sequence = _whole(default if self.sequence is None else self.sequence, "sequence")
        if [each for each in sequence if isinstance(each, str)] not in (["a", "b"], ["b", "a"]):
            raise ValueError(
                f"sequence={sequence!r}: expected 'a' and 'b', once each, and token ids, such as "
                f"{default}"
            )
        keys = _whole(self.keys, "keys")
        if len(set(keys)) != len(keys) or not set(keys) <= set(range(1, p // 2 + 1)):
            raise ValueError(
                f"keys={keys!s:.80}: expected frequencies from 1 to {p // 2}, once each"
            )
        train = _pairs(self.train, p)
        for name, value in (("sequence", sequence), ("keys", keys), ("train", train)):
            object.__setattr__(self, name, value)

    def questions(self) -> _Questions:
        """All pairs, in the order of a p + b."""
        number = torch.arange(self.p)
        a, b = torch.cartesian_prod(number, number).unbind(1)
        told = {"a": self.zero + a, "b": self.zero + b}
        columns = [
            told[each] if isinstance(each, str) else torch.full_like(a, each)
            for each in self.sequence or ()
        ]
        train = torch.zeros(len(a), dtype=torch.bool)
        train[self.train @ torch.tensor([self.p, 1])] = True
        said = [f"{_MODULUS}{self.p}", f"{_ZERO}{self.zero}", *(f"{_KEY}{k}" for k in self.keys)]
        return _Questions(
            tokens=torch.stack([*columns, self.zero + (a + b) % self.p], dim=1),
            train=train,
            answer=1,
            said=tuple(said),
        )


AnyTask = Task | ModularAddition


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Questions:
    """Questions, which of them are trained on, how many of their last tokens are the answer, and
    what else is to be stored.
    """

    tokens: Int[Tensor, "question position"]
    train: Bool[Tensor, " question"]
    answer: int
    said: tuple[str, ...] = ()

    @property
    def trial(self) -> Int[Tensor, "2 position"]:
        """What the model reads of the first question and of the last."""
        return self.tokens[[0, -1], :-1]

    @property
    def vocabulary(self) -> int:
        """How many token ids a model needs to read them."""
        return 1 + int(self.tokens[:, :-1].max())

    @property
    def width(self) -> int:
        """How many logits a model needs for the answers."""
        return 1 + int(self.tokens[:, -self.answer :].max())


def check_task(task: Any) -> AnyTask | None:
    """Returns `task`; raises `TypeError` where it is none."""
    if task is not None and not isinstance(task, Task | ModularAddition):
        raise TypeError(
            f"task= is {type(task).__name__}; expected a Task or a ModularAddition of monitor.tasks"
        )
    return task


def task_stimulus(task: AnyTask, *, vocab_size: int, width: int) -> Stimulus:
    """The stimulus `task`: all questions with their answers, which are labelled; their split says
    which are trained on and which are for evaluation.

    Raises `ValueError` where a token is none of the model's `vocab_size`, or an answer none of its
    `width` logits.
    """
    questions = task.questions()
    tokens = questions.tokens
    if questions.vocabulary > vocab_size or questions.width > width:
        raise ValueError(
            f"task= has questions with token ids up to {questions.vocabulary - 1} and answers up "
            f"to {questions.width - 1}; expected less than the {vocab_size} token ids that the "
            f"model reads and the {width} that it predicts: pass those that it is trained on"
        )
    names = (_ANSWER, *questions.said)
    values = torch.zeros(len(names), *tokens.shape, dtype=torch.int8)
    values[0, :, -questions.answer :] = 1
    labels = Labels(
        names=names,
        values=values,
        split=torch.where(questions.train, FIRST_HALF, EVALUATION),
        length=torch.full((len(tokens),), tokens.shape[1]),
        source=torch.arange(len(tokens)),
    )
    return labelled_stimulus("task", tokens, labels)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sums:
    """What a stimulus, or a part of it, asks of modular addition: in the whole, question a p + b
    is a + b. `numbers` are the token ids of 0 to p - 1, `keys` the frequencies that the user named.
    """

    numbers: Int[Tensor, " number"]
    keys: tuple[int, ...]

    @property
    def total(self) -> Int[Tensor, " question"]:
        """The number that answers each question."""
        number = torch.arange(len(self.numbers))
        total: Tensor = torch.remainder(number[:, None] + number, len(number)).flatten()
        return total


def answer_length(stimulus: Stimulus) -> int:
    """How many tokens at the end of each question are its answer.

    Raises `ValueError` where the stimulus has none.
    """
    labels = stimulus.labels
    if labels is None or _ANSWER not in labels.names:
        raise ValueError(f"stimulus {stimulus.name!r}: expected the questions of a task")
    return int(labels.values[labels.names.index(_ANSWER), 0].sum())


def sums_in(stimulus: Stimulus) -> Sums | None:
    """What `ModularAddition` said, from the stimulus of its questions; None of another task's."""
    names = () if stimulus.labels is None else stimulus.labels.names

    def said(what: str) -> list[int]:
        return [int(name.removeprefix(what)) for name in names if name.startswith(what)]

    if not said(_MODULUS):
        return None
    (p,), (zero,) = said(_MODULUS), said(_ZERO)
    return Sums(numbers=zero + torch.arange(p), keys=tuple(said(_KEY)))


def _pairs(given: Any, p: int) -> Int[Tensor, "pair 2"]:
    expected = f"train=: expected pairs (a, b) of numbers from 0 to {p - 1}"
    try:
        pairs = torch.as_tensor(given).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{expected}; got {given!r:.80}: put them in a list or tensor") from error
    if pairs.is_floating_point() or pairs.dtype == torch.bool or pairs.is_complex():
        raise TypeError(f"{expected}; got numbers of {pairs.dtype}: pass whole numbers")
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs):
        raise ValueError(f"{expected}, one a row; got shape {list(pairs.shape)}")
    if int(pairs.min()) < 0 or int(pairs.max()) >= p:
        raise ValueError(f"{expected}; got {int(pairs.min())} to {int(pairs.max())}")
    distinct: Tensor = torch.unique(pairs.long(), dim=0)
    if len(distinct) == p * p:
        raise ValueError(f"{expected}; got all {p * p} of them: hold some out, else nothing tells")
    return distinct


def _whole(given: Any, name: str) -> tuple[Any, ...]:
    """What was given as a tuple of token ids, frequencies or names."""
    given = given.tolist() if isinstance(given, Tensor) else given
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"{name}= is {type(given).__name__}; expected a list of whole numbers")
    for each in given:
        named = name == "sequence" and isinstance(each, str)
        if not named and (type(each) is not int or each < 0):
            raise TypeError(f"{name}= has {each!r:.80} in it; expected whole numbers from 0 on")
    return tuple(given)
