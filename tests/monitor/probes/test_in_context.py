"""`in_context`: its scores from losses that are known, a planted copying circuit, a model that uses
no context, and losses computed token by token.
"""

import math

import pytest
import torch

from monitor.anatomy import find_language_model
from monitor.capture import Observation, observe
from monitor.evidence import Evidence
from monitor.measure import measure
from monitor.probes import in_context
from monitor.stimuli import repeated, repeated_from, text_stimulus, text_tail
from tests.models import AttentionOnly, Bigram, PlantedInduction
from tests.oracles.attention import estimate

CONTEXT = 64


def stimuli(windows: int = 5) -> dict:
    generator = torch.Generator().manual_seed(0)
    text = text_stimulus(torch.randint(64, (windows, CONTEXT), generator=generator))
    return {
        "repeated": repeated(vocab_size=64, sequences=8, context=CONTEXT, bos=None, seed=0),
        "text": text,
        "text_tail": text_tail(text),
    }


def with_losses(**losses) -> dict[str, Observation]:
    """Observations of losses that are given by [position] of each stimulus."""
    return {
        name: Observation(
            stimulus=stimulus,
            vocab_size=64,
            losses=losses[name].expand(len(stimulus.tokens), -1).clone(),
        )
        for name, stimulus in stimuli().items()
        if name in losses
    }


def value(columns: dict, field: str) -> float:
    return float(columns[field][0])


def test_every_field_token_by_token():
    torch.manual_seed(0)
    model = find_language_model(AttentionOnly())
    observations = {name: observe(model, s, losses=True) for name, s in stimuli().items()}
    columns = in_context.compute(Evidence(observations=observations))
    losses = {}
    for name, stimulus in stimuli().items():
        with torch.no_grad():
            surprise = -model.module(stimulus.tokens).double().log_softmax(-1)
        losses[name] = [
            [surprise[row, i, ids[i + 1]].item() for i in range(len(ids) - 1)]
            for row, ids in enumerate(stimulus.tokens.tolist())
        ]
    text, tail = losses["text"], losses["text_tail"]
    guess = math.log(64)

    def over(rows, null):
        return estimate([(sum(row), null * len(row), len(row)) for row in rows])

    repeats = stimuli()["repeated"]
    ids, seen = repeats.tokens.tolist(), losses["repeated"]
    first, later = [], []
    for sequence, period in enumerate(repeats.period.tolist()):
        row = seen[sequence]
        # Position i predicts i + 1: of the first copy, or after a token that has come before.
        first.append([loss for i, loss in enumerate(row) if 1 <= i + 1 <= period])
        again = [i for i in range(len(row)) if ids[sequence][i] in ids[sequence][:i]]
        later.append([row[i] for i in again])
    last = range(CONTEXT - 1 - 4, CONTEXT - 1)
    # The tail holds positions 48 to 63: its last 8 predictions have at least 8 before them.
    both = [
        [row[48 + i] - short[i] for i in range(7, 15)]
        for row, short in zip(text, tail, strict=True)
    ]
    expected = {
        "loss_early": over([row[4:8] for row in text], guess),
        "loss_late": over([[row[i] for i in last] for row in text], guess),
        "score": over(
            [[row[i] - row[j] for i, j in zip(last, range(4, 8), strict=True)] for row in text], 0
        ),
        "paired_score": over(both, 0),
        "repeat_first": over(first, guess),
        "repeat_later": over(later, guess),
    }
    for field, wanted in expected.items():
        found = [value(columns, field + part) for part in ("", "_stderr", "_null")]
        assert found == pytest.approx([wanted.mean, wanted.stderr, wanted.null], abs=1e-5), field
    curve = [sum(column) / len(column) for column in zip(*text, strict=True)]
    assert columns["loss_by_position"][0].tolist() == pytest.approx(curve, abs=1e-5)
    assert columns["n"] == [5]
    assert columns["validity"] == ["ok"]


def test_a_loss_that_falls_in_a_line_gives_its_slope():
    line = 5 - torch.arange(CONTEXT - 1) / 100
    columns = in_context.compute(
        Evidence(
            observations=with_losses(repeated=line, text=line, text_tail=torch.full((15,), 5.0))
        )
    )
    assert value(columns, "loss_early") == pytest.approx(5 - 0.055, abs=1e-5)
    assert value(columns, "loss_late") == pytest.approx(5 - 0.605, abs=1e-5)
    assert value(columns, "score") == pytest.approx(-0.55, abs=1e-5)
    assert value(columns, "paired_score") == pytest.approx(-(0.55 + 0.62) / 2, abs=1e-5)
    assert value(columns, "score_stderr") == pytest.approx(0, abs=1e-6)


def test_the_bands_hold_the_positions_of_olsson_et_al():
    """Tokens 50 and 500 of 512, counted from 1, lie in the second and the last sixteenth."""
    tokens = torch.randint(64, (2, 512))
    text = text_stimulus(tokens)
    curve = torch.zeros(511)
    curve[48], curve[498] = 32.0, 31 * 32.0
    observations = with_losses(repeated=torch.zeros(63))
    observations["text"] = Observation(
        stimulus=text, vocab_size=64, losses=curve.expand(2, -1).clone()
    )
    observations["text_tail"] = Observation(
        stimulus=text_tail(text), vocab_size=64, losses=torch.zeros(2, 127)
    )
    columns = in_context.compute(Evidence(observations=observations))
    assert value(columns, "loss_early") == pytest.approx(1)
    assert value(columns, "loss_late") == pytest.approx(31)


def test_a_planted_circuit_copies():
    """All but the first token of the second copy is certain; that one is one of two."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.stack([torch.randperm(40, generator=generator)[:12] for _ in range(8)])
    stimulus = repeated_from(blocks.repeat(1, 2), torch.full((8,), 12), lead=0)
    model = find_language_model(PlantedInduction(vocab_size=40, context=24, sharpness=20.0))
    columns = in_context.compute(
        Evidence(observations={"repeated": observe(model, stimulus, losses=True)})
    )
    assert value(columns, "repeat_later") == pytest.approx(math.log(2) / 11, abs=1e-4)
    assert value(columns, "repeat_first") > math.log(40)
    assert value(columns, "repeat_later_null") == pytest.approx(math.log(40), abs=1e-6)


def test_a_model_that_uses_no_context_scores_nothing():
    torch.manual_seed(0)
    text = torch.randint(64, (32, CONTEXT))
    row = measure(Bigram(), text=text, context=CONTEXT, probes=["in_context"])["in_context"].iloc[0]
    assert row["paired_score"] == pytest.approx(0, abs=1e-6)
    assert abs(row["score"]) < 4 * row["score_stderr"]
    gap = row["repeat_later"] - row["repeat_first"]
    assert abs(gap) < 4 * (row["repeat_later_stderr"] + row["repeat_first_stderr"])


def test_a_model_that_knows_nothing_guesses():
    model = Bigram()
    torch.nn.init.zeros_(model.unembedding.weight)
    torch.nn.init.zeros_(model.unembedding.bias)
    tables = measure(model, text=torch.randint(64, (4, 64)), probes=["in_context"])
    row = tables["in_context"].iloc[0]
    for field in ("loss_early", "loss_late", "repeat_first", "repeat_later"):
        assert row[field] == pytest.approx(math.log(64), abs=1e-5)
        assert row[f"{field}_null"] == pytest.approx(math.log(64), abs=1e-6)


def test_without_text_only_repeats_are_read():
    columns = in_context.compute(Evidence(observations=with_losses(repeated=torch.ones(63))))
    assert columns["validity"] == ["no held-out text"]
    assert value(columns, "repeat_first") == value(columns, "repeat_later") == 1
    for field in ("score", "score_stderr", "score_null", "loss_early", "loss_by_position"):
        assert columns[field] is None


def test_what_was_not_observed_is_said():
    unseen = Observation(stimulus=stimuli()["repeated"], vocab_size=64)
    with pytest.raises(ValueError, match="in_context needs the losses"):
        in_context.compute(Evidence(observations={"repeated": unseen}))
