"""From models in which the truth is known, through every probe that is read, to labels and the
circuit: a circuit that was planted, a head that copies by position, and heads that learnt nothing.
"""

import math

import torch

import monitor
from monitor import picture
from monitor.measure import Monitor, measure
from tests.models import AttentionOnly, PlantedCircuit, train

PROBES = ["heads", "circuit"]


def labels(table) -> dict:
    """What is said of each head."""
    words = ["layer", "head", "label", "claim"]
    return {(layer, head): told for layer, head, *told in table[words].to_numpy().tolist()}


def test_a_planted_circuit_is_found_and_its_decoy_is_not_believed():
    """Head 1.1 attends just as the induction head 1.0 does, and is ablated together with it."""
    torch.manual_seed(0)
    tables = measure(PlantedCircuit(context=48, decoy=True), probes=PROBES, context=48)
    told = labels(tables["heads"])
    assert told[0, 0] == ["previous-token", "causal"]
    assert told[1, 0] == ["induction", "causal"]
    assert told[1, 1] == ["induction", "pattern"]
    # Of the idle heads none is taken for one of the circuit's.
    idle = {label for head, (label, _) in told.items() if head not in {(0, 0), (1, 0), (1, 1)}}
    assert not idle & {"previous-token", "induction"}
    circuit = tables["circuit"].set_index(
        ["source_layer", "source_head", "target_layer", "target_head"]
    )
    assert set(circuit["claim"]) == {"induction circuit"}
    # Known: 1/√40.
    assert abs(circuit.loc[(0, 0, 1, 0), "key_composition"] - 40**-0.5) < 1e-3
    assert circuit.loc[(1, 0, -1, -1), "contrast"] > 10
    assert abs(circuit.loc[(1, 1, -1, -1), "contrast"]) < 1e-3


def test_without_ablating_no_cause_is_claimed():
    with Monitor(root=None, probes=PROBES, context=48, metrics_port=None) as watch:
        measured = watch.measure(PlantedCircuit(context=48), step=0, seconds=0.0)
    heads, circuit = (measured.frame(name) for name in PROBES)
    assert labels(heads)[0, 0] == ["previous-token", "attribution"]
    assert labels(heads)[1, 0] == ["induction", "attribution"]
    assert set(heads["causal_test"]) == {"not made"}
    assert set(circuit["claim"]) == {"attribution"}


def test_copying_by_position_is_no_induction():
    """One layer, trained at one period: its head looks back as far, and copies what it finds."""
    torch.manual_seed(0)
    module = AttentionOnly(layers=1, heads=1)
    train(module, (19, 19), steps=200, rate=3e-3)
    tables = measure(module, probes=PROBES, sequences=32)
    assert labels(tables["heads"]) == {(0, 0): ["positional", "pattern"]}
    assert tables["heads"]["eigenvalue_score"][0] > 0.9
    assert tables["circuit"]["kind"].tolist() == ["none"]


def test_heads_that_learnt_nothing_have_no_label():
    torch.manual_seed(0)
    tables = measure(AttentionOnly(), probes=PROBES)
    assert set(map(tuple, labels(tables["heads"]).values())) == {("none", "none")}
    assert tables["circuit"]["validity"][0] == "no head attends as in an induction circuit"


def test_a_run_is_drawn(tmp_path):
    with Monitor(root=tmp_path, run="r", probes=PROBES, context=48, metrics_port=None) as watch:
        watch.measure(PlantedCircuit(context=48), step=7, seconds=math.inf)
    assert "failures" not in monitor.tables(tmp_path)
    edges = picture.circuit_at(tmp_path)
    assert picture.title(edges).startswith("Induction circuit: ablating")
    assert picture.save(edges, tmp_path / "c.svg").stat().st_size > 5_000
