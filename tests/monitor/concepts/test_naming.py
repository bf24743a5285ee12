"""How users name concepts: what becomes of labelled texts and tokens, and what is said of all that
is of no use, before anything is measured.
"""

import numpy as np
import pytest
import torch

from monitor.concepts import (
    Concept,
    check_concepts,
    labelled_texts,
    labelled_tokens,
    meanings,
)
from tests.models.concepts import CONCEPTS

IDS = torch.arange(12).view(3, 4)
EVEN = IDS % 2 == 0


def test_texts_of_all_kinds_are_labelled_at_their_last_tokens():
    having = [[5, 7], torch.tensor([5, 8, 9], dtype=torch.int32), np.array([1, 2, 3, 4])]
    found = labelled_texts("french", having=having, lacking=torch.tensor([[6, 3]]), help="Is it.")
    assert found.length.tolist() == [2, 3, 4, 2]
    rows = [row[:end] for row, end in zip(found.tokens.tolist(), found.length, strict=True)]
    assert rows == [[5, 7], [5, 8, 9], [1, 2, 3, 4], [6, 3]]
    expected = [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, -1, 0, 0]]
    assert found.labels["french"].tolist() == expected
    assert len(found.source.unique()) == 4
    assert meanings([found]) == {"french": "Is it."}


@pytest.mark.parametrize(
    "given",
    [EVEN, EVEN.tolist(), EVEN.numpy(), EVEN.int() * 2 - 1, (EVEN.int() * 2 - 1).numpy()],
    ids=["bool", "lists", "numpy", "integers", "numpy integers"],
)
def test_labels_of_tokens_are_taken_in_every_form(given):
    found = labelled_tokens({"even": given}, tokens=IDS.int())
    assert found.tokens.dtype == torch.int64
    assert found.labels["even"].tolist() == [[1, -1, 1, -1]] * 3
    assert found.length.tolist() == [4, 4, 4]
    assert found.source.tolist() == [0, 1, 2]


def test_what_does_not_count_stays_so():
    found = labelled_tokens({"x": torch.zeros_like(IDS), "y": -EVEN.int()}, tokens=IDS.tolist())
    assert found.labels["x"].eq(0).all()
    assert found.labels["y"].tolist() == [[-1, 0, -1, 0]] * 3
    assert found.labels["y"].dtype == torch.int8


def test_lengths_sources_and_meanings():
    found = labelled_tokens(
        {"even": EVEN}, tokens=IDS, length=[1, 4, 2], source=[7, 7, 2], help={"even": "Is even."}
    )
    assert (found.length.tolist(), found.source.tolist()) == ([1, 4, 2], [7, 7, 2])
    assert meanings([*CONCEPTS[1:2], found]) == {"third": CONCEPTS[1].help, "even": "Is even."}


def two(texts):
    return {"having": texts, "lacking": [[1, 2]]}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (two(["un mot"]), TypeError, r"having=\[0\] is text; expected token ids: encode it with"),
        (two("un mot"), TypeError, "'french': having= is str; expected a list of texts"),
        (two([]), ValueError, "'french': having= is empty; expected a list of texts"),
        (two([[1, 2], [3]]), ValueError, r"having=\[1\] has 1 tokens; .* at least 2, .* BOS"),
        (two([[[1, 2]]]), ValueError, r"having=\[0\] has shape \[1, 2\]; expected a sequence"),
        (two([1, 2]), ValueError, r"having=\[0\] has shape \[\]; expected a sequence"),
        (two([[1.0, 2.0]]), TypeError, r"having=\[0\] has dtype torch.float32; expected a seq"),
        (two([[[1], 2]]), TypeError, r"having=\[0\] is list .*; expected a sequence of token ids"),
        ({"having": [[1, 2]], "lacking": None}, TypeError, "lacking= is NoneType; expected a list"),
    ],
)
def test_texts_of_no_use(given, error, message):
    with pytest.raises(error, match=message):
        labelled_texts("french", **given)


@pytest.mark.parametrize(
    ("labels", "more", "error", "message"),
    [
        (EVEN, {}, TypeError, "labels: got Tensor; expected a mapping from at least"),
        ({}, {}, TypeError, "labels: got dict; expected a mapping from at least"),
        ({"x": EVEN[:2]}, {}, ValueError, r"'x': .*token ids, \[3, 4\]; got shape \[2, 4\]"),
        ({"x": IDS}, {}, ValueError, r"1, -1 or 0, .*; got 2: make one concept of each value"),
        ({"x": EVEN.float()}, {}, TypeError, "got dtype torch.float32: compare scores"),
        ({"x": None}, {}, TypeError, "'x': expected as labels booleans, .* got NoneType"),
        ({"x": [[1, 2], [3]]}, {}, TypeError, "'x': expected as labels booleans, .* got list"),
        ({"x": EVEN}, {"tokens": IDS[0]}, ValueError, r"tokens= has shape \[4\]; expected \[batch"),
        ({"x": EVEN}, {"tokens": EVEN}, TypeError, "tokens= has dtype torch.bool; expected token"),
        ({"x": EVEN}, {"tokens": "words"}, TypeError, "tokens= is str .*; expected token ids"),
        ({"x": EVEN}, {"length": [1, 2]}, ValueError, r"length= has shape \[2\]; .* the 3 seq"),
        (
            {"x": EVEN},
            {"length": [1, 2, 5]},
            ValueError,
            r"length= is \[1, 2, 5\]; expected 1 to 4",
        ),
        (
            {"x": EVEN},
            {"length": [0, 2, 4]},
            ValueError,
            r"length= is \[0, 2, 4\]; expected 1 to 4",
        ),
        ({"x": EVEN}, {"source": "abc"}, TypeError, "source= is str .*; expected a whole number"),
    ],
)
def test_labelled_tokens_of_no_use(labels, more, error, message):
    with pytest.raises(error, match=message):
        labelled_tokens(labels, **{"tokens": IDS, **more})


@pytest.mark.parametrize("name", ["a concept", "être", "x", "2nd", "x" * 60])
def test_names(name):
    assert Concept(name, label=abs).name == name


@pytest.mark.parametrize("name", ["", " x", "x ", "two\nlines", "x" * 61, "\x00"])
def test_names_that_cannot_be(name):
    message = "expected 1 to 60 printable characters without spaces around them"
    for make in (
        lambda: Concept(name, label=abs),
        lambda: labelled_texts(name, having=[[1, 2]], lacking=[[1, 2]]),
        lambda: labelled_tokens({name: EVEN}, tokens=IDS),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_names_that_are_no_text():
    with pytest.raises(TypeError, match="the name of a concept is 3; expected text such as"):
        Concept(3, label=abs)


def test_labels_that_are_no_function():
    with pytest.raises(TypeError, match=r"'x': label= is Tensor; .* use labelled_texts or"):
        Concept("x", label=EVEN)


def test_none_is_no_concept():
    assert check_concepts(None) == check_concepts([]) == ()
    assert check_concepts(list(CONCEPTS)) == CONCEPTS


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (CONCEPTS[0], TypeError, r"concepts= needs a list of .*; got Concept: put it in a list"),
        ("capital", TypeError, "concepts= needs a list of .*; got str: put it in a list"),
        ([CONCEPTS], TypeError, r"got a list in it: write it with a star, \*from_tokenizer"),
        (["capital"], TypeError, r"concepts= needs a list of Concept\(...\), .*; got str in it"),
        ([lambda ids: ids > 1], TypeError, "got function in it"),
        ([*CONCEPTS, CONCEPTS[0]], ValueError, "concepts= has 'even' more than once; expected a"),
        (
            [*CONCEPTS, labelled_tokens({"third": EVEN}, tokens=IDS)],
            ValueError,
            "concepts= has 'third' more than once",
        ),
    ],
)
def test_lists_of_no_use(given, error, message):
    with pytest.raises(error, match=message):
        check_concepts(given)
