"""Tasks as users name them: what their questions are, that they survive being stored, and what is
refused.
"""

import re

import numpy as np
import pytest
import torch

from monitor.stimuli import stimuli_from_arrow, stimuli_to_arrow
from monitor.tasks import ModularAddition, Task, answer_length, check_task, sums_in, task_stimulus

PAIRS = [(0, 1), (2, 3), (6, 6)]


def stimulus(task, vocab_size=40):
    return task_stimulus(task, vocab_size=vocab_size, width=vocab_size)


def test_all_pairs_are_asked_with_their_sums():
    built = stimulus(ModularAddition(7, train=PAIRS))
    asked = [[a, b, 7, (a + b) % 7] for a in range(7) for b in range(7)]
    assert built.tokens.tolist() == asked
    train = [tuple(row[:2]) in PAIRS for row in asked]
    assert (built.labels.split == 0).tolist() == train
    assert answer_length(built) == 1
    sums = sums_in(built)
    assert sums.numbers.tolist() == list(range(7))
    assert sums.total.tolist() == [row[-1] for row in asked]
    assert sums.keys == ()


def test_the_sequence_is_the_users():
    task = ModularAddition(5, train=[(1, 3)], sequence=(30, "b", 31, "a", 32), zero=10, keys=[2, 1])
    built = stimulus(task)
    assert built.tokens[1 * 5 + 3].tolist() == [30, 13, 31, 11, 32, 14]
    assert sums_in(built).numbers.tolist() == [10, 11, 12, 13, 14]
    assert sums_in(built).keys == (2, 1)
    assert ModularAddition(5, train=[(1, 3)], zero=10).questions().tokens[0].tolist() == [
        10, 10, 15, 10,
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list])
def test_pairs_of_every_kind_are_taken_once_each(kind):
    task = ModularAddition(7, train=kind([*PAIRS, PAIRS[0]]))
    assert task.train.tolist() == [list(pair) for pair in PAIRS]


def test_any_task():
    train, held_out = torch.randint(9, (4, 6)), torch.randint(9, (3, 6))
    built = stimulus(Task(train=train, held_out=held_out, answer=2))
    assert torch.equal(built.tokens, torch.cat([train, held_out]))
    assert (built.labels.split == 0).tolist() == [True] * 4 + [False] * 3
    assert answer_length(built) == 2
    assert sums_in(built) is None


@pytest.mark.parametrize(
    "task",
    [
        ModularAddition(7, train=PAIRS, keys=[3, 1], zero=2),
        Task(train=torch.arange(6)[None], held_out=torch.arange(6)[None], answer=3),
    ],
    ids=["sums", "task"],
)
def test_a_task_survives_being_stored(task):
    built = stimulus(task)
    (again,) = stimuli_from_arrow(stimuli_to_arrow({"task": built})).values()
    assert torch.equal(again.tokens, built.tokens)
    assert torch.equal(again.labels.split, built.labels.split)
    assert answer_length(again) == answer_length(built)
    one, other = sums_in(again), sums_in(built)
    assert (one is None) == (other is None)
    if one is not None:
        assert torch.equal(one.numbers, other.numbers)
        assert one.keys == other.keys


def test_a_part_of_the_questions_knows_what_is_added():
    built = stimulus(ModularAddition(7, train=PAIRS, zero=2))
    part = built.rows(20, 30, torch.device("cpu"))
    assert torch.equal(sums_in(part).numbers, sums_in(built).numbers)
    assert answer_length(part) == 1


EVERY = [(a, b) for a in range(5) for b in range(5)]


@pytest.mark.parametrize(
    ("p", "given", "error", "said"),
    [
        (4, {}, ValueError, "ModularAddition(4): expected a modulus from 5 to 257"),
        (1.5, {}, ValueError, "ModularAddition(1.5): expected a modulus from 5"),
        (5, {"train": "all"}, TypeError, "got 'all': put them in a list or tensor"),
        (5, {"train": [(0.5, 1.0)]}, TypeError, "got numbers of torch.float32: pass whole"),
        (5, {"train": [1, 2]}, ValueError, "one a row; got shape [2]"),
        (5, {"train": torch.zeros(0, 2).long()}, ValueError, "one a row; got shape [0, 2]"),
        (5, {"train": [(0, 5)]}, ValueError, "numbers from 0 to 4; got 0 to 5"),
        (5, {"train": EVERY}, ValueError, "got all 25 of them: hold some out"),
        (5, {"sequence": ("a", 5)}, ValueError, "sequence=('a', 5): expected 'a' and 'b', once"),
        (5, {"sequence": ("a", "b", "=")}, ValueError, "expected 'a' and 'b', once each, and"),
        (5, {"sequence": "ab"}, TypeError, "sequence= is str; expected a list"),
        (5, {"zero": -1}, TypeError, "zero= has -1 in it; expected whole numbers from 0 on"),
        (5, {"keys": [3]}, ValueError, "keys=(3,): expected frequencies from 1 to 2, once each"),
        (5, {"keys": [1, 1]}, ValueError, "keys=(1, 1): expected frequencies from 1 to 2"),
        (5, {"keys": [1.5]}, TypeError, "keys= has 1.5 in it"),
    ],
)
def test_additions_that_are_refused(p, given, error, said):
    with pytest.raises(error, match=re.escape(said)):
        ModularAddition(p, **({"train": [(0, 1)]} | given))


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"train": [[1, 2]]}, TypeError, "train= needs token ids as an integer tensor"),
        ({"held_out": torch.zeros(2, 3)}, TypeError, "held_out= needs token ids"),
        ({"held_out": torch.ones(2, 3).long()}, ValueError, "and held_out= of 3: expected"),
        ({"answer": 4}, ValueError, "answer=4: expected how many of the 4 tokens"),
        ({"answer": 0}, ValueError, "from 1 to 3"),
    ],
)  # fmt: skip
def test_tasks_that_are_refused(given, error, said):
    rows = torch.ones(2, 4).long()
    with pytest.raises(error, match=re.escape(said)):
        Task(**({"train": rows, "held_out": rows} | given))


def test_what_is_no_task_is_refused():
    assert check_task(None) is None
    with pytest.raises(TypeError, match="task= is str; expected a Task or a ModularAddition"):
        check_task("addition")


@pytest.mark.parametrize(("vocab_size", "width"), [(7, 8), (8, 6)])
def test_tokens_of_another_vocabulary_are_refused(vocab_size, width):
    with pytest.raises(ValueError, match="token ids up to 7 and answers up to 6; expected less"):
        task_stimulus(ModularAddition(7, train=PAIRS), vocab_size=vocab_size, width=width)
