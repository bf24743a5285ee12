"""`measure` and `Subject`: tables of one model at hand, what is said of bad arguments, and figures
that cannot be interpreted.
"""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from monitor.anatomy import NotALanguageModelError, find_language_model
from monitor.batches import StimulusOptions
from monitor.capture import NoAttentionError
from monitor.measure import measure
from monitor.probes import PROBES, select
from monitor.subject import Subject
from monitor.tasks import ModularAddition
from tests import models
from tests.models import AttentionOnly, Bigram, attend_everywhere
from tests.models.concepts import CONCEPTS, RELATION


@pytest.fixture
def model():
    torch.manual_seed(0)
    return AttentionOnly()


def text(rows: int = 6, positions: int = 64) -> torch.Tensor:
    return torch.randint(64, (rows, positions), generator=torch.Generator().manual_seed(0))


class Unsaid(AttentionOnly):
    """It looks up no position, and so does not say that it reads 100 of them."""

    def __init__(self) -> None:
        super().__init__(context=100)

    def forward(self, tokens):
        residual = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            residual = residual + block(residual)
        return self.unembedding(self.norm(residual))


def test_tables_and_columns(model):
    task = ModularAddition(7, train=[(0, 1), (1, 2)])
    tables = measure(model, text=text(), concepts=[*CONCEPTS, RELATION], task=task)
    # Nobody trains it.
    measured = [probe for probe in PROBES if not probe.spec.training]
    assert list(tables) == [probe.spec.name for probe in measured]
    heads = tables["induction"]
    assert list(zip(heads["layer"], heads["head"], strict=True)) == [
        (layer, head) for layer in range(2) for head in range(4)
    ]
    for probe in measured:
        declared = [column for field in probe.spec.fields for column in field.columns]
        dims = [dim.name for dim in probe.spec.dims]
        table = tables[probe.spec.name]
        assert list(table.columns) == [*dims, *declared, "n", "validity"]
        # Random weights show no circuit, and attention alone has no neurons.
        nothing = {"ablation", "circuit", "sparse_probing", "neurons", "top_neurons"}
        assert table["validity"].eq("ok").all() or probe.spec.name in nothing
    assert heads["n"].eq(16).all()
    (row,) = tables["in_context"].itertuples()
    assert row.n == 6
    assert len(row.loss_by_position) == 63


def test_without_labels_the_tables_of_them_are_there_only_where_they_are_named(model):
    of_labels = {
        "concepts", "directions", "geometry", "analogies", "sparse_probing", "superposition",
        "grokking",
    }  # fmt: skip
    tables = measure(model, text=text())
    of_a_model = {probe.spec.name for probe in PROBES if not probe.spec.training}
    assert of_labels == of_a_model - set(tables)
    for probes in (["concepts"], ["analogies"]):
        (table,) = measure(model, text=text(), probes=probes).values()
        (why,) = table["validity"]
        assert "in concepts=" in why or "pass concepts=" in why
    (table,) = measure(model, text=text(), probes=["grokking"]).values()
    assert table["validity"].tolist() == ["there is no task to look at: pass task="]


def test_without_text_what_needs_it_is_missing(model):
    tables = measure(model)
    assert tables["induction"]["previous_token_text"].isna().all()
    assert tables["induction"]["validity"].eq("ok").all()
    (row,) = tables["in_context"].itertuples()
    assert row.validity == "no held-out text"
    assert math.isnan(row.score)
    assert math.isfinite(row.repeat_later)


def test_it_is_deterministic_and_leaves_the_model_as_it_was(model):
    model.blocks[0].register_module("dropout", nn.Dropout(0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one, two = measure(model, text=text()), measure(model, text=text())
    for name, table in one.items():
        pd.testing.assert_frame_equal(table, two[name])
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_another_seed_draws_other_tokens_within_the_error(model):
    one = measure(model, seed=0, sequences=64)["induction"]
    two = measure(model, seed=1, sequences=64)["induction"]
    assert not np.array_equal(one["prefix_matching"], two["prefix_matching"])
    for field in ("prefix_matching", "first_token", "entropy"):
        error = np.hypot(one[f"{field}_stderr"], two[f"{field}_stderr"])
        assert ((one[field] - two[field]).abs() < 5 * error + 1e-4).all()


def test_more_sequences_give_smaller_errors(model):
    few, many = (measure(model, sequences=n)["induction"] for n in (8, 128))
    assert few["n"].eq(8).all()
    assert many["n"].eq(128).all()
    ratio = few["entropy_stderr"].mean() / many["entropy_stderr"].mean()
    assert 2 < ratio < 8


def test_single_probes_and_fields(model):
    assert list(measure(model, probes=["in_context"])) == ["in_context"]
    tables = measure(model, probes=["induction.entropy", "in_context.repeat_later"])
    assert list(tables["induction"].columns) == [
        "layer",
        "head",
        *("entropy", "entropy_stderr", "entropy_null"),
        "n",
        "validity",
    ]
    full = measure(model)["induction"]
    assert tables["induction"]["entropy"].tolist() == full["entropy"].tolist()
    assert "repeat_first" not in tables["in_context"]


def test_the_context_and_vocabulary_that_are_asked_for(model):
    subject = subject_of(model, context=32)
    assert subject.stimuli["repeated"].tokens.shape == (16, 32)
    assert subject_of(model).stimuli["repeated"].tokens.shape == (16, 64)
    small = measure(model, vocab_size=40)["in_context"]
    assert small["repeat_first_null"][0] == pytest.approx(math.log(40))


def subject_of(module: nn.Module, **options) -> Subject:
    return Subject.new(module, find_language_model(module), PROBES, StimulusOptions(**options))


def test_the_default_context():
    assert subject_of(AttentionOnly(context=1000)).stimuli["repeated"].tokens.shape[1] == 256
    assert subject_of(AttentionOnly(context=40)).stimuli["repeated"].tokens.shape[1] == 40
    shorter = subject_of(AttentionOnly(context=1000), text=text(positions=90))
    assert {s.tokens.shape[1] for n, s in shorter.stimuli.items() if n != "text_tail"} == {90}
    # Rows of training data often hold one token more than is read.
    assert subject_of(Unsaid(), text=text(positions=101)).stimuli["text"].tokens.shape[1] == 100
    assert subject_of(Unsaid(), text=text(positions=100)).stimuli["text"].tokens.shape[1] == 100


def test_a_subject_counts_the_attention_calls(model):
    assert subject_of(model).attention_calls == 2
    chosen = select(["in_context"])
    without = Subject.new(model, find_language_model(model), chosen, StimulusOptions())
    assert without.attention_calls is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"probes": ["inducton"]},
            ValueError,
            "unknown probe: 'inducton'; known: induction, in_context, .*; did you mean 'induction'",
        ),
        (
            {"probes": ["induction.entropi"]},
            ValueError,
            r"unknown field of probe 'induction': 'entropi'; .* did you mean 'entropy'",
        ),
        ({"probes": []}, ValueError, r"expected a list of names such as .*got \[\]"),
        ({"probes": "induction"}, ValueError, "expected a list of names .*got 'induction'"),
        (
            {"context": 65},
            ValueError,
            "context=65 is longer than the 64 positions that AttentionOnly can read: pass at most",
        ),
        ({"context": 15}, ValueError, "context=15 is too short .* at least 16"),
        ({"context": 0}, ValueError, "context=0: expected a whole number of at least 1"),
        ({"context": 32.0}, ValueError, "context=32.0: expected a whole number"),
        ({"sequences": 1}, ValueError, "sequences=1: expected a whole number of at least 2"),
        ({"sequences": True}, ValueError, "sequences=True: expected a whole number"),
        ({"seed": -1}, ValueError, "seed=-1: expected a whole number of at least 0"),
        ({"vocab_size": 65}, ValueError, "vocab_size=65 is larger than .* pass at most 64"),
        ({"vocab_size": 8}, ValueError, "vocab_size=8 is too small"),
        ({"vocab_size": 0}, ValueError, "vocab_size=0"),
        ({"vocab_size": -3}, ValueError, "vocab_size=-3"),
        ({"text": "words"}, TypeError, "text= needs token ids .* got str"),
        ({"text": torch.zeros(4, 64)}, TypeError, "text= needs token ids .*torch.float32"),
        ({"text": text()[0]}, ValueError, r"text= needs token ids .*reshape it"),
        ({"text": text() + 1}, ValueError, "token ids from 1 to 64; expected 0 to 63"),
        ({"text": text(), "vocab_size": 20}, ValueError, "expected 0 to 19"),
        (
            {"text": text(positions=30), "context": 40},
            ValueError,
            "sequences of 30 positions; expected at least context=40",
        ),
        ({"text": text(positions=10)}, ValueError, "10 .*positions|context=10 is too short"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_bad_arguments(model, arguments, error, message):
    with pytest.raises(error, match=message):
        measure(model, **arguments)


def test_what_is_no_language_model():
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module .*; got str"):
        measure("gpt2")
    with pytest.raises(NotALanguageModelError, match="no language model found in Linear"):
        measure(nn.Linear(3, 3))


def test_a_model_that_cannot_read_so_many_positions_says_what_to_pass():
    message = r"Unsaid cannot read \d+ token ids \(RuntimeError: .*\): pass .* context="
    with pytest.raises(ValueError, match=message):
        measure(Unsaid())
    assert measure(Unsaid(), context=100)["induction"]["validity"].eq("ok").all()


def test_a_model_without_attention():
    module = Bigram()
    with pytest.raises(NoAttentionError, match=r"showed no attention.*To go on without: probes="):
        measure(module, context=64)
    with pytest.raises(NoAttentionError):
        measure(module, context=64, probes=["induction"])
    table = measure(module, context=64, probes=["in_context"], text=text())["in_context"]
    assert table["validity"].tolist() == ["ok"]


@pytest.mark.parametrize("kind", models.HUGGING_FACE)
def test_hugging_face_models(kind):
    tables = measure(models.HUGGING_FACE[kind](), text=text() % 48)
    assert len(tables["induction"]) == 8
    assert tables["induction"]["validity"].eq("ok").all()
    assert tables["in_context"]["validity"].eq("ok").all()


def test_a_sliding_window_limits_what_is_uniform():
    wide = measure(models.llama(), context=64)["induction"]
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        sliding_window=12,
        attn_implementation="sdpa",
    )
    narrow = measure(MistralForCausalLM(config), context=64)["induction"]
    assert narrow["validity"].eq("ok").all()
    assert narrow["entropy_null"].max() < math.log(12)
    assert narrow["entropy_null"].max() < wide["entropy_null"].min()
    assert (narrow["first_token_null"] < wide["first_token_null"]).all()
    assert (narrow["entropy"] <= narrow["entropy_null"] + 1e-4).all()


def test_attention_to_later_tokens_is_said():
    tables = measure(AttentionOnly(attend=attend_everywhere), text=text())
    assert tables["induction"]["validity"].eq("attention is not causal").all()
    assert tables["in_context"]["validity"].tolist() == ["ok"]


def in_a_window(query, key, value):
    distance = torch.arange(query.shape[-2])[:, None] - torch.arange(query.shape[-2])
    mask = (distance >= 0) & (distance < 40)
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


@pytest.mark.parametrize("attend", [None, in_a_window], ids=["causal", "window"])
@pytest.mark.parametrize("probes", [None, ["induction.prefix_matching", "in_context.repeat_later"]])
def test_weights_that_are_not_numbers_are_never_ok(attend, probes):
    """A head of NaN looks at nothing: that must not be published as a score of 0."""
    torch.manual_seed(0)
    module = AttentionOnly(attend=attend)
    for weight in module.parameters():
        nn.init.constant_(weight, float("nan"))
    tables = measure(module, text=text(), probes=probes)
    heads, (row,) = tables["induction"], tables["in_context"].itertuples()
    assert heads["validity"].str.contains("is not finite").all()
    assert heads["prefix_matching"].isna().all()
    assert heads["prefix_matching_stderr"].isna().all()
    assert "is not finite" in row.validity
    assert math.isnan(row.repeat_later)


def test_one_head_that_is_not_a_number_leaves_the_others_of_its_layer():
    torch.manual_seed(0)
    module = AttentionOnly(layers=1)
    with torch.no_grad():
        # The first 16 outputs are the queries of head 0.
        module.blocks[0].inputs.weight[:16] = float("nan")
    heads = measure(module, probes=["induction"])["induction"]
    assert ["is not finite" in validity for validity in heads["validity"]] == [
        True,
        False,
        False,
        False,
    ]
    assert math.isnan(heads["prefix_matching"][0])
    assert heads["prefix_matching"][1:].notna().all()


def test_text_of_a_single_window_has_no_error(model):
    tables = measure(model, text=text(rows=1))
    (row,) = tables["in_context"].itertuples()
    assert row.n == 1
    assert math.isfinite(row.score)
    assert math.isnan(row.score_stderr)
    assert tables["induction"]["previous_token_text_stderr"].isna().all()


def test_a_probe_that_fails_is_raised_with_its_traceback(model, monkeypatch):
    from monitor import measure as module
    from monitor.probes import Probe

    def fail(observations):
        raise ZeroDivisionError("on purpose")

    broken = Probe(spec=PROBES[0].spec, compute=fail)
    monkeypatch.setattr(module, "select", lambda names: (broken,))
    message = "probe induction failed: ZeroDivisionError: on purpose"
    with pytest.raises(RuntimeError, match=message):
        measure(model)
