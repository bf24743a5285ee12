"""The text that shows concepts: that its labels are the user's, balanced, and never at tokens that
are not used; that no text is on two sides, that seeds decide, that it survives being stored, and
what is said where it cannot be built.
"""

import logging
import random

import numpy as np
import pytest
import torch

from monitor.concepts import (
    Concept,
    concept_stimulus,
    labelled_texts,
    labelled_tokens,
    text_rows,
)
from monitor.labels import EVALUATION, FIRST_HALF, SECOND_HALF
from monitor.stimuli import stimuli_from_arrow, stimuli_to_arrow, windows
from tests.models.concepts import CONCEPTS

VOCABULARY, CONTEXT = 50, 32
EVEN, THIRD, AFTER_EVEN = CONCEPTS
SPLITS = (FIRST_HALF, SECOND_HALF, EVALUATION)


def text(rows=64, positions=CONTEXT, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (rows, positions), generator=generator)


def build(*concepts, **more):
    options = {"text": text(), "context": CONTEXT, "sequences": 16, "seed": 0}
    return concept_stimulus(concepts, **{"vocab_size": VOCABULARY, **options, **more})


def sizes(split):
    return [int((split == purpose).sum()) for purpose in SPLITS]


def sentences(having=24, lacking=12, seed=0):
    """Texts of 3 to 12 tokens: those of the first side begin with token 1, of the other with 2."""
    chance = random.Random(seed)
    sides = [
        [
            [side, *(chance.randrange(3, VOCABULARY) for _ in range(chance.randint(2, 11)))]
            for _ in range(number)
        ]
        for side, number in ((1, having), (2, lacking))
    ]
    return labelled_texts("first", having=sides[0], lacking=sides[1])


def test_the_windows_are_of_the_text_and_every_second_is_one_that_all_else_is_measured_on():
    for rows, positions in ((64, CONTEXT), (5, 10 * CONTEXT + 3)):
        given = text(rows, positions)
        found = build(EVEN, text=given)
        assert found.tokens.shape == (text_rows(16), CONTEXT)
        assert torch.equal(found.tokens[::2], windows(given, context=CONTEXT, sequences=16))
        assert found.labels.length.tolist() == [CONTEXT] * 31


def test_labels_are_those_of_the_function_or_none():
    found = build(*CONCEPTS)
    assert found.labels.names == ("even", "third", "after_even")
    for concept, values in zip(CONCEPTS, found.labels.values, strict=True):
        expected = concept.label(found.tokens).int() * 2 - 1
        assert ((values == expected) | (values == 0)).all()
        # In each part all tokens of the rarer side count.
        for purpose in SPLITS:
            there = (found.labels.split == purpose)[:, None] & found.labels.used
            rarer = min(int((expected[there] == side).sum()) for side in (1, -1))
            assert (
                [int((values[there] == side).sum()) for side in (1, -1)] == [rarer, rarer] != [0, 0]
            )


def test_as_many_tokens_have_a_concept_as_lack_it():
    found = build(*CONCEPTS, sentences(), labelled_tokens({"rare": text(8) < 4}, tokens=text(8)))
    counts = {}
    for name, values in zip(found.labels.names, found.labels.values, strict=True):
        for purpose in SPLITS:
            there = values[found.labels.split == purpose]
            counts[name, purpose] = int((there == 1).sum())
            assert (there == 1).sum() == (there == -1).sum()
    assert min(counts.values()) > 0
    assert counts["even", FIRST_HALF] > 80
    # All that there is of the smaller side: three of the four quarters of 12 and 24 texts.
    assert [counts["first", purpose] for purpose in SPLITS] == [3, 3, 6]


def test_which_tokens_count_of_the_larger_side_is_drawn_evenly():
    (values,) = build(THIRD, text=text(400), sequences=100).labels.values
    counted = (values == -1).float().mean(0)[1:]
    expected = counted.mean()
    # Each position is counted in half of 199 sequences or so.
    assert (counted - expected).abs().max() < 5 * (expected * (1 - expected) / 199).sqrt()


def test_nothing_counts_at_the_first_position_or_in_padding():
    own = labelled_tokens({"own": text(8, 10) > 20}, tokens=text(8, 10), length=[4] * 8)
    found = build(own, EVEN, sentences())
    assert (found.labels.values[:, ~found.labels.used] == 0).all()
    assert found.labels.values[:, :, 0].eq(0).all()
    assert found.labels.values[0, 31:39, 1:4].ne(0).any()


@pytest.mark.parametrize("rows", [4, 8, 31, 64])
def test_a_quarter_a_quarter_and_a_half(rows):
    split = build(EVEN, text=text(rows), sequences=64).labels.split
    first, second, evaluation = sizes(split)
    assert abs(evaluation - rows / 2) <= 1
    assert abs(first - rows / 4) <= 1
    assert abs(second - rows / 4) <= 1


def test_each_set_of_sequences_and_each_side_of_texts_is_split_for_itself():
    own = labelled_tokens({"own": text(20) > 20}, tokens=text(20, seed=1))
    split = build(EVEN, own, sentences()).labels.split
    blocks = split.split([31, 20, 24, 12])
    assert [sizes(block) for block in blocks] == [[8, 8, 15], [5, 5, 10], [6, 6, 12], [3, 3, 6]]


def test_the_same_text_is_never_on_both_sides():
    given = text(10).repeat(4, 1)
    own = labelled_tokens({"own": given[:10] > 20}, tokens=given[:10])
    found = build(EVEN, own, text=given, sequences=30)
    purposes = {}
    for row, purpose in zip(found.tokens.tolist(), found.labels.split.tolist(), strict=True):
        purposes.setdefault(tuple(row), set()).add(purpose)
    assert len(purposes) == 10
    assert all(len(one) == 1 for one in purposes.values())
    assert set.union(*purposes.values()) == set(SPLITS)


def test_windows_of_one_row_of_text_are_of_one_source_where_there_are_rows_enough():
    for rows, alike in ((8, True), (7, False)):
        labels = build(EVEN, text=text(rows, 4 * CONTEXT), sequences=16).labels
        assert len(labels.split) > 2 * rows
        row = (torch.linspace(0, 4 * rows - 1, len(labels.split)).round() // 4).tolist()
        purposes = {}
        for number, purpose in zip(row, labels.split.tolist(), strict=True):
            purposes.setdefault(number, set()).add(purpose)
        assert all(len(one) == 1 for one in purposes.values()) == alike
        assert len(labels.source.unique()) == (rows if alike else len(labels.source))


@pytest.mark.parametrize("documents", [8, 12, 16])
def test_documents_that_are_labelled_as_wholes_are_split_within_each_side(documents):
    """Else a part of them often has none of one side."""
    tokens = text(3 * documents)
    source = torch.arange(documents).repeat_interleave(3)
    whole = (source % 2 == 1)[:, None].expand_as(tokens)
    own = labelled_tokens({"whole": whole}, tokens=tokens, source=source)
    for seed in range(20):
        labels = build(own, text=None, seed=seed).labels
        for purpose in SPLITS:
            there = labels.values[0, labels.split == purpose]
            assert (there == 1).any()
            assert (there == -1).any()


def test_a_side_of_some_documents_says_nothing_of_those_that_have_both():
    """Stratified by what few of them are, the others would be split as if they were all alike."""
    tokens, source = text(32), torch.arange(8).repeat_interleave(4)
    values = torch.ones(32, CONTEXT, dtype=torch.int8)
    values[:, ::2] = -1
    values[source == 0] = 1
    own = labelled_tokens({"mixed": values}, tokens=tokens, source=source)
    labels = build(own, text=None).labels
    assert [len(labels.source[labels.split == purpose].unique()) for purpose in SPLITS] == [2, 2, 4]


def test_padding_does_not_make_texts_differ():
    short = [[1, 5, 6], [1, 5, 6], [1, 7, 8], [1, 5, 6, 0]]
    found = build(labelled_texts("x", having=short, lacking=[[2, 3]] * 4), text=None)
    assert found.labels.split[0] == found.labels.split[1]
    assert len(found.labels.split[4:].unique()) == 1
    assert found.tokens.shape == (8, 4)


def test_what_has_one_source_serves_one_purpose():
    source = [0] * 7 + [1] * 3 + [2] * 3 + [3] * 3 + list(range(4, 12))
    own = labelled_tokens({"own": text(24) > 20}, tokens=text(24), source=source)
    split = build(own, text=None).labels.split
    by_source = [{int(split[row]) for row in range(24) if source[row] == one} for one in range(12)]
    assert all(len(one) == 1 for one in by_source)
    assert sizes(split) == [6, 6, 12]


def test_long_texts_keep_their_last_tokens():
    long = list(range(VOCABULARY))
    found = build(labelled_texts("x", having=[long], lacking=[long[:5]]), text=None)
    assert found.tokens[0].tolist() == long[-CONTEXT:]
    assert found.tokens[1].tolist() == [*long[:5], *[0] * (CONTEXT - 5)]
    assert found.labels.length.tolist() == [CONTEXT, 5]
    own = labelled_tokens({"own": text(9, 50) > 20}, tokens=text(9, 50), length=[50, 40, 7] * 3)
    found = build(own, text=None)
    for row, end in enumerate([50, 40, 7] * 3):
        kept = text(9, 50)[row, max(0, end - CONTEXT) : end]
        assert found.tokens[row, : len(kept)].tolist() == kept.tolist()
        values = found.labels.values[0, row, 1 : len(kept)]
        assert ((values == (kept[1:] > 20).int() * 2 - 1) | (values == 0)).all()


def test_functions_label_the_users_own_sequences_where_there_is_no_text():
    found = build(sentences(), EVEN, text=None)
    assert found.labels.names == ("first", "even")
    assert found.labels.values[1].ne(0).sum() > 100
    # With text they label that alone: the same passage may be in both.
    found = build(sentences(), EVEN)
    assert found.labels.values[1, 31:].eq(0).all()


def test_without_concepts_there_is_text_all_the_same():
    found = build()
    assert found.labels.names == ()
    assert found.labels.values.shape == (0, 31, CONTEXT)
    assert sizes(found.labels.split) == [8, 8, 15]


def test_seeds_decide_and_other_concepts_do_not():
    one, same, other = (build(*CONCEPTS, seed=seed).labels for seed in (0, 0, 1))
    alone = build(THIRD).labels
    assert torch.equal(one.values, same.values)
    assert torch.equal(one.split, same.split)
    assert not torch.equal(one.split, other.split)
    assert not torch.equal(one.values, other.values)
    assert torch.equal(alone.values[0], one.values[1])


def test_random_streams_are_left_alone_even_by_functions_that_draw():
    def drawing(ids):
        ids[:] = 0
        random.random()
        np.random.rand()
        return torch.rand(ids.shape) > 0.5

    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    found = build(Concept("drawn", label=drawing))
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])
    assert found.tokens.any()


def test_it_survives_being_stored():
    for found in (build(*CONCEPTS, sentences()), build()):
        again = stimuli_from_arrow(stimuli_to_arrow({"concepts": found}))["concepts"]
        assert torch.equal(again.tokens, found.tokens)
        assert again.labels.names == found.labels.names
        for part in ("values", "split", "length"):
            assert torch.equal(getattr(again.labels, part), getattr(found.labels, part))


def test_too_few_tokens_are_said_once_for_all_concepts(caplog):
    never = Concept("never", label=lambda ids: ids < 0)
    with caplog.at_level(logging.WARNING, logger="phasewatch"):
        found = build(
            EVEN, never, Concept("once", label=lambda ids: (ids == 3) & (ids.cumsum(1) < 90))
        )
    (record,) = caplog.records
    said = record.getMessage()
    assert "too few tokens to tell much of 2 concepts: never (first half: 0 tokens have it" in said
    assert "once (first half: " in said
    assert "even" not in said
    assert found.labels.values[1].eq(0).all()
    caplog.clear()
    build(*CONCEPTS)
    assert not caplog.records


def raising(ids):
    raise KeyError("oh")


@pytest.mark.parametrize(
    ("label", "error", "message"),
    [
        (raising, ValueError, r"'x': its label function raised KeyError: 'oh'; .* \[31, 32\]"),
        (lambda ids: ids[0] > 3, ValueError, r"'x': .* \[31, 32\]; got shape \[32\]"),
        (lambda ids: ids, ValueError, "'x': .* 1, -1 or 0, .*; got .*: make one concept of each"),
        (lambda ids: ids / 2, TypeError, "'x': .* got dtype torch.float32: compare"),
        (lambda ids: None, TypeError, "'x': .* got NoneType"),
    ],
)
def test_functions_of_no_use(label, error, message):
    with pytest.raises(error, match=message):
        build(Concept("x", label=label))


def test_functions_without_text():
    message = r"label functions \(even, third\), and there is no text .*: pass .* with text="
    with pytest.raises(ValueError, match=message):
        build(EVEN, THIRD, text=None)


def test_tokens_that_the_model_does_not_know():
    message = "concepts first: token ids from 0 to 49; expected 0 to 19: tokenise them with"
    with pytest.raises(ValueError, match=message):
        build(sentences(), text=None, vocab_size=20)


def test_labels_without_any_lack_are_said_to_be_none(caplog):
    """0 and 1 are what many would write for booleans."""
    given = text(40)
    with caplog.at_level(logging.WARNING, logger="phasewatch"):
        build(labelled_tokens({"own": (given > 20).long()}, tokens=given), text=None)
    (record,) = caplog.records
    assert "nothing lacks own: among integers -1 says so" in record.getMessage()
