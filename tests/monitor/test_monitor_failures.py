"""What breaks once a monitor has begun (a probe, a sink, the model, the disk) is said once, counted
and recorded, and never raised.
"""

import errno
import os
import shutil
import urllib.request
from dataclasses import replace

import pytest
import torch
from torch import nn

import monitor
from monitor.measure import Monitor
from monitor.sinks import PrometheusSink
from tests.callbacks.tiny import TinyLM
from tests.recorded import said, scrape, steps


def break_probe(one: Monitor, name: str, *, at: int) -> None:
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


def test_a_probe_that_raises_is_said_once_counted_recorded_and_the_others_go_on(
    tmp_path, model, start, caplog
):
    one = start(tmp_path, metrics_port=0)
    break_probe(one, "induction", at=1)
    for step in range(4):
        given = one.measure(model, step=step)
        assert [f.part for f in given.failures] == (["induction"] if step else [])
        assert [r.spec.name for r in given.readings] == ["induction", "in_context"][step > 0 :]
    assert scrape(one.url)["phasewatch_failures_total", "induction"] == 3
    lines = [line for line in said(caplog) if "induction failed" in line]
    assert len(lines) == 1
    assert "ZeroDivisionError: planted" in lines[0]
    assert "Traceback" in lines[0]
    failures = monitor.read(tmp_path, "failures")
    assert failures[["step", "part", "error"]].values.tolist() == [
        [step, "induction", "ZeroDivisionError: planted"] for step in (1, 2, 3)
    ]
    assert failures["traceback"].str.contains("broken").all()
    assert steps(tmp_path) == [0, 1, 2, 3]
    assert steps(tmp_path, "induction") == [0] * 4


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
    assert scrape(one.url)["phasewatch_failures_total", "in_context"] == 2
    failures = monitor.read(tmp_path, "failures")
    assert len(failures) == 4
    assert all("planted in the model" in error for error in failures["error"])
    # Each probe that failed is said.
    assert sum("failed, training goes on" in line for line in said(caplog)) == 2


@pytest.mark.parametrize("later", [nn.Linear(2, 2), None, "model"])
def test_something_that_is_no_model_later(tmp_path, model, start, later):
    one = start(tmp_path, metrics_port=0)
    one.measure(model, step=0)
    assert [f.part for f in one.measure(later, step=1).failures] == ["measure"]
    assert one.measure(model, step=2).failures == ()
    assert steps(tmp_path) == [0, 2]
    assert monitor.read(tmp_path, "failures")["part"].tolist() == ["measure"]
    assert scrape(one.url)["phasewatch_failures_total", "measure"] == 1


@pytest.mark.parametrize("step", [None, "1", 1.5])
def test_a_step_that_is_none_later(tmp_path, model, start, step):
    one = start(tmp_path)
    one.measure(model, step=0)
    assert one.measure(model, step=step).failures


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
    page = scrape(one.url)
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
        assert scrape(one.url)["phasewatch_step",] == step
    monkeypatch.undo()
    one.measure(model, step=3)
    assert steps(tmp_path) == [0, 1, 2, 3]
    assert scrape(one.url)["phasewatch_failures_total", "ParquetSink"] == 2
    # Recorded when it recovers.
    failures = monitor.read(tmp_path, "failures")
    assert failures[["step", "part"]].values.tolist() == [[1, "ParquetSink"], [2, "ParquetSink"]]
    assert sum("No space left" in line for line in said(caplog)) == 1


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
    assert sum("planted in the sink" in line for line in said(caplog)) == 1
    # Recorded like every failure, and counted.
    assert monitor.read(tmp_path, "failures")["part"].tolist() == ["PrometheusSink"] * 2
    assert scrape(one.url)["phasewatch_failures_total", "PrometheusSink"] == 2


def test_closing_never_raises_and_what_is_not_on_disk_is_said(tmp_path, model, start, caplog):
    one = start(tmp_path, metrics_port=0)
    one.measure(model, step=0)
    shutil.rmtree(tmp_path)
    tmp_path.write_text("in the way")
    one.measure(model, step=1)
    caplog.clear()
    one.close()
    assert any("step" in line or "not written" in line for line in said(caplog))
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
