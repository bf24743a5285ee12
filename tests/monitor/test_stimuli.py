"""The token batches: what repeats in them and what does not, where targets point, that they survive
being stored, and what is said of text that cannot be used.
"""

import math

import numpy as np
import pytest
import torch

from monitor.labels import Labels
from monitor.record import STIMULI
from monitor.stimuli import (
    NO_PERIOD,
    Stimulus,
    check_text,
    labelled_stimulus,
    repeated,
    repeated_from,
    stimuli_from_arrow,
    stimuli_to_arrow,
    text_stimulus,
    text_tail,
    windows,
)
from tests.oracles.attention import ON_KEYS

CONTEXT, VOCABULARY, BOS = 64, 100, 7


def build(**more) -> Stimulus:
    sizes = {"vocab_size": VOCABULARY, "sequences": 32, "context": CONTEXT, "bos": BOS, "seed": 0}
    return repeated(**(sizes | more))


def text(rows: int = 6, positions: int = CONTEXT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCABULARY, (rows, positions), generator=generator)


def test_a_seed_gives_the_same_tokens_and_another_seed_others():
    assert torch.equal(build().tokens, build().tokens)
    assert torch.equal(build().period, build().period)
    assert not torch.equal(build().tokens, build(seed=1).tokens)


def test_the_global_random_streams_are_not_used():
    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    build()
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_more_sequences_differ_from_each_other():
    tokens = build().tokens
    assert len(tokens.unique(dim=0)) == len(tokens)


def test_periods_are_drawn_from_an_eighth_to_half_of_the_context():
    period = build(sequences=500).period
    assert period.min() == CONTEXT // 8
    assert period.max() == (CONTEXT - 1) // 2
    assert len(period.unique()) == (CONTEXT - 1) // 2 - CONTEXT // 8 + 1


def test_every_sequence_is_a_leading_token_and_copies_until_the_context_is_full():
    stimulus = build()
    assert stimulus.tokens.shape == (32, CONTEXT)
    assert stimulus.lead == 1
    for row, period in zip(stimulus.tokens.tolist(), stimulus.period.tolist(), strict=True):
        block = row[1 : 1 + period]
        assert row[0] == BOS
        assert len(set(block)) == period
        assert BOS not in block
        copies = math.ceil((CONTEXT - 1) / period)
        assert copies >= 2
        assert row[1:] == (block * copies)[: CONTEXT - 1]


@pytest.mark.parametrize("bos", [0, BOS, VOCABULARY - 1])
def test_every_other_token_is_drawn(bos):
    tokens = build(sequences=300, bos=bos).tokens[:, 1:]
    assert set(tokens.unique().tolist()) == set(range(VOCABULARY)) - {bos}


def test_without_a_bos_token_0_leads():
    tokens = build(bos=None).tokens
    assert tokens[:, 0].eq(0).all()
    assert tokens[:, 1:].min() > 0


def test_a_small_vocabulary_shortens_the_blocks():
    stimulus = build(vocab_size=12, sequences=200)
    assert stimulus.period.max() == 11
    assert stimulus.tokens.max() == 11


@pytest.mark.parametrize("context", [16, 17, 33, 250])
def test_first_and_later_copy_split_the_predictions_of_repeated_tokens(context):
    stimulus = build(context=context)
    for sequence, period in enumerate(stimulus.period.tolist()):
        first = stimulus.first_copy[sequence].nonzero().flatten().tolist()
        later = stimulus.later_copy[sequence].nonzero().flatten().tolist()
        # A query predicts the next token: that at 0 predicts the first of the first copy.
        assert first == list(range(period))
        row = stimulus.tokens[sequence].tolist()
        assert later == [i for i in range(context) if row[i] in row[:i]]
        assert later == list(range(1 + period, context))


@pytest.mark.parametrize("context", [16, 40])
def test_targets_are_the_keys_that_comparing_tokens_finds(context):
    stimulus = build(context=context, sequences=5)
    rows = stimulus.tokens.tolist()
    for name, wanted in ON_KEYS.items():
        target = stimulus.targets[name]
        found = sorted(
            zip(target.sequence.tolist(), target.query.tolist(), target.key.tolist(), strict=True)
        )
        expected = [
            (sequence, query, key)
            for sequence, row in enumerate(rows)
            for query in range(context)
            for key in range(query + 1)
            if wanted(row, query, key)
        ]
        assert found == expected, name
        queries = [{q for s, q, _ in expected if s == sequence} for sequence in range(5)]
        assert target.queries.tolist() == list(map(len, queries))


def test_uniform_attention_on_prefix_matching_is_as_known():
    """0.0503 at 64 positions without a leading token, periods from 8 to 32 (known answer)."""
    random = np.random.default_rng(0)
    period = torch.from_numpy(random.integers(8, 32, size=2000, endpoint=True))
    tokens = torch.zeros(2000, 64, dtype=torch.long)
    target = repeated_from(tokens, period, lead=0).targets["prefix_matching"]
    uniform = (1.0 / (target.query + 1)).sum() / target.queries.sum()
    assert uniform.item() == pytest.approx(0.0503, abs=0.004)


def test_rows_are_counted_from_0_again():
    stimulus, cpu = build(sequences=6), torch.device("cpu")
    part = stimulus.rows(2, 5, cpu)
    again = repeated_from(stimulus.tokens[2:5], stimulus.period[2:5], lead=1)
    assert torch.equal(part.tokens, again.tokens)
    assert torch.equal(part.period, again.period)
    for name, target in part.targets.items():
        if name == "other_period":
            # That of a sequence which may be in another part.
            continue
        found = torch.stack([target.sequence, target.query, target.key])
        expected = again.targets[name]
        expected = torch.stack([expected.sequence, expected.query, expected.key])
        assert torch.equal(found.unique(dim=1), expected.unique(dim=1))
        assert torch.equal(target.queries, again.targets[name].queries)


def test_each_sequence_lends_its_period_once_to_one_of_another():
    stimulus = build()
    target, lent = stimulus.targets["other_period"], []
    for sequence, period in enumerate(stimulus.period.tolist()):
        of = target.sequence == sequence
        back = (target.query - target.key)[of].unique() + 1
        assert (back % period != 0).all()
        lent.append(int(back.min()))
        assert (back % lent[-1] == 0).all()
    assert sorted(lent) == sorted(stimulus.period.tolist())


def test_too_short_a_context_is_refused():
    with pytest.raises(ValueError, match=r"context=15 is too short .* expected at least 16"):
        build(context=15)


def test_too_small_a_vocabulary_is_refused():
    message = r"vocab_size=8 is too small for blocks of 8 .* at least 9, or pass a smaller context="
    with pytest.raises(ValueError, match=message):
        build(vocab_size=8)
    assert build(vocab_size=9).period.eq(8).all()


def test_text_and_its_tail():
    whole = text_stimulus(text())
    tail = text_tail(whole)
    assert torch.equal(tail.tokens, text()[:, 48:])
    for stimulus in (whole, tail):
        assert stimulus.period.eq(NO_PERIOD).all()
    target = whole.targets["previous_token"]
    assert torch.equal(target.key, target.query - 1)
    assert target.queries.eq(CONTEXT - 1).all()


def test_windows_are_spread_over_all_the_text():
    tokens = torch.arange(4 * 100).view(4, 100)
    every = windows(tokens, context=30, sequences=99)
    assert every.tolist() == [
        list(range(row * 100 + start, row * 100 + start + 30))
        for row in range(4)
        for start in (0, 30, 60)
    ]
    some = windows(tokens, context=30, sequences=3)
    assert some[:, 0].tolist() == [0, 200, 360]
    one = windows(tokens, context=30, sequences=1)
    assert one.shape == (1, 30)
    some[:] = -1
    assert tokens.min() == 0


def test_stimuli_survive_being_stored():
    whole = text_stimulus(text())
    stimuli = {"repeated": build(), "text": whole, "text_tail": text_tail(whole)}
    table = stimuli_to_arrow(stimuli)
    assert table.schema.equals(STIMULI, check_metadata=True)
    assert table.num_rows == 32 + 6 + 6
    back = stimuli_from_arrow(table)
    assert list(back) == list(stimuli)
    for name, stimulus in stimuli.items():
        again = back[name]
        assert torch.equal(again.tokens, stimulus.tokens)
        assert torch.equal(again.period, stimulus.period)
        assert (again.name, again.lead, again.entropy) == (name, stimulus.lead, stimulus.entropy)
        assert again.targets.keys() == stimulus.targets.keys()
        for target, expected in zip(again.targets.values(), stimulus.targets.values(), strict=True):
            assert torch.equal(target.key, expected.key)
            assert torch.equal(target.queries, expected.queries)


def test_stimuli_without_text_survive_too():
    assert list(stimuli_from_arrow(stimuli_to_arrow({"repeated": build()}))) == ["repeated"]


@pytest.mark.parametrize("positions", [CONTEXT - 1, 1])
def test_text_shorter_than_a_window_is_refused(positions):
    message = rf"sequences of {positions} positions; .*context=64: pass longer .* smaller context="
    with pytest.raises(ValueError, match=message):
        windows(text()[:, :positions], context=CONTEXT, sequences=3)


DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_token_ids_of_every_integer_type_are_taken(dtype):
    for vocab_size in (VOCABULARY, None):
        checked = check_text(text().to(dtype), vocab_size=vocab_size)
        assert checked.dtype == torch.int64
        assert torch.equal(checked, text())


@pytest.mark.parametrize(
    ("given", "error", "got"),
    [
        ("some words", TypeError, "got str"),
        ([[1, 2], [3, 4]], TypeError, "got list"),
        (text().numpy(), TypeError, "got ndarray"),
        (text().float(), TypeError, r"got shape \[6, 64\], dtype torch.float32: pass token ids"),
        (text() > 5, TypeError, "dtype torch.bool: pass token ids"),
        (text()[0], ValueError, r"got shape \[64\], dtype torch.int64: reshape it"),
        (text()[None], ValueError, r"got shape \[1, 6, 64\], dtype torch.int64: reshape it"),
        (text()[:0], ValueError, r"got shape \[0, 64\], dtype torch.int64: reshape it"),
        (text()[:, :0], ValueError, r"got shape \[6, 0\], dtype torch.int64: reshape it"),
    ],
    ids=["str", "list", "numpy", "float", "bool", "1-D", "3-D", "no rows", "no positions"],
)
def test_text_that_is_no_batch_of_token_ids(given, error, got):
    expected = r"text= needs token ids as an integer tensor \[sequence, position\]; "
    for vocab_size in (VOCABULARY, None):
        with pytest.raises(error, match=expected + ".*" + got):
            check_text(given, vocab_size=vocab_size)


@pytest.mark.parametrize(
    ("given", "vocab_size", "said"),
    [
        (text() - 1, VOCABULARY, "from -1 to 98; expected 0 to 99: tokenise"),
        (text() - 1, None, "from -1 to 98; expected 0 to the vocabulary size: tokenise"),
        (text() + 1, VOCABULARY, "from 1 to 100; expected 0 to 99: tokenise"),
    ],
)
def test_text_of_another_vocabulary(given, vocab_size, said):
    with pytest.raises(ValueError, match=f"text= has token ids {said}"):
        check_text(given, vocab_size=vocab_size)


def test_labels_survive_being_stored_and_cut():
    values = torch.randint(-1, 2, (2, 5, 16), dtype=torch.int8)
    labels = Labels(
        names=("b", "a"),
        values=values,
        split=torch.tensor([2, 0, 2, 1, 2]),
        length=torch.tensor([16, 16, 3, 16, 16]),
        source=torch.tensor([7, 3, 4, 3, 7]),
    )
    stimulus = labelled_stimulus("concepts", text()[:5, :16], labels)
    back = stimuli_from_arrow(stimuli_to_arrow({"concepts": stimulus}))["concepts"]
    assert torch.equal(back.tokens, stimulus.tokens)
    assert back.labels.names == ("b", "a")
    for name in ("values", "split", "length", "source"):
        assert torch.equal(getattr(back.labels, name), getattr(labels, name))
    assert labels.used[2].nonzero().flatten().tolist() == [1, 2]
    assert torch.equal(stimulus.rows(1, 3, torch.device("cpu")).labels.values, values[:, 1:3])


def test_sources_are_numbered_among_those_that_are_for_the_same():
    labels = Labels(
        names=(),
        values=torch.zeros(0, 6, 16, dtype=torch.int8),
        split=torch.tensor([2, 0, 2, 2, 1, 0]),
        length=torch.full((6,), 16),
        source=torch.tensor([7, 3, 4, 7, 9, 2]),
    )
    assert labels.place.tolist() == [1, 1, 0, 1, 0, 0]
    assert labels.numbered(labels.split != 2).tolist() == [-1, 1, -1, -1, 2, 0]
    fitting = torch.stack([labels.split == 2, labels.split != 2])
    assert labels.sources(fitting).tolist() == [2, 3]


def test_of_runs_that_were_begun_without_sources_each_sequence_is_one():
    found = labelled_stimulus("concepts", text()[:2, :16], _unlabelled(2))
    before = stimuli_to_arrow({"concepts": found}).drop_columns("source")
    assert stimuli_from_arrow(before)["concepts"].labels.source.tolist() == [0, 1]


def _unlabelled(rows):
    return Labels(
        names=(),
        values=torch.zeros(0, rows, 16, dtype=torch.int8),
        split=torch.arange(rows),
        length=torch.full((rows,), 16),
        source=torch.zeros(rows, dtype=torch.int64),
    )


def test_sequences_without_any_concept_can_be_stored():
    stimulus = labelled_stimulus("concepts", text()[:2, :16], _unlabelled(2))
    back = stimuli_from_arrow(stimuli_to_arrow({"concepts": stimulus}))["concepts"]
    assert back.labels.names == ()
    assert back.labels.values.shape == (0, 2, 16)
