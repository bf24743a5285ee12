"""Every sink through the same life: readings of all shapes, failures, nothing at all, other fields
than before, and the end.
"""

import json

import pytest

from monitor import sinks
from monitor.record import Measurement
from monitor.sinks import GrafanaSink, MemorySink, ParquetSink, PrometheusSink
from tests.monitor.sinks.fabricated import HEADS, LOSSES, heads, losses, measurement, moment

SINKS = {
    # Of tables that are none of transitions it sends nothing.
    "GrafanaSink": lambda root: GrafanaSink("http://127.0.0.1:9"),
    "MemorySink": lambda root: MemorySink(),
    "ParquetSink": lambda root: ParquetSink(root / "runs", "r"),
    "PrometheusSink": lambda root: PrometheusSink("r", port=0),
}


def test_every_sink_is_here():
    listed = {name for name in sinks.__all__ if isinstance(getattr(sinks, name), type)}
    assert set(SINKS) | {"Sink"} == listed


@pytest.fixture(params=SINKS)
def sink(request, tmp_path):
    made = SINKS[request.param](tmp_path)
    yield made
    made.close()


def test_the_same_life_cycle(sink):
    sink.write(measurement(0))
    sink.write(measurement(1, failures=["losses", "PrometheusSink"]))
    # Nothing could be measured.
    sink.write(Measurement(moment=moment(2)))
    sink.write(Measurement(moment=moment(3), failures=measurement(3, failures=["x"]).failures))
    # A step again, and one further back.
    sink.write(measurement(3, attempt=2))
    sink.write(measurement(1, attempt=2))
    sink.close()


def test_tables_of_any_shape(sink):
    shapes = [
        heads(moment(0), layers=0, score=[]),
        heads(moment(1), layers=1, heads=1),
        heads(moment(2), layers=3, heads=5),
        heads(moment(3), spec=HEADS.only(["entropy"])),
        heads(moment(4)),
        heads(moment(5), score=[float("nan")] * 4),
        heads(moment(6), validity=["no earlier copy is in view"] * 4),
        losses(moment(7), loss=float("nan")),
    ]
    for reading in shapes:
        sink.write(Measurement(moment=reading.moment, readings=(reading,)))


def test_a_table_of_nothing_but_lists(sink):
    whole = losses(moment(1))
    spec = LOSSES.only(["by_position"])
    reading = type(whole)(
        spec=spec,
        moment=whole.moment,
        table=whole.table.select(spec.schema.names).cast(spec.schema),
    )
    sink.write(Measurement(moment=whole.moment, readings=(reading,)))


def test_what_is_written_is_not_changed(sink):
    given = measurement(1, failures=["x"])
    tables = [reading.table.to_pylist() for reading in given.readings]
    schemas = [reading.table.schema for reading in given.readings]
    sink.write(given)
    assert [reading.table.to_pylist() for reading in given.readings] == tables
    for reading, schema in zip(given.readings, schemas, strict=True):
        assert reading.table.schema.equals(schema, check_metadata=True)
    assert given.seconds == {"heads": 0.5, "losses": 0.25}
    assert len(given.failures) == 1


def test_closing_without_writing_and_twice(sink):
    sink.close()
    sink.close()


def test_text_from_outside_can_be_anything(sink):
    why = 'a "quoted"\nline \\ of \u00e4 text'
    reading = heads(moment(1), validity=["ok", why, "ok", "ok"])
    failures = measurement(1, failures=[json.dumps(why)]).failures
    sink.write(Measurement(moment=reading.moment, readings=(reading,), failures=failures))


def test_memory_gives_back_what_it_got():
    memory = MemorySink()
    memory.write(measurement(2))
    memory.write(measurement(1))
    memory.close()
    assert memory.read("losses")["step"].tolist() == [2, 1]
    assert [m.moment.step for m in memory.measurements] == [2, 1]
    assert memory.read("heads")["score"].round(2).tolist() == pytest.approx([2.01] * 4 + [1.01] * 4)
