"""What the demo tells of concepts, from tables that were made up: no more than they show."""

import pytest

from monitor.demo import story
from monitor.probes.concepts import SPEC as CONCEPTS
from monitor.probes.directions import SPEC as DIRECTIONS
from monitor.record import Measurement, Reading
from monitor.sinks import ParquetSink
from tests.monitor.sinks.fabricated import moment, nothing_told

TURNED = ([1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [0.0, 1.0])


def told(root, areas, vectors=TURNED):
    """Of one concept whose area had a standard error of 0.05 on 16 sequences at every step."""
    sink = ParquetSink(root, "r")
    place = {"layer": [0], "concept": ["function_name"], "method": ["diff_in_means"]}
    shared = {**place, "n": [16], "validity": ["ok"]}
    for at, (area, vector) in enumerate(zip(areas, vectors, strict=False)):
        when = moment(40 * at, tokens=None)
        scores = {"auc": [area], "auc_stderr": [0.05], "auc_null": [0.5], "split_half": [0.9]}
        readings = [
            Reading.build(spec, when, {**nothing_told(spec), **shared, **columns})
            for spec, columns in ((CONCEPTS, scores), (DIRECTIONS, {"vector": [vector]}))
        ]
        sink.write(Measurement(moment=when, readings=tuple(readings)))
    return story._directions(root, "r")


def test_a_concept_beyond_chance_is_read_off_and_settles_where_it_no_longer_turns(tmp_path):
    readable, settled = told(tmp_path, [0.5, 0.7, 0.8, 0.9])
    assert readable.endswith("function name 0.90 ± 0.11 (0.50 at step 0).")
    assert settled.endswith("at the end: function name since step 40.")


@pytest.mark.parametrize("area", [0.47, 0.60])
def test_of_a_concept_that_may_be_chance_nothing_else_is_told(tmp_path, area):
    (sentence,) = told(tmp_path, [0.5, 0.7, 0.8, area])
    assert sentence.startswith(f"Not to be told from chance: function name {area:.2f} ± 0.11")


def test_a_single_measurement_settles_nothing(tmp_path):
    (readable,) = told(tmp_path, [0.9])
    assert "can be read off" in readable
