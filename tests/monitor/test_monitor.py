"""Monitor, for plain loops: runs and attempts, the same stimuli after a restart, and that whatever
breaks once it has begun (a probe, a sink, the model) is said once, counted and recorded, and never
raised.
"""

import errno
import json
import logging
import os
import shutil
import socket
import urllib.parse
import urllib.request
from dataclasses import replace
from pathlib import Path

import pandas as pd
import prometheus_client.parser
import pytest
import torch
from torch import nn

import monitor
from monitor.anatomy import NotALanguageModelError
from monitor.capture import NoAttentionError
from monitor.measure import Monitor, measure
from monitor.sinks import ParquetSink, PrometheusSink
from tests.callbacks.tiny import CONTEXT, VOCABULARY, TinyLM, text


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TinyLM()


@pytest.fixture
def start():
    """Makes monitors of the run "r" with held-out text, and closes them after the test."""
    made = []

    def start(root, **more):
        made.append(Monitor(root, **({"run": "r", "text": text(), "sequences": 4} | more)))
        return made[-1]

    yield start
    for one in made:
        one.close()


def steps(root: Path, table: str = "in_context") -> list[int]:
    return monitor.read(root, table)["step"].tolist()


def scrape(one: Monitor) -> dict:
    """Values on the metrics page, by name and labels other than the run."""
    with urllib.request.urlopen(f"{one.url}/metrics", timeout=10) as answer:
        page = answer.read().decode()
    return {
        (sample.name, *(v for k, v in sorted(sample.labels.items()) if k != "run")): sample.value
        for family in prometheus_client.parser.text_string_to_metric_families(page)
        for sample in family.samples
    }


def break_probe(one: Monitor, name: str, *, at: int = 0) -> None:
    """Makes a probe raise from its measurement `at` on."""
    calls = []

    def breaking(compute):
        def broken(observations):
            calls.append(1)
            if len(calls) > at:
                raise ZeroDivisionError("planted")
            return compute(observations)

        return broken

    one._probes = tuple(
        replace(p, compute=breaking(p.compute)) if p.spec.name == name else p for p in one._probes
    )


def reports(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "phasewatch"]


# One run


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
    (row,) = monitor.read(tmp_path, "attempts").to_dict("records")
    assert (row["run"], row["attempt"], row["seed"]) == ("r", 1, 5)
    assert row["parameters"] == sum(p.numel() for p in model.parameters())
    assert row["host"]
    assert json.loads(row["versions"])["torch"] == torch.__version__
    config = json.loads(row["config"])
    assert config["learning_rate"] == 1e-3
    assert config["path"] == str(tmp_path)
    assert config["model"] == "TinyLM"
    assert config["vocab_size"] == VOCABULARY
    assert config["stimuli"]["repeated"] == [4, CONTEXT]
    assert config["stimuli"]["text"] == [4, CONTEXT]
    assert "prefix_matching" in config["probes"]["induction"]


def test_the_stimuli_are_stored(tmp_path, model, start):
    start(tmp_path).measure(model, step=0)
    stored = monitor.read(tmp_path, "stimuli")
    rows = stored[stored["stimulus"] == "text"]["token_ids"]
    whole = text().tolist()
    assert len(rows) == 4
    assert all(row.tolist() in whole for row in rows)
    assert set(stored["stimulus"]) == {"repeated", "text", "text_tail"}


def test_a_run_without_a_name_gets_one(tmp_path, model):
    for _ in range(2):
        with Monitor(tmp_path, sequences=2) as one:
            one.measure(model, step=0)
    runs = monitor.read(tmp_path, "attempts")
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
    assert scrape(one)["phasewatch_step",] == 0


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
    assert scrape(one)["phasewatch_run_info", "1", "TinyLM"] == 1
    given = one.measure(model, step=3, tokens=50)
    page = scrape(one)
    assert page["phasewatch_step",] == 3
    assert page["phasewatch_tokens",] == 50
    head = given.frame("induction").iloc[3]
    assert page["phasewatch_induction_prefix_matching", "1", "1"] == head["prefix_matching"]
    assert page["phasewatch_probe_duration_seconds", "induction"] > 0
    port = urllib.parse.urlsplit(one.url).port
    one.close()
    socket.create_server(("127.0.0.1", port)).close()


def test_a_taken_port_does_not_stop_it(tmp_path, model, start, caplog):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        one = start(tmp_path, metrics_port=port)
        one.measure(model, step=0)
        assert scrape(one)["phasewatch_step",] == 0
        assert urllib.parse.urlsplit(one.url).port != port
    assert f"port {port} is taken" in caplog.text


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


# Runs that go on


def test_a_restart_is_an_attempt_and_sets_later_steps_aside(tmp_path, model, start, caplog):
    first = start(tmp_path)
    for step in range(0, 60, 10):
        first.measure(model, step=step, tokens=step)
    first.close()
    second = start(tmp_path, resumed_from=25)
    for step in range(30, 80, 10):
        second.measure(model, step=step, tokens=step)
    assert second.attempt == 2
    frame = monitor.read(tmp_path, "in_context")
    assert frame["step"].tolist() == [0, 10, 20, 30, 40, 50, 60, 70]
    assert frame["attempt"].tolist() == [1, 1, 1, 2, 2, 2, 2, 2]
    attempts = monitor.read(tmp_path, "attempts")
    assert attempts["attempt"].tolist() == [1, 2]
    assert attempts["resumed_from"].fillna(-1).tolist() == [-1, 25]
    assert attempts["started"].is_monotonic_increasing
    aside = sorted(p.name for p in (tmp_path / "_superseded/in_context/run=r").iterdir())
    assert aside == [f"{step:012d}.1.parquet" for step in (30, 40, 50)]
    assert any("6 files of earlier attempts" in line for line in reports(caplog))


def test_without_resumed_from_it_goes_on_just_before_the_first_measurement(tmp_path, model, start):
    first = start(tmp_path)
    for step in range(4):
        first.measure(model, step=step)
    second = start(tmp_path)
    second.measure(model, step=2)
    frame = monitor.read(tmp_path, "in_context")
    assert frame[["step", "attempt"]].values.tolist() == [[0, 1], [1, 1], [2, 2]]


def test_starting_over_under_the_same_name_sets_everything_aside(tmp_path, model, start):
    start(tmp_path, seed=0).measure(model, step=0)
    start(tmp_path, seed=1).measure(model, step=0)
    frame = monitor.read(tmp_path, "in_context")
    assert frame[["step", "attempt"]].values.tolist() == [[0, 2]]
    # With its own stimuli, and the earlier ones are kept too.
    assert len(monitor.read(tmp_path, "stimuli")) == 12
    assert len(list((tmp_path / "_superseded/stimuli/run=r").iterdir())) == 1


def test_the_stimuli_stay_whatever_is_passed_later(tmp_path, model, start, caplog):
    caplog.set_level(logging.INFO, logger="phasewatch")
    first = start(tmp_path, seed=0)
    before = first.measure(model, step=0)
    stored = monitor.read(tmp_path, "stimuli")
    second = start(tmp_path, seed=9, text=text(seed=7), sequences=6, context=16, resumed_from=0)
    after = second.measure(model, step=1)
    now = monitor.read(tmp_path, "stimuli")
    assert now["token_ids"].map(list).tolist() == stored["token_ids"].map(list).tolist()
    assert now["period"].tolist() == stored["period"].tolist()
    # The model is the same, and so are the numbers, to the last bit.
    for table in ("induction", "in_context"):
        columns = before.frame(table).columns.drop(["step", "time", "attempt"])
        assert after.frame(table)[columns].to_json() == before.frame(table)[columns].to_json()
    assert any("goes on with the stimuli stored" in line for line in reports(caplog))


def test_other_runs_are_left_alone(tmp_path, model, start):
    start(tmp_path, run="a").measure(model, step=5)
    start(tmp_path, run="b").measure(model, step=0)
    start(tmp_path, run="b").measure(model, step=0)
    frame = monitor.read(tmp_path, "in_context")
    assert frame[["run", "step", "attempt"]].values.tolist() == [["a", 5, 1], ["b", 0, 2]]


def test_preparing_twice_is_one_attempt(tmp_path, model, start):
    one = start(tmp_path)
    one.prepare(model, 0)
    one.prepare(model, 0)
    one.measure(model, step=0)
    assert len(monitor.read(tmp_path, "attempts")) == 1


# What breaks on the way


def test_a_probe_that_raises_is_said_once_counted_recorded_and_the_others_go_on(
    tmp_path, model, start, caplog
):
    one = start(tmp_path, metrics_port=0)
    break_probe(one, "induction", at=1)
    for step in range(4):
        given = one.measure(model, step=step)
        assert [f.part for f in given.failures] == (["induction"] if step else [])
        assert [r.spec.name for r in given.readings] == ["induction", "in_context"][step > 0 :]
    assert scrape(one)["phasewatch_failures_total", "induction"] == 3
    said = [line for line in reports(caplog) if "induction failed" in line]
    assert len(said) == 1
    assert "ZeroDivisionError: planted" in said[0]
    assert "Traceback" in said[0]
    failures = monitor.read(tmp_path, "failures")
    assert failures[["step", "part", "error"]].values.tolist() == [
        [step, "induction", "ZeroDivisionError: planted"] for step in (1, 2, 3)
    ]
    assert failures["traceback"].str.contains("broken").all()
    assert steps(tmp_path) == [0, 1, 2, 3]
    assert steps(tmp_path, "induction") == [0] * 4


def test_every_probe_that_raises_is_said(tmp_path, model, start, caplog):
    one = start(tmp_path)
    break_probe(one, "induction")
    break_probe(one, "in_context")
    one.measure(model, step=0)
    one.measure(model, step=1)
    assert sum("failed, training goes on" in line for line in reports(caplog)) == 2
    assert len(monitor.read(tmp_path, "failures")) == 4


class Fickle(TinyLM):
    """Breaks when told to."""

    broken = False

    def forward(self, tokens):
        if self.broken:
            raise RuntimeError("planted in the model")
        return super().forward(tokens)


def test_a_model_that_raises_later(tmp_path, start, caplog):
    model, one = Fickle(), start(tmp_path, metrics_port=0)
    one.measure(model, step=0)
    model.broken = True
    for step in (1, 2):
        given = one.measure(model, step=step)
        assert {f.part for f in given.failures} == {"induction", "in_context"}
    model.broken = False
    assert one.measure(model, step=3).failures == ()
    assert steps(tmp_path) == [0, 3]
    assert scrape(one)["phasewatch_failures_total", "in_context"] == 2
    assert all("planted in the model" in e for e in monitor.read(tmp_path, "failures")["error"])
    assert sum("failed, training goes on" in line for line in reports(caplog)) == 2


@pytest.mark.parametrize("later", [nn.Linear(2, 2), None, "model"])
def test_something_that_is_no_model_later(tmp_path, model, start, later):
    one = start(tmp_path, metrics_port=0)
    one.measure(model, step=0)
    assert [f.part for f in one.measure(later, step=1).failures] == ["measure"]
    assert one.measure(model, step=2).failures == ()
    assert steps(tmp_path) == [0, 2]
    assert monitor.read(tmp_path, "failures")["part"].tolist() == ["measure"]
    assert scrape(one)["phasewatch_failures_total", "measure"] == 1


def test_a_model_of_nan(tmp_path, model, start):
    one = start(tmp_path, metrics_port=0)
    one.measure(model, step=0)
    with torch.no_grad():
        model.embedding.weight.fill_(float("nan"))
    assert one.measure(model, step=1).failures == ()
    for table in ("induction", "in_context"):
        frame = monitor.read(tmp_path, table).set_index("step").loc[[1]]
        assert frame["validity"].str.endswith("is not finite").all()
        scores = frame[["entropy"] if table == "induction" else ["score", "repeat_later"]]
        assert scores.isna().all(axis=None)
    page = scrape(one)
    assert page["phasewatch_induction_not_interpretable",] == 4
    assert not [key for key in page if key[0] == "phasewatch_induction_entropy_nats"]


def test_a_disk_that_is_full_for_a_while(tmp_path, model, start, caplog, monkeypatch):
    one = start(tmp_path, metrics_port=0)
    one.measure(model, step=0)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for step in (1, 2):
        given = one.measure(model, step=step)
        assert [f.part for f in given.failures] == ["ParquetSink"]
        assert scrape(one)["phasewatch_step",] == step
    monkeypatch.undo()
    one.measure(model, step=3)
    assert steps(tmp_path) == [0, 1, 2, 3]
    assert scrape(one)["phasewatch_failures_total", "ParquetSink"] == 2
    assert sum("No space left" in line for line in reports(caplog)) == 1


def test_a_sink_that_failed_is_recorded_when_it_recovers(tmp_path, model, start, monkeypatch):
    one = start(tmp_path)
    one.measure(model, step=0)
    monkeypatch.setattr(os, "fsync", lambda _: os.close(-1))
    one.measure(model, step=1)
    monkeypatch.undo()
    one.measure(model, step=2)
    one.close()
    failures = monitor.read(tmp_path, "failures")
    assert failures[["step", "part"]].values.tolist() == [[1, "ParquetSink"]]


def test_a_sink_that_raises_is_recorded_and_the_others_go_on(
    tmp_path, model, start, monkeypatch, caplog
):
    def broken(*_):
        raise RuntimeError("planted in the sink")

    one = start(tmp_path, metrics_port=0)
    one.measure(model, step=0)
    monkeypatch.setattr(PrometheusSink, "_rows", broken)
    for step in (1, 2):
        assert [f.part for f in one.measure(model, step=step).failures] == ["PrometheusSink"]
    monkeypatch.undo()
    one.measure(model, step=3)
    assert steps(tmp_path) == [0, 1, 2, 3]
    assert sum("planted in the sink" in line for line in reports(caplog)) == 1
    # Recorded like every failure, and counted.
    assert monitor.read(tmp_path, "failures")["part"].tolist() == ["PrometheusSink"] * 2
    assert scrape(one)["phasewatch_failures_total", "PrometheusSink"] == 2


def test_closing_never_raises_and_what_is_not_on_disk_is_said(tmp_path, model, start, caplog):
    one = start(tmp_path, metrics_port=0)
    one.measure(model, step=0)
    shutil.rmtree(tmp_path)
    tmp_path.write_text("in the way")
    one.measure(model, step=1)
    caplog.clear()
    one.close()
    assert any("step" in line or "not written" in line for line in reports(caplog))
    with pytest.raises(OSError, match=r"refused|reset"):
        urllib.request.urlopen(f"{one.url}/metrics", timeout=10)
    tmp_path.unlink()
    tmp_path.mkdir()


def test_measuring_after_the_end_does_not_raise(tmp_path, model, start):
    one = start(tmp_path, metrics_port=0)
    one.measure(model, step=0)
    one.close()
    one.measure(model, step=1)
    one.close()
    assert steps(tmp_path) == [0, 1]


@pytest.mark.parametrize("step", [None, "1", 1.5])
def test_a_step_that_is_none_later(tmp_path, model, start, step):
    one = start(tmp_path)
    one.measure(model, step=0)
    assert one.measure(model, step=step).failures


# What is refused


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"run": "../x"}, ValueError, "run name '../x' cannot be used"),
        ({"run": ""}, ValueError, "run name '' cannot be used"),
        ({"probes": ["inductoin"]}, ValueError, "did you mean 'induction'"),
        ({"probes": ["induction.entrpy"]}, ValueError, "did you mean 'entropy'"),
        ({"probes": []}, ValueError, "expected a list of names"),
        ({"probes": "induction"}, ValueError, "expected a list of names"),
        ({"sequences": 1}, ValueError, "sequences=1: expected a whole number of at least 2"),
        ({"sequences": 2.5}, ValueError, "sequences=2.5"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"context": 0}, ValueError, "context=0"),
        ({"text": text()[0]}, ValueError, "reshape it to one sequence a row"),
        ({"text": text()[..., None]}, ValueError, "reshape it to one sequence a row"),
        ({"text": text()[:0]}, ValueError, "sequence a row"),
        ({"text": text().float()}, TypeError, "pass token ids, not embeddings"),
        ({"text": text().tolist()}, TypeError, "needs token ids as an integer tensor"),
        ({"text": text() - VOCABULARY}, ValueError, "token ids from -32 to -1"),
        ({"metrics_port": 70_000}, ValueError, "metrics_port=70000"),
        ({"metrics_port": -1}, ValueError, "metrics_port=-1"),
    ],
)
def test_arguments_that_are_refused_at_once(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        Monitor(tmp_path / "runs", **arguments)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"text": text() + 1}, ValueError, "token ids from 1 to 32; expected 0 to 31"),
        ({"text": text()[:, :24], "context": 32}, ValueError, "smaller context="),
        ({"context": CONTEXT + 1}, ValueError, f"longer than the {CONTEXT} positions"),
        ({"context": 8}, ValueError, "too short"),
        ({"vocab_size": VOCABULARY + 1}, ValueError, "larger than the model's own"),
    ],
)
def test_arguments_that_are_refused_at_the_first_measurement(
    tmp_path, model, start, arguments, error, message
):
    one = start(tmp_path, **arguments, metrics_port=0)
    for _ in range(2):
        with pytest.raises(error, match=message):
            one.measure(model, step=0)
    assert one.url is None
    one.close()
    assert monitor.tables(tmp_path) == []


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (nn.Linear(2, 2), NotALanguageModelError),
        (nn.ModuleList([TinyLM(), TinyLM()]), NotALanguageModelError),
        (nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)), NoAttentionError),
        (None, TypeError),
        (len, TypeError),
    ],
)
def test_models_that_are_refused(tmp_path, start, wrong, error):
    one = start(tmp_path)
    with pytest.raises(error):
        one.measure(wrong, step=0)
    assert monitor.tables(tmp_path) == []


@pytest.mark.parametrize("step", [None, "1", 1.5])
def test_a_first_step_that_is_none(tmp_path, model, start, step):
    with pytest.raises(TypeError):
        start(tmp_path).measure(model, step=step)
    assert monitor.tables(tmp_path) == []


def test_roots_that_are_refused(tmp_path, start):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        start(tmp_path / "file" / "runs")
    (tmp_path / "x.parquet").write_text("")
    with pytest.raises(ValueError, match="did not write"):
        start(tmp_path)


def test_the_default_root(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Monitor(sequences=2) as one:
        one.measure(model, step=0)
    assert monitor.tables("runs") == ["attempts", "in_context", "induction", "stimuli"]


def test_what_is_written_can_be_read_by_the_sink_of_the_next_attempt(tmp_path, model, start):
    one = start(tmp_path)
    one.measure(model, step=0)
    sink = ParquetSink(tmp_path, "r")
    assert sink.next_attempt() == 2
    assert sink.stimuli(0).num_rows == 12
