"""`Analogies` as users write them, what is wrong with some, and the stimulus that they become."""

import numpy as np
import pytest
import torch

from monitor.analogies import Analogies, analogies_stimulus, quadruples_in
from monitor.labels import EVALUATION
from monitor.stimuli import stimuli_from_arrow, stimuli_to_arrow

QUADRUPLES = [(1, 2, 3, 4), (5, 6, 7, 8), (1, 2, 7, 8)]
MORE = [(9, 2, 3, 1), (4, 3, 2, 1), (8, 7, 1, 2), (5, 6, 3, 4)]


def stimulus(bos=None, **change):
    both = [Analogies("royalty", quadruples=QUADRUPLES), Analogies("gender", quadruples=MORE)]
    return analogies_stimulus(both, bos=bos, **{"context": 16, "vocab_size": 10} | change)


@pytest.mark.parametrize(
    ("quadruples", "error", "says"),
    [
        (QUADRUPLES[:2], ValueError, "at least 3 of them; got 2"),
        ([*QUADRUPLES, (1, 2, 3)], ValueError, r"got \(1, 2, 3\)"),
        ([*QUADRUPLES, (1, 2, 1, 4)], ValueError, "all different"),
        ([*QUADRUPLES, (1, 2, 3, 4)], ValueError, "asks the same"),
        ([*QUADRUPLES, (3, 2, 1, 4)], ValueError, "asks the same"),
        ([*QUADRUPLES, ("king", "man", "woman", "queen")], TypeError, "tokenizer"),
        ([*QUADRUPLES, (1, 2, 3, True)], TypeError, "got True"),
        ([*QUADRUPLES, "abcd"], TypeError, "'abcd'"),
        ("king - man", TypeError, "got str"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_quadruples_of_no_use_are_refused(quadruples, error, says):
    with pytest.raises(error, match=says):
        Analogies("royalty", quadruples=quadruples)


@pytest.mark.parametrize(
    "given",
    [
        np.array(QUADRUPLES),
        torch.tensor(QUADRUPLES),
        list(np.array(QUADRUPLES)),
        list(torch.tensor(QUADRUPLES)),
        [[np.int64(word) for word in words] for words in QUADRUPLES],
    ],
)
def test_token_ids_may_be_those_of_numpy_and_torch(given):
    found = Analogies("royalty", quadruples=given).quadruples
    assert found == Analogies("royalty", quadruples=QUADRUPLES).quadruples
    assert {type(word) for words in found for word in words} == {int}


@pytest.mark.parametrize(
    ("name", "error"),
    [("", ValueError), (" a", ValueError), ("a" * 61, ValueError), (3, TypeError)],
)
def test_names_of_no_use_are_refused(name, error):
    with pytest.raises(error, match="the name of analogies"):
        Analogies(name, quadruples=QUADRUPLES)


def test_a_tensor_and_questions_the_other_way_round_are_taken():
    turned = [*QUADRUPLES, (4, 3, 2, 1)]
    assert Analogies("a", quadruples=torch.tensor(turned)).quadruples == tuple(turned)


@pytest.mark.parametrize(("bos", "lead"), [(None, 0), (7, 7)])
def test_each_word_stands_after_the_same_token(bos, lead):
    built = stimulus(bos)
    assert built.name == "analogies"
    words = [word for quadruple in QUADRUPLES + MORE for word in quadruple]
    assert built.tokens.tolist() == [[lead, word] for word in words]
    labels = built.labels
    assert labels.names == ("royalty", "gender")
    assert labels.values[:, :, 0].count_nonzero() == 0
    assert labels.values[0, :, 1].tolist() == [1] * 12 + [0] * 16
    assert labels.values[1, :, 1].tolist() == [0] * 12 + [1] * 16
    assert (labels.split == EVALUATION).all()
    assert labels.used.tolist() == [[False, True]] * 28


def test_quadruples_come_back_from_what_is_stored():
    stored = stimuli_from_arrow(stimuli_to_arrow({"analogies": stimulus()}))["analogies"]
    for built in (stimulus(), stored):
        found = {name: words.tolist() for name, words in quadruples_in(built).items()}
        assert found == {
            "royalty": [list(q) for q in QUADRUPLES],
            "gender": [list(q) for q in MORE],
        }


def test_what_the_model_cannot_read_is_refused():
    with pytest.raises(ValueError, match="token ids from 1 to 9; expected 0 to 8"):
        stimulus(vocab_size=9)
    with pytest.raises(ValueError, match="context=1"):
        stimulus(context=1)
    many = Analogies("many", quadruples=[(i, i + 300, i + 600, i + 900) for i in range(129)])
    with pytest.raises(
        ValueError, match="129 quadruples of 516 words; expected at most 256 of 512"
    ):
        analogies_stimulus([many], bos=None, context=16, vocab_size=2000)
    with pytest.raises(ValueError, match="'many' are there more than once"):
        analogies_stimulus([many, many], bos=None, context=16, vocab_size=2000)
    with pytest.raises(ValueError, match="at least one"):
        analogies_stimulus([], bos=None, context=16, vocab_size=2000)
