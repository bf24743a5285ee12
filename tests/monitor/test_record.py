"""What is written: declarations are checked when they are made, the Arrow schema follows from them,
rows that cannot be interpreted say so, and names that a user chooses are refused with what to do.
"""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest

from monitor.names import check_run_name, expect_one_of
from monitor.record import (
    ATTEMPTS,
    FAILURES,
    HEAD,
    LAYER,
    METADATA_KEY,
    STIMULI,
    Dim,
    Field,
    Measurement,
    ProbeSpec,
    Reading,
    dims_of,
    is_ours,
)
from tests.monitor.sinks.fabricated import HEADS, LOSSES, START, failure, heads, losses, moment

SCORE = Field(name="score", help="A score.")


def spec(**changes) -> ProbeSpec:
    given = {"name": "p", "help": "h", "source": "s", "dims": (), "fields": (SCORE,), "needs": ()}
    return ProbeSpec(**given | changes)


# Declarations


@pytest.mark.parametrize("name", ["", "Score", "1st", "_x", "a-b", "a b", "a.b", "ä", "a\n"])
def test_names_are_identifiers(name):
    with pytest.raises(ValueError, match="lower case letters, digits and underscores"):
        Field(name=name, help="")
    with pytest.raises(ValueError, match="dimension name"):
        Dim(name=name, help="")
    with pytest.raises(ValueError, match="probe name"):
        spec(name=name)


@pytest.mark.parametrize("more", [{"stderr": True}, {"stderr": False, "null": "chance"}])
def test_a_field_per_position_has_no_stderr_and_no_null(more):
    with pytest.raises(ValueError, match="'f' is per position"):
        Field(name="f", help="", per="position", **more)


@pytest.mark.parametrize(
    "changes",
    [
        {"fields": ()},
        {"fields": (SCORE, SCORE)},
        {"dims": (LAYER, LAYER)},
        {"dims": (Dim(name="score", help=""),)},
        {"fields": (SCORE, Field(name="score_stderr", help=""))},
        {"fields": (dataclasses.replace(SCORE, null="x"), Field(name="score_null", help=""))},
    ],
)
def test_a_probe_has_fields_and_distinct_columns(changes):
    with pytest.raises(ValueError, match="at least one field and distinct columns"):
        spec(**changes)


@pytest.mark.parametrize("taken", ["run", "step", "tokens", "time", "attempt", "n", "validity"])
@pytest.mark.parametrize("place", ["field", "dimension"])
def test_no_column_is_declared_twice_even_those_that_every_table_has(taken, place):
    declared = {
        "field": {"fields": (Field(name=taken, help=""),)},
        "dimension": {"dims": (Dim(name=taken, help=""),)},
    }
    with pytest.raises(ValueError, match=taken):
        spec(**declared[place])


def test_declarations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SCORE.name = "other"
    with pytest.raises(dataclasses.FrozenInstanceError):
        HEADS.name = "other"


def test_the_columns_of_a_field():
    assert Field(name="f", help="").columns == ("f", "f_stderr")
    assert Field(name="f", help="", null="x").columns == ("f", "f_stderr", "f_null")
    assert Field(name="f", help="", stderr=False).columns == ("f",)


def test_metric_names_carry_table_column_and_unit():
    assert HEADS.metric("score") == "phasewatch_heads_score"
    assert HEADS.metric("score_null") == "phasewatch_heads_score_null"
    assert HEADS.metric("entropy") == "phasewatch_heads_entropy_nats"
    assert HEADS.metric("entropy", "_layer_max") == "phasewatch_heads_entropy_layer_max_nats"
    assert HEADS.field("entropy").unit == "nats"


def test_only_some_fields_of_a_probe():
    one = HEADS.only(["entropy"])
    assert [field.name for field in one.fields] == ["entropy"]
    assert (one.name, one.dims, one.needs) == (HEADS.name, HEADS.dims, HEADS.needs)
    with pytest.raises(ValueError, match=r"field of probe 'heads': 'entrpy'.*mean 'entropy'\?"):
        HEADS.only(["score", "entrpy"])


# Schemas


def test_the_schema_of_a_table_follows_its_declaration():
    schema = HEADS.schema
    assert dict(zip(schema.names, schema.types, strict=True)) == {
        "step": pa.int64(),
        "tokens": pa.int64(),
        "time": pa.timestamp("us", tz="UTC"),
        "attempt": pa.int32(),
        "layer": pa.int32(),
        "head": pa.int32(),
        "score": pa.float32(),
        "score_stderr": pa.float32(),
        "score_null": pa.float32(),
        "entropy": pa.float32(),
        "n": pa.int32(),
        "validity": pa.string(),
    }
    assert schema.names[:4] == ["step", "tokens", "time", "attempt"]
    assert schema.names[-2:] == ["n", "validity"]
    assert LOSSES.schema.field("by_position").type == pa.list_(pa.float32())


def test_the_metadata_holds_the_whole_declaration():
    declared = json.loads(HEADS.schema.metadata[METADATA_KEY])
    assert declared["format"] == 1
    assert declared["table"] == "heads"
    probe = declared["probe"]
    assert probe == json.loads(json.dumps(dataclasses.asdict(HEADS)))
    assert probe["fields"][0]["null"] == "chance alone"
    assert probe["source"] == "Nobody 2024"


def test_dims_and_origin_are_read_from_the_metadata():
    assert dims_of(HEADS.schema) == ["layer", "head"]
    assert dims_of(LOSSES.schema) == dims_of(ATTEMPTS) == dims_of(FAILURES) == []
    assert all(map(is_ours, (HEADS.schema, ATTEMPTS, FAILURES, STIMULI)))
    somebody_elses = pa.schema([("layer", pa.int32())], metadata={b"pandas": b"{}"})
    assert not is_ours(somebody_elses)
    assert not is_ours(somebody_elses.remove_metadata())
    assert dims_of(somebody_elses) == []


# Readings


def test_a_reading_holds_its_moment_in_every_row():
    when = moment(7, run="mine", attempt=3, tokens=900)
    reading = heads(when, layers=2, heads=3, score=np.arange(6))
    assert reading.table.schema.equals(HEADS.schema, check_metadata=True)
    rows = reading.table.to_pylist()
    assert [(r["layer"], r["head"], r["score"]) for r in rows] == [
        (0, 0, 0.0), (0, 1, 1.0), (0, 2, 2.0), (1, 0, 3.0), (1, 1, 4.0), (1, 2, 5.0),
    ]  # fmt: skip
    for row in rows:
        assert (row["step"], row["attempt"], row["tokens"]) == (7, 3, 900)
        assert row["time"] == when.time
        assert row["time"].utcoffset().total_seconds() == 0
        assert (row["n"], row["validity"]) == (16, "ok")
    # The run is the folder's name, and not a column besides.
    assert "run" not in reading.table.column_names


def test_an_unknown_number_of_tokens_is_null():
    assert heads(moment(7, tokens=None)).table["tokens"].null_count == 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_null_and_its_row_is_not_interpretable(bad):
    reading = heads(moment(1), score=[0.5, bad, 0.25, 0.75])
    assert reading.table["score"].to_pylist() == [0.5, None, 0.25, 0.75]
    assert reading.table["validity"].to_pylist() == ["ok", "score is not finite", "ok", "ok"]
    # The rest of the row stays.
    assert reading.table["entropy"].to_pylist() == [0.0, 0.125, 0.25, 0.375]


def test_a_reason_that_the_probe_gave_is_not_replaced():
    why = ["ok", "attention is not causal", "ok", "ok"]
    reading = heads(moment(1), score=[0.5, float("nan"), 0.25, 0.75], validity=why)
    assert reading.table["validity"].to_pylist() == why
    assert reading.table["score"].to_pylist()[1] is None


def test_a_standard_error_that_is_not_finite_leaves_its_row_interpretable():
    columns = {
        "loss": [1.0],
        "loss_stderr": [float("nan")],
        "by_position": None,
        "n": [1],
        "validity": ["ok"],
    }
    (row,) = Reading.build(LOSSES, moment(1), columns).table.to_pylist()
    assert row["loss_stderr"] is None
    assert (row["loss"], row["validity"]) == (1.0, "ok")


def test_what_could_not_be_measured_is_null_of_the_right_type():
    columns = {"loss": None, "loss_stderr": None, "by_position": None, "n": [4]}
    table = Reading.build(LOSSES, moment(1), columns | {"validity": ["no text"]}).table
    assert table.schema.equals(LOSSES.schema)
    (row,) = table.to_pylist()
    assert row["loss"] is row["loss_stderr"] is row["by_position"] is None
    assert (row["n"], row["validity"]) == (4, "no text")


def test_missing_numbers_inside_a_list_are_null():
    columns = {"loss": [1.0], "loss_stderr": [0.5], "n": [4], "validity": ["ok"]}
    by_position = np.array([[1.0, np.nan, np.inf]])
    table = Reading.build(LOSSES, moment(1), columns | {"by_position": by_position}).table
    assert table["by_position"].to_pylist() == [[1.0, None, None]]


def test_fields_that_the_declaration_leaves_out_are_dropped():
    reading = heads(moment(1), spec=HEADS.only(["entropy"]), score=[np.nan] * 4)
    assert "score" not in reading.table.column_names
    assert "score_null" not in reading.table.column_names
    # And they cannot make a row invalid.
    assert reading.table["validity"].to_pylist() == ["ok"] * 4


def test_a_declared_column_that_the_probe_did_not_give_is_an_error():
    with pytest.raises(KeyError, match="score"):
        Reading.build(HEADS, moment(1), {"validity": ["ok"], "n": [1], "layer": [0], "head": [0]})


def test_columns_are_not_changed():
    score, validity = np.array([0.5, np.nan]), ["ok", "ok"]
    heads(moment(1), layers=1, score=score, validity=validity)
    assert validity == ["ok", "ok"]
    assert score[0] == 0.5
    assert np.isnan(score[1])


def test_a_table_may_have_no_rows():
    reading = heads(moment(1), layers=0, score=[])
    assert reading.table.num_rows == 0
    assert reading.table.schema.equals(HEADS.schema)


# Failures and measurements


def test_a_failure_says_what_and_where():
    broken = failure("heads")
    assert broken.part == "heads"
    assert broken.error == "RuntimeError: heads is broken"
    assert "raise RuntimeError" in broken.traceback
    assert "fabricated.py" in broken.traceback


def test_failures_become_rows():
    when = moment(9, attempt=2, tokens=None)
    measurement = Measurement(moment=when).with_failure(failure("heads"))
    measurement = measurement.with_failure(failure("losses"))
    table = measurement.failure_table()
    assert table.schema.equals(FAILURES, check_metadata=True)
    rows = table.to_pylist()
    assert [row["part"] for row in rows] == ["heads", "losses"]
    assert {(row["step"], row["attempt"], row["tokens"]) for row in rows} == {(9, 2, None)}
    assert rows[0]["time"] == START.replace(second=18)


def test_with_failure_leaves_the_measurement_as_it_was():
    measurement = Measurement(moment=moment(1))
    assert len(measurement.with_failure(failure("x")).failures) == 1
    assert measurement.failures == ()


def test_one_table_of_a_measurement_as_a_frame():
    when = moment(1)
    measurement = Measurement(moment=when, readings=(heads(when), losses(when)))
    assert measurement.frame("heads")["head"].tolist() == [0, 1, 0, 1]
    assert measurement.frame("losses")["loss"].tolist() == [2.5]
    with pytest.raises(ValueError, match=r"unknown table of this measurement: 'head'.*'heads'\?"):
        measurement.frame("head")


# Names


@pytest.mark.parametrize(
    "run", ["a", "0", "20240506", "2024-05-06", "a.b", "A_b-c.d", "1e5", "a.."]
)
def test_run_names(run):
    assert check_run_name(run) == run


@pytest.mark.parametrize(
    "run",
    ["", ".", "..", "../x", "a/b", "a\\b", ".hidden", "-x", "_x", "a b", "a=b", "läufer", "a\n",
     "\u0661", "a\x00", "run*", "a:b", "%41"],
)  # fmt: skip
def test_run_names_that_cannot_name_a_folder_and_a_label(run):
    with pytest.raises(ValueError, match=r"run name .* cannot be used: expected letters") as raised:
        check_run_name(run)
    assert repr(run) in str(raised.value)
    assert "run=" in str(raised.value)


def test_a_run_name_longer_than_a_folder_name_may_be():
    with pytest.raises(ValueError, match="run name"):
        check_run_name("a" * 300)


def test_unknown_names_are_answered_with_the_known_ones_and_the_nearest():
    expect_one_of("fruit", "apple", ["apple", "pear"])
    with pytest.raises(ValueError, match="unknown fruit: 'appel'; known: apple, pear;") as raised:
        expect_one_of("fruit", "appel", ["apple", "pear"])
    assert str(raised.value).endswith("did you mean 'apple'?")
    with pytest.raises(ValueError, match=r"known: apple, pear$"):
        expect_one_of("fruit", "zzz", ["apple", "pear"])


def test_heads_are_counted_from_the_embedding():
    assert (LAYER.name, HEAD.name) == ("layer", "head")
