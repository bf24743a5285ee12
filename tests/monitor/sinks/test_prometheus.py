"""What is on the page of metrics: names, values and labels, and what is left out."""

import numpy as np
import prometheus_client.openmetrics.parser
import pytest

from monitor.record import Dim, Field, Measurement, ProbeSpec, Reading
from tests.monitor.sinks.fabricated import START, heads, losses, measurement, moment
from tests.monitor.sinks.scraped import families, value, values
from tests.recorded import get


def test_names_help_and_units_come_from_the_declaration(make):
    sink = make()
    sink.write(measurement(5))
    found = families(sink)
    assert found["phasewatch_heads_score"].documentation == "A made-up score. Nobody 2024."
    assert found["phasewatch_heads_score"].type == "gauge"
    assert "chance alone" in found["phasewatch_heads_score_null"].documentation
    assert "Standard error of score" in found["phasewatch_heads_score_stderr"].documentation
    assert found["phasewatch_heads_entropy_nats"].documentation.startswith("A made-up entropy.")
    # Entropy has no standard error and no null.
    assert {
        name for name in found if name.startswith(("phasewatch_heads", "phasewatch_losses"))
    } == {
        "phasewatch_heads_not_interpretable",
        "phasewatch_heads_score",
        "phasewatch_heads_score_stderr",
        "phasewatch_heads_score_null",
        "phasewatch_heads_score_layer_max",
        "phasewatch_heads_score_layer_mean",
        "phasewatch_heads_entropy_nats",
        "phasewatch_heads_entropy_layer_max_nats",
        "phasewatch_heads_entropy_layer_mean_nats",
        "phasewatch_losses_not_interpretable",
        "phasewatch_losses_loss_nats",
        "phasewatch_losses_loss_stderr_nats",
    }


def test_every_head_has_its_value(make):
    sink = make()
    when = moment(5)
    sink.write(Measurement(moment=when, readings=(heads(when, score=[0.1, 0.2, 0.3, 0.4]),)))
    by_head = values(sink, "phasewatch_heads_score", "run", "layer", "head")
    # Stored as 32-bit floats, and shown as they are stored.
    assert by_head == {
        ("r", "0", "0"): float(np.float32(0.1)),
        ("r", "0", "1"): float(np.float32(0.2)),
        ("r", "1", "0"): float(np.float32(0.3)),
        ("r", "1", "1"): float(np.float32(0.4)),
    }
    assert set(values(sink, "phasewatch_heads_score_null", "layer", "head").values()) == {0.25}
    assert set(values(sink, "phasewatch_heads_score_stderr", "layer", "head").values()) == {0.125}
    assert values(sink, "phasewatch_heads_entropy_nats", "layer", "head")["1", "1"] == 0.375
    assert values(sink, "phasewatch_heads_score_layer_max", "run", "layer") == {
        ("r", "0"): float(np.float32(0.2)),
        ("r", "1"): float(np.float32(0.4)),
    }
    mean = values(sink, "phasewatch_heads_score_layer_mean", "layer")
    assert mean == {("0",): pytest.approx(0.15), ("1",): pytest.approx(0.35)}


def test_a_table_without_dimensions_has_one_series_a_column(make):
    sink = make("mine")
    when = moment(5, run="mine")
    sink.write(Measurement(moment=when, readings=(losses(when, loss=2.5),)))
    assert values(sink, "phasewatch_losses_loss_nats", "run") == {("mine",): 2.5}
    assert values(sink, "phasewatch_losses_loss_stderr_nats", "run") == {("mine",): 0.5}


def test_other_dimensions_become_labels(make):
    spec = ProbeSpec(
        name="concepts",
        help="h",
        source="s",
        dims=(Dim(name="concept", help="c"),),
        fields=(Field(name="score", help="h", stderr=False),),
        needs=(),
    )
    columns = {"concept": [3, 5], "score": [0.5, 0.25], "n": [1, 1], "validity": ["ok", "ok"]}
    sink = make()
    when = moment(1)
    sink.write(Measurement(moment=when, readings=(Reading.build(spec, when, columns),)))
    assert values(sink, "phasewatch_concepts_score", "concept") == {("3",): 0.5, ("5",): 0.25}
    assert not values(sink, "phasewatch_concepts_score_layer_max")


def test_rows_that_are_not_interpretable_are_counted_and_not_exposed(make):
    sink = make()
    when = moment(5)
    validity = ["ok", "attention is not causal", "ok", "no earlier copy is in view"]
    reading = heads(when, score=[0.1, 0.9, float("nan"), 0.9], validity=validity)
    sink.write(Measurement(moment=when, readings=(reading,)))
    assert set(values(sink, "phasewatch_heads_score", "layer", "head")) == {("0", "0")}
    assert set(values(sink, "phasewatch_heads_entropy_nats", "layer", "head")) == {("0", "0")}
    assert set(values(sink, "phasewatch_heads_score_layer_max", "layer")) == {("0",)}
    assert value(sink, "phasewatch_heads_not_interpretable") == 3
    text, _ = get(f"{sink.url}/metrics")
    assert "NaN" not in text


def test_numbers_survive_the_page(make):
    """Very small, very large and negative numbers are read back as they were."""
    sink = make()
    when = moment(2**31, tokens=10**15)
    given = np.array([1e-30, 3e38, -1.5, 0.0], dtype=np.float32)
    sink.write(Measurement(moment=when, readings=(heads(when, score=given),)))
    shown = values(sink, "phasewatch_heads_score", "layer", "head")
    assert list(shown.values()) == given.astype(float).tolist()
    assert value(sink, "phasewatch_step") == 2**31
    assert value(sink, "phasewatch_tokens") == 10**15


def test_the_page_says_when_and_what(make):
    sink = make("mine", info={"model": 'Tiny"LM"', "attempt": "2"})
    sink.write(measurement(5, run="mine"))
    assert value(sink, "phasewatch_step") == 5
    assert value(sink, "phasewatch_tokens") == 500
    measured = START.timestamp() + 5
    assert value(sink, "phasewatch_last_measurement_timestamp_seconds") == pytest.approx(measured)
    info = values(sink, "phasewatch_run_info", "run", "model", "attempt")
    assert info == {("mine", 'Tiny"LM"', "2"): 1.0}
    seconds = values(sink, "phasewatch_probe_duration_seconds", "run", "probe")
    assert seconds == {("mine", "heads"): 0.5, ("mine", "losses"): 0.25}


def test_before_the_first_measurement_the_page_says_who_is_there(make):
    sink = make("mine")
    assert values(sink, "phasewatch_run_info", "run") == {("mine",): 1.0}
    assert values(sink, "phasewatch_series_dropped_total", "run") == {("mine",): 0.0}
    assert not values(sink, "phasewatch_step")


def test_an_unknown_number_of_tokens_is_not_shown_as_0(make):
    sink = make()
    sink.write(Measurement(moment=moment(5, tokens=None)))
    assert not values(sink, "phasewatch_tokens")


def test_a_measurement_replaces_the_one_before(make):
    sink = make()
    sink.write(measurement(1))
    sink.write(measurement(2, attempt=2))
    assert set(values(sink, "phasewatch_heads_score", "layer", "head").values()) == {
        float(np.float32(2.02))
    }
    assert value(sink, "phasewatch_step") == 2
    # A probe that failed this time must not show the values of last time.
    sink.write(Measurement(moment=moment(3)))
    assert not values(sink, "phasewatch_heads_score", "layer", "head")


def test_failures_are_counted_by_part(make):
    sink = make()
    for step in range(3):
        sink.write(measurement(step, failures=["heads", "ParquetSink"] if step else ["heads"]))
    failures = values(sink, "phasewatch_failures_total", "run", "part")
    assert failures == {("r", "heads"): 3.0, ("r", "ParquetSink"): 2.0}
    assert families(sink)["phasewatch_failures"].type == "counter"


def test_openmetrics_for_those_who_ask_for_it(make):
    sink = make()
    sink.write(measurement(5, failures=["heads"]))
    text, kind = get(f"{sink.url}/metrics", "application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text; version=1.0.0; charset=utf-8")
    assert text.endswith("# EOF\n")
    parsed = prometheus_client.openmetrics.parser.text_string_to_metric_families(text)
    samples = {sample.name: sample.value for family in parsed for sample in family.samples}
    assert samples["phasewatch_step"] == 5
    assert samples["phasewatch_failures_total"] == 1
    # As Prometheus itself asks, and then as a browser does.
    _, kind = get(
        f"{sink.url}/metrics",
        "application/openmetrics-text;version=1.0.0;q=0.8,text/plain;version=0.0.4;q=0.7,*/*;q=0.1",
    )
    assert kind.startswith("application/openmetrics-text")
    _, kind = get(f"{sink.url}/metrics", "text/html,*/*")
    assert kind == "text/plain; version=0.0.4; charset=utf-8"


def test_step_is_never_a_label(make):
    sink = make()
    sink.write(measurement(5))
    labels = {label for f in families(sink).values() for s in f.samples for label in s.labels}
    assert labels == {"run", "layer", "head", "probe"}
