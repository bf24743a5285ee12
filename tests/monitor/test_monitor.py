"""Monitor, for plain loops: what it records and serves of one run."""

import json
import socket
import urllib.parse

import pandas as pd
import pytest
import torch
from torch import nn

import monitor
from monitor.measure import Monitor, measure
from monitor.probes import PROBES
from tests.callbacks.tiny import CONTEXT, VOCABULARY, TinyLM, text
from tests.recorded import attempt, scrape, steps, stimulus


def test_a_run_is_recorded(tmp_path, model, start):
    one = start(tmp_path)
    for step in (0, 10, 20):
        given = one.measure(model, step=step, tokens=step * 100)
        assert given.failures == ()
    one.close()
    assert monitor.tables(tmp_path) == ["attempts", "in_context", "induction", "stimuli"]
    assert steps(tmp_path) == [0, 10, 20]
    heads = monitor.read(tmp_path, "induction")
    assert heads[["step", "layer", "head"]].values.tolist() == [
        [step, layer, head] for step in (0, 10, 20) for layer in (0, 1) for head in (0, 1)
    ]
    assert heads["tokens"].tolist() == [0] * 4 + [1000] * 4 + [2000] * 4
    assert set(heads["validity"]) == {"ok"}
    assert set(heads["attempt"]) == {1}
    assert heads["time"].is_monotonic_increasing


def test_what_is_recorded_is_what_measure_gives(tmp_path, model, start):
    one = start(tmp_path, seed=3)
    given = one.measure(model, step=7)
    expected = measure(model, text=text(), sequences=4, seed=3)
    for table in ("induction", "in_context"):
        stored = monitor.read(tmp_path, table)
        pd.testing.assert_frame_equal(stored[expected[table].columns], expected[table])
        assert given.frame(table)["step"].tolist() == stored["step"].tolist()


def test_the_model_is_left_as_it_was(tmp_path, start):
    torch.manual_seed(0)
    model = TinyLM(dropout=0.5).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    start(tmp_path).measure(model, step=0)
    assert model.training
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_attempt_says_what_it_ran_with(tmp_path, model, start):
    one = start(tmp_path, seed=5, config={"learning_rate": 1e-3, "path": tmp_path})
    one.measure(model, step=0)
    row = attempt(tmp_path)
    assert (row["run"], row["attempt"], row["seed"]) == ("r", 1, 5)
    assert row["parameters"] == sum(p.numel() for p in model.parameters())
    assert row["host"]
    assert json.loads(row["versions"])["torch"] == torch.__version__
    config = row["config"]
    assert config["learning_rate"] == 1e-3
    assert config["path"] == str(tmp_path)
    assert config["model"] == "TinyLM"
    assert config["vocab_size"] == VOCABULARY
    assert config["stimuli"]["repeated"] == [4, CONTEXT]
    assert config["stimuli"]["text"] == [4, CONTEXT]
    assert "prefix_matching" in config["probes"]["induction"]


def test_the_stimuli_are_stored(tmp_path, model, start):
    start(tmp_path).measure(model, step=0)
    rows = stimulus(tmp_path, "text")
    whole = text().tolist()
    assert len(rows) == 4
    assert all(row in whole for row in rows)
    stored = monitor.read(tmp_path, "stimuli")
    assert set(stored["stimulus"]) == {"repeated", "text", "text_tail", "concepts"}
    assert len(stored) == 12 + min(7, len(whole))


def test_by_default_a_run_has_a_name_of_its_own_under_runs(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        with Monitor(sequences=2) as one:
            one.measure(model, step=0)
    needs = {probe.spec.name: {on for on, _ in probe.spec.needs} for probe in PROBES}
    of_text = {name for name, its in needs.items() if its & {"concepts", "analogies", "task"}}
    assert "neurons" in of_text
    # Time for ablations is only saved up yet.
    written = {probe.spec.name for probe in PROBES} - of_text - {"ablation", "optimisation"}
    assert monitor.tables("runs") == sorted({"attempts", "stimuli", *written})
    runs = monitor.read("runs", "attempts")
    assert runs["run"].nunique() == 2
    assert runs["attempt"].tolist() == [1, 1]


def test_only_some_fields(tmp_path, model, start):
    one = start(tmp_path, probes=["induction.entropy"])
    one.measure(model, step=0)
    assert monitor.tables(tmp_path) == ["attempts", "induction", "stimuli"]
    frame = monitor.read(tmp_path, "induction")
    assert "entropy_null" in frame
    assert "prefix_matching" not in frame


@pytest.mark.parametrize("field", ["loss_by_position", "score", "repeat_later"])
def test_any_single_field_can_be_recorded_and_served(tmp_path, model, start, field):
    one = start(tmp_path, probes=[f"in_context.{field}"], metrics_port=0)
    assert one.measure(model, step=0).failures == ()
    assert monitor.read(tmp_path, "in_context")[field].notna().all()
    assert scrape(one.url)["phasewatch_step",] == 0


def test_without_text_what_needs_it_is_missing(tmp_path, model, start):
    one = start(tmp_path, text=None)
    assert one.measure(model, step=0).failures == ()
    (row,) = monitor.read(tmp_path, "in_context").to_dict("records")
    assert row["validity"] == "no held-out text"
    assert row["score"] != row["score"]
    assert row["repeat_later"] > 0
    heads = monitor.read(tmp_path, "induction")
    assert heads["previous_token_text"].isna().all()
    assert heads["previous_token"].notna().all()


def test_memory_only(tmp_path, model, start, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = start(None)
    given = one.measure(model, step=4, tokens=9)
    assert len(given.frame("induction")) == 4
    assert (given.moment.run, given.moment.step, given.moment.tokens) == ("r", 4, 9)
    assert one.url is None
    one.close()
    assert list(tmp_path.iterdir()) == []


def test_metrics_are_served_while_it_runs(tmp_path, model, start):
    one = start(tmp_path, metrics_port=0)
    assert one.url is None
    one.prepare(model, 0)
    assert scrape(one.url)["phasewatch_run_info", "1", "TinyLM"] == 1
    given = one.measure(model, step=3, tokens=50)
    page = scrape(one.url)
    assert page["phasewatch_step",] == 3
    assert page["phasewatch_tokens",] == 50
    head = given.frame("induction").iloc[3]
    assert page["phasewatch_induction_prefix_matching", "1", "1"] == head["prefix_matching"]
    assert page["phasewatch_probe_duration_seconds", "induction"] > 0
    port = urllib.parse.urlsplit(one.url).port
    one.close()
    socket.create_server(("127.0.0.1", port)).close()


def test_an_address_that_cannot_be_listened_on_does_not_stop_it(tmp_path, model, start, caplog):
    one = start(tmp_path, metrics_port=0, metrics_address="192.0.2.1")
    one.measure(model, step=0)
    assert one.url is None
    assert "no metrics are served" in caplog.text
    assert steps(tmp_path) == [0]


def test_another_module_of_the_same_model(tmp_path, model, start):
    """A loop may wrap its model after the first measurement, or measure averaged weights."""
    one = start(tmp_path)
    one.measure(model, step=0)
    torch.manual_seed(1)
    other = TinyLM()
    one.measure(other, step=1)
    one.measure(nn.Sequential(model), step=2)
    frame = monitor.read(tmp_path, "in_context").set_index("step")["repeat_later"]
    assert frame[0] == frame[2] != frame[1]
