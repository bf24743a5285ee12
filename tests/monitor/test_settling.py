"""Settling: cosines with the last direction against ones computed by hand, from recorded tables in
which a direction turns by known angles, some could not be fitted, and there are several runs.
"""

import math

import pytest

import monitor
from monitor.probes.concepts import SPEC as CONCEPTS
from monitor.probes.directions import SPEC as DIRECTIONS
from monitor.record import Measurement, Reading
from monitor.sinks import ParquetSink
from tests.monitor.sinks.fabricated import moment, nothing_told


def record(root, run, vectors, halves):
    """A direction and its split half for each step 0, 10, …; None where none could be fitted."""
    sink = ParquetSink(root, run)
    for at, (vector, half) in enumerate(zip(vectors, halves, strict=True)):
        when = moment(10 * at, run=run, tokens=None)
        place = {"layer": [1], "concept": ["comment"], "method": ["logistic"], "n": [16]}
        place["validity"] = ["ok" if vector else "too few tokens"]
        told = [
            Reading.build(spec, when, {**nothing_told(spec), **place, **column})
            for spec, column in (
                (DIRECTIONS, {"vector": [vector]}),
                (CONCEPTS, {"split_half": [half]}),
            )
        ]
        sink.write(Measurement(moment=when, readings=tuple(told)))


def turned(degrees, length):
    angle = math.radians(degrees)
    return [length * math.cos(angle), length * math.sin(angle)]


def test_cosines_are_those_with_the_last_direction_beside_what_noise_leaves(tmp_path):
    vectors = [turned(180, 1), turned(60, 5), turned(20, 0.1), turned(0, 3)]
    record(tmp_path, "a", vectors, [-0.2, 0.5, 0.8, 0.8])
    told = monitor.settling(tmp_path)
    assert told["step"].tolist() == [0, 10, 20, 30]
    cosines = [-1, 0.5, math.cos(math.radians(20)), 1]
    assert told["cosine"].tolist() == pytest.approx(cosines, abs=1e-6)
    # Of all the tokens the cosine to expect is 2r / (1 + r): 0, 2/3, 8/9 and 8/9.
    nulls = [0, math.sqrt(2 / 3 * 8 / 9), 8 / 9, 8 / 9]
    assert told["cosine_null"].tolist() == pytest.approx(nulls, abs=1e-6)
    assert set(told[["run", "layer", "concept", "method"]].itertuples(index=False, name=None)) == {
        ("a", 1, "comment", "logistic")
    }


def test_what_could_not_be_fitted_is_left_out_and_runs_are_kept_apart(tmp_path):
    record(tmp_path, "a", [None, turned(90, 1), turned(0, 1)], [None, 0.5, 0.5])
    record(tmp_path, "b", [turned(0, 2), None], [0.5, None])
    told = monitor.settling(tmp_path).set_index(["run", "step"])["cosine"]
    assert told.index.tolist() == [("a", 10), ("a", 20), ("b", 0)]
    assert told.tolist() == pytest.approx([0, 1, 1], abs=1e-6)
    assert monitor.settling(tmp_path, "b")["run"].unique().tolist() == ["b"]


def test_a_run_without_any_direction_has_no_rows(tmp_path):
    record(tmp_path, "a", [None], [None])
    told = monitor.settling(tmp_path)
    assert told.empty
    assert list(told) == ["run", "layer", "concept", "method", "step", "cosine", "cosine_null"]


def test_a_root_without_directions_is_told_so(tmp_path):
    with pytest.raises(ValueError, match=r"table in .*'directions'"):
        monitor.settling(tmp_path)
