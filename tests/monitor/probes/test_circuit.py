"""The graph of an induction circuit: its edges, and that it is called so only where it is shown."""

import pytest

from monitor.evidence import Evidence
from monitor.probes import circuit, heads
from tests.monitor.probes.tables import EVEN, INDUCTION, PREVIOUS, evidence

HURTS = {"zero": 1.0, "mean": 0.8}
HARMLESS = {"zero": 0.05, "mean": 0.05}
HEADS = {(0, 0): PREVIOUS, (0, 1): EVEN, (1, 0): INDUCTION, (1, 1): EVEN}
K_EDGE = {((0, 0), (1, 0)): 8.0}
ABLATED = [("induction", "1.0", HURTS), ("previous_token", "0.0", HURTS)]


def drawn(seen=HEADS, **options) -> list[dict]:
    """The rows of the table."""
    given = evidence(seen, **options)
    tables = {**given.tables, "heads": heads.compute(given)}
    columns = circuit.compute(Evidence(observations={}, tables=tables))
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def dims(row: dict) -> tuple:
    return tuple(row[dim.name] for dim in circuit.SPEC.dims)


def test_the_edges_of_a_planted_circuit():
    between, up = drawn(edges=K_EDGE, groups=ABLATED)
    assert dims(between) == (0, 0, 1, 0, "k")
    assert between["key_composition"] == pytest.approx(0.2)
    assert between["key_composition_null"] == pytest.approx(0.12)
    assert between["key_composition_null_sd"] == pytest.approx(0.01)
    assert between["contrast"] is None
    assert dims(up) == (1, 0, -1, -1, "logits")
    assert (up["contrast"], up["contrast_stderr"], up["contrast_null"]) == (3.0, 0.1, 0.0)
    assert up["key_composition"] is None
    for row in (between, up):
        assert (row["claim"], row["causal_test"]) == ("induction circuit", "passed")
        assert (row["n"], row["validity"]) == (16, "ok")


@pytest.mark.parametrize(
    ("options", "claim"),
    [
        ({}, "pattern"),
        ({"edges": K_EDGE}, "attribution"),
        ({"edges": K_EDGE, "groups": [("induction", "1.0", HARMLESS)]}, "attribution"),
        ({"edges": K_EDGE, "groups": [("induction", "1.0", HURTS)]}, "induction circuit"),
        ({"edges": K_EDGE, "groups": [("random 1", "1.0", HURTS)]}, "attribution"),
        ({"edges": {((0, 0), (1, 0)): 2.9}, "groups": ABLATED}, "pattern"),
        ({"edges": {((0, 0), (1, 1)): 8.0}, "groups": ABLATED}, "pattern"),
        ({"without": ("composition", "copying", "attribution"), "groups": ABLATED}, "pattern"),
    ],
)
def test_it_is_called_a_circuit_only_where_all_of_a_path_is_shown(options, claim):
    rows = drawn(**options)
    assert [row["kind"] for row in rows] == ["k", "logits"]
    assert {row["claim"] for row in rows} == {claim}


def test_previous_token_heads_whose_ablation_does_no_harm_are_no_part_of_a_circuit():
    groups = [("induction", "1.0", HURTS), ("previous_token", "0.0", HARMLESS)]
    assert {row["claim"] for row in drawn(edges=K_EDGE, groups=groups)} == {"attribution"}


def test_composition_without_effect_is_no_circuit():
    """Matrices that compose strongly, of heads that never attend so."""
    (row,) = drawn(dict.fromkeys(HEADS, EVEN), edges=K_EDGE, groups=ABLATED)
    assert (row["claim"], row["kind"]) == ("none", "none")


def test_an_induction_head_that_writes_nothing_makes_a_pattern():
    idle = {"prefix_matching": 1.0}
    rows = drawn({**HEADS, (1, 0): idle}, edges=K_EDGE, groups=ABLATED)
    assert {(row["claim"], row["causal_test"]) for row in rows} == {("pattern", "passed")}


def test_heads_that_are_not_in_order_make_no_path():
    seen = {(0, 0): INDUCTION, (0, 1): PREVIOUS, (1, 0): PREVIOUS}
    (row,) = drawn(seen, groups=[("induction", "0.0", HURTS)])
    assert dims(row) == (0, 0, -1, -1, "logits")
    assert row["claim"] == "none"


def test_every_pair_is_an_edge():
    seen = {(0, 0): PREVIOUS, (1, 0): PREVIOUS, (1, 1): INDUCTION, (2, 0): INDUCTION}
    edges = {((0, 0), (1, 1)): 8.0, ((1, 0), (2, 0)): 5.0}
    rows = {dims(row): row["key_composition"] for row in drawn(seen, edges=edges)}
    assert rows == {
        (0, 0, 1, 1, "k"): pytest.approx(0.2),
        (0, 0, 2, 0, "k"): None,
        (1, 0, 2, 0, "k"): pytest.approx(0.17),
        (1, 1, -1, -1, "logits"): None,
        (2, 0, -1, -1, "logits"): None,
    }


def test_the_path_of_which_most_is_shown_names_the_graph():
    seen = {**HEADS, (1, 1): {"prefix_matching": 0.9}}
    rows = drawn(seen, edges=K_EDGE, groups=[("induction", "1.0 1.1", HURTS)])
    assert {row["claim"] for row in rows} == {"induction circuit"}


def test_of_many_heads_those_stay_of_which_most_is_claimed():
    seen = {(0, head): PREVIOUS for head in range(30)}
    seen |= {(1, head): {"prefix_matching": 0.9} for head in range(30)}
    seen |= {(1, head): {"prefix_matching": 0.95} for head in range(15)} | {(1, 29): INDUCTION}
    rows = drawn(seen, edges={((0, 3), (1, 29)): 8.0})
    assert len(rows) == 16 * 16 + 16
    targets = {row["target_head"] for row in rows if row["kind"] == "k"}
    assert targets == {*range(15), 29}
    assert 3 in {row["source_head"] for row in rows}
    assert {row["claim"] for row in rows} == {"attribution"}


def test_without_a_circuit_the_step_stays_visible():
    (row,) = drawn(dict.fromkeys(HEADS, EVEN))
    assert dims(row) == (-1, -1, -1, -1, "none")
    assert row["validity"] == "no head attends as in an induction circuit"
    assert (row["claim"], row["causal_test"], row["n"]) == ("none", "not made", 16)
    assert all(
        row[column] is None for f in circuit.SPEC.fields if f.is_number for column in f.columns
    )


def test_what_is_not_interpretable_stays_so():
    reason = "attention is not causal"
    (row,) = drawn({head: {**INDUCTION, "validity": reason} for head in HEADS})
    assert row["validity"] == reason
    assert (row["claim"], row["causal_test"]) == (None, None)


def test_where_a_head_could_not_be_judged_it_is_not_said_that_there_is_no_circuit():
    reason = "attention is not finite"
    (row,) = drawn({**dict.fromkeys(HEADS, EVEN), (1, 0): {"validity": reason}})
    assert (row["validity"], row["claim"], row["causal_test"]) == (reason, None, None)
    seen = drawn({**HEADS, (1, 1): {"validity": reason}}, edges=K_EDGE, groups=ABLATED)
    assert {row["claim"] for row in seen} == {"induction circuit"}, "what is shown stays shown"
