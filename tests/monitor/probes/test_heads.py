"""Labels of heads and the claims on them: every rule and its edges against an oracle that looks
numbers up one at a time, and heads that look like what they are not.
"""

import math
import random

import pytest
from scipy.stats import norm, t

from monitor.probes import heads
from tests.monitor.probes.tables import EVEN, INDUCTION, NULL, PREVIOUS, SEQUENCES, STDERR, evidence
from tests.oracles.labels import label_and_claim

HURTS = {"zero": 1.0, "mean": 0.8}
HARMLESS = {"zero": 0.05, "mean": 0.05}
CIRCUIT = {(0, 0): PREVIOUS, (0, 1): EVEN, (1, 0): INDUCTION, (1, 1): EVEN}
K_EDGE = {((0, 0), (1, 0)): 8.0}


def told(*args, **options) -> dict:
    """The rows of the table, by head."""
    columns = heads.compute(evidence(*args, **options))
    assert {len(values) for values in columns.values()} == {len(args[0])}
    return {
        (row["layer"], row["head"]): row
        for row in (
            dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
        )
    }


def one(**seen) -> dict:
    """The row of the one head of a model of which this was seen."""
    return told({(0, 0): seen})[0, 0]


# Labels


@pytest.mark.parametrize(
    ("score", "label"),
    [
        ("prefix_matching", "induction"),
        ("previous_token", "previous-token"),
        ("duplicate_token", "duplicate-token"),
        ("first_token", "sink"),
        ("same_offset", "positional"),
    ],
)
def test_each_pattern_has_its_label(score, label):
    row = one(**{score: 0.6})
    assert (row["label"], row["claim"]) == (label, "pattern")
    assert row["excess"] == pytest.approx((0.6 - NULL) / (1 - NULL))
    assert row["excess_stderr"] == pytest.approx(STDERR / (1 - NULL))
    assert row["excess_null"] == 0


def test_even_attention_has_no_label():
    row = one()
    assert (row["label"], row["claim"]) == ("none", "none")
    assert row["excess"] == 0
    assert (row["attribution_test"], row["causal_test"]) == ("no rule", "not made")


def test_the_largest_excess_names_the_head():
    assert one(prefix_matching=0.5, first_token=0.4)["label"] == "induction"
    assert one(prefix_matching=0.4, first_token=0.5)["label"] == "sink"


def test_a_tenth_of_what_it_could_be_is_the_least():
    least = NULL + 0.1 * (1 - NULL)
    assert one(first_token=least + 1e-4, first_token_stderr=1e-4)["label"] == "sink"
    assert one(first_token=least - 1e-4, first_token_stderr=1e-4)["label"] == "none"


def test_noise_has_no_label():
    """Three standard deviations, as Student's t has them for as many sequences."""
    bound = t.isf(norm.sf(3), SEQUENCES - 1) * 0.1
    assert 0.358 < bound < 0.36, "not 0.3"
    assert one(prefix_matching=NULL + bound + 1e-3, prefix_matching_stderr=0.1)["label"] != "none"
    assert one(prefix_matching=NULL + bound - 1e-3, prefix_matching_stderr=0.1)["label"] == "none"


def test_where_every_head_would_attend_so_it_means_nothing():
    """A window of one key: uniform attention is all there, too."""
    assert one(previous_token=1.0, previous_token_null=1.0)["label"] == "none"


@pytest.mark.parametrize("field", ["prefix_matching", "prefix_matching_stderr"])
def test_what_is_not_finite_is_no_evidence(field):
    assert one(**{"prefix_matching": 0.9, field: math.nan})["label"] == "none"


def test_a_head_that_copies_by_position_is_positional_and_never_induction():
    row = one(same_offset=0.95, prefix_matching=0.09, eigenvalue_score=0.99, contrast=0.6)
    assert (row["label"], row["claim"]) == ("positional", "pattern")


def test_copying_without_induction_is_no_induction():
    row = one(eigenvalue_score=1.0, contrast=5.0)
    assert (row["label"], row["claim"]) == ("none", "none")
    assert (row["eigenvalue_score"], row["contrast"]) == (1.0, 5.0), "the evidence stays"


def test_a_previous_token_head_is_not_called_positional():
    """It always attends equally far back; that offset has a name of its own."""
    assert one(previous_token=0.9, same_offset=0.95)["label"] == "previous-token"
    assert one(previous_token=0.3, same_offset=0.6)["label"] == "positional"


SUPPRESSING = {"eigenvalue_score": -0.5, "contrast": -1.0}


@pytest.mark.parametrize("score", ["prefix_matching", "duplicate_token"])
def test_copy_suppression(score):
    row = one(**{score: 0.5, "first_token": 0.6}, **SUPPRESSING)
    assert (row["label"], row["claim"]) == ("copy-suppressing", "attribution")
    assert row["excess"] == pytest.approx((0.5 - NULL) / (1 - NULL))


@pytest.mark.parametrize(
    "seen",
    [
        {"eigenvalue_score": -0.29},
        {"contrast": -0.1},
        {"eigenvalue_score": 0.5},
        {"contrast": 1.0},
        {"duplicate_token": 0.1},
        {"eigenvalue_score": None},
    ],
)
def test_without_any_part_of_it_there_is_no_copy_suppression(seen):
    assert one(**{"duplicate_token": 0.5} | SUPPRESSING)["label"] == "copy-suppressing"
    assert one(**{"duplicate_token": 0.5} | SUPPRESSING | seen)["label"] != "copy-suppressing"


# Claims


def test_a_circuit_whose_ablation_hurts_is_causal():
    groups = [("induction", "1.0", HURTS), ("previous_token", "0.0", HURTS)]
    rows = told(CIRCUIT, edges=K_EDGE, groups=groups)
    assert [row["claim"] for row in rows.values()] == ["causal", "none", "causal", "none"]
    assert [row["label"] for row in rows.values()] == [
        "previous-token",
        "none",
        "induction",
        "none",
    ]
    assert rows[1, 0]["over_random"] == pytest.approx(0.8), "of the two ablations what says less"
    assert rows[1, 0]["ablated_with"] == "1.0"
    assert rows[0, 0]["key_composition"] == pytest.approx(0.2)
    assert rows[0, 0]["key_composition_null"] == pytest.approx(0.12)


def test_a_perfect_pattern_without_effect_stays_a_pattern():
    """Its group even passes, thanks to another head: by itself it writes nothing."""
    groups = [("induction", "1.0 1.1", HURTS)]
    idle = {"prefix_matching": 1.0, "eigenvalue_score": 0.0, "contrast": 0.0}
    rows = told({**CIRCUIT, (1, 1): idle}, edges=K_EDGE, groups=groups)
    row = rows[1, 1]
    assert (row["label"], row["claim"]) == ("induction", "pattern")
    assert (row["attribution_test"], row["causal_test"]) == ("failed", "passed")
    assert rows[1, 0]["claim"] == "causal"


def test_what_writes_right_without_an_effect_stays_attribution():
    row = told(CIRCUIT, edges=K_EDGE, groups=[("induction", "1.0", HARMLESS)])[1, 0]
    assert (row["claim"], row["causal_test"]) == ("attribution", "failed")


@pytest.mark.parametrize("lacking", ["zero", "mean"])
def test_both_ablations_must_be_made_and_hurt(lacking):
    once = {name: value for name, value in HURTS.items() if name != lacking}
    row = told(CIRCUIT, edges=K_EDGE, groups=[("induction", "1.0", once)])[1, 0]
    assert (row["claim"], row["causal_test"]) == ("attribution", "not made")
    row = told(CIRCUIT, edges=K_EDGE, groups=[("induction", "1.0", HURTS | {lacking: 0.1})])[1, 0]
    assert (row["claim"], row["causal_test"]) == ("attribution", "failed")


@pytest.mark.parametrize("lacking", ["zero", "mean"])
def test_an_effect_that_is_not_finite_is_none(lacking):
    groups = [("induction", "1.0", HURTS | {lacking: math.nan})]
    assert told(CIRCUIT, edges=K_EDGE, groups=groups)[1, 0]["causal_test"] == "failed"


def test_a_behaviour_without_a_causal_rule_is_not_tested():
    rows = told({(0, 0): {"first_token": 0.9}}, groups=[("head", "0.0", HURTS)])
    assert (rows[0, 0]["label"], rows[0, 0]["causal_test"]) == ("sink", "not made")


def test_only_the_groups_of_its_own_behaviour_test_a_head():
    others = [("random 1", "1.0", HURTS), ("previous_token", "1.0", HURTS)]
    row = told(CIRCUIT, edges=K_EDGE, groups=others)[1, 0]
    assert (row["claim"], row["causal_test"], row["over_random"]) == (
        "attribution",
        "not made",
        None,
    )


def test_single_heads_do_not_decide():
    """Heads stand in for each other; and of many that are tried alone some pass by chance."""
    both = {**CIRCUIT, (1, 1): INDUCTION}
    groups = [("induction", "1.0 1.1", HURTS), ("head", "1.0", HARMLESS)]
    assert told(both, edges=K_EDGE, groups=groups)[1, 0]["claim"] == "causal"
    groups = [("induction", "1.0 1.1", HARMLESS), ("head", "1.0", HURTS)]
    assert told(both, edges=K_EDGE, groups=groups)[1, 0]["claim"] == "attribution"
    alone = told(both, edges=K_EDGE, groups=[("induction", "1.0", HURTS), ("head", "1.1", HURTS)])
    assert alone[1, 1]["causal_test"] == "not made"


def test_names_of_heads_are_not_mixed_up():
    assert told(CIRCUIT, groups=[("induction", "11.0", HURTS)])[1, 0]["causal_test"] == "not made"


def test_patterns_kept_is_another_question():
    groups = [("induction", "1.0", HARMLESS | {"mean_patterns_kept": 9.0})]
    assert told(CIRCUIT, groups=groups)[1, 0]["causal_test"] == "failed"


@pytest.mark.parametrize("edges", [{}, {((0, 0), (1, 0)): 2.9}, {((0, 0), (1, 1)): 8.0}])
def test_a_previous_token_head_must_compose_with_an_induction_head(edges):
    row = told(CIRCUIT, edges=edges, groups=[("previous_token", "0.0", HURTS)])[0, 0]
    assert (row["label"], row["claim"], row["causal_test"]) == (
        "previous-token",
        "pattern",
        "passed",
    )
    assert row["attribution_test"] == ("failed" if 2.9 in edges.values() else "not made")


def test_the_strongest_of_its_edges_counts():
    edges = {((0, 0), (1, 0)): 5.0, ((0, 0), (1, 1)): 9.0, ((0, 0), (2, 0)): 7.0}
    row = told({**CIRCUIT, (2, 0): INDUCTION}, edges=edges)[0, 0]
    assert row["key_composition"] == pytest.approx(0.19)


# What is missing


def test_without_the_other_tables_there_is_the_pattern():
    rows = told(CIRCUIT, without=("copying", "attribution", "composition"))
    assert rows[1, 0]["claim"] == rows[0, 0]["claim"] == "pattern"
    assert rows[1, 0]["attribution_test"] == "not made"
    for field in ("eigenvalue_score", "contrast", "key_composition", "over_random"):
        assert all(row[field] is None for row in rows.values())


def test_columns_that_were_not_measured_are_no_evidence():
    seen = evidence(CIRCUIT)
    seen.tables["attribution"]["contrast"] = None
    seen.tables["induction"]["same_offset"] = None
    columns = heads.compute(seen)
    assert columns["claim"] == ["pattern", "none", "pattern", "none"]
    assert columns["same_offset"] == [None] * 4


def test_where_nothing_could_be_ablated_nothing_is_tested():
    seen = evidence(CIRCUIT, groups=[("induction", "1.0", HURTS)])
    whole = seen.tables["ablation"]
    whole["validity"] = ["no mixed values were found"] * 2
    assert heads.compute(seen)["causal_test"] == ["not made"] * 4
    whole |= {"heads": None, "over_random": None, "over_random_stderr": None}
    assert heads.compute(seen)["causal_test"] == ["not made"] * 4


def test_what_is_not_interpretable_stays_so():
    reason = "attention is not causal"
    row = one(**INDUCTION, validity=reason)
    assert row["validity"] == reason
    assert {row[word] for word in ("label", "claim", "attribution_test", "causal_test")} == {None}
    assert row["prefix_matching"] is None


# Against the oracle


@pytest.mark.parametrize("seed", range(20))
def test_random_tables_against_the_oracle(seed):
    """Numbers near every bound, in every combination."""
    draw = random.Random(seed)
    several = [(layer, head) for layer in range(3) for head in range(4)]
    seen = {
        head: {
            "prefix_matching": draw.choice([0.05, 0.13, 0.16, 0.6]),
            "previous_token": draw.choice([0.05, 0.05, 0.3, 0.7]),
            "duplicate_token": draw.choice([0.05, 0.2]),
            "first_token": draw.choice([0.05, 0.4]),
            "same_offset": draw.choice([0.05, 0.75]),
            "prefix_matching_stderr": draw.choice([0.01, 0.2]),
            "eigenvalue_score": draw.choice([None, -0.9, -0.29, 0.29, 0.31, 0.9]),
            "contrast": draw.choice([-1.0, -0.2, 0.2, 0.25, 1.0]),
        }
        for head in several
    }
    edges = {
        (source, target): draw.choice([1.0, 2.9, 3.1, 9.0])
        for source in several
        for target in several
        if source[0] < target[0] and draw.random() < 0.5
    }
    names = [f"{layer}.{head}" for layer, head in several]
    ablated = [(name, " ".join(draw.sample(names, 6))) for name in ("induction", "previous_token")]
    ablated += [("head", name) for name in draw.sample(names, 4)]
    groups = [(*group, {name: draw.choice([0.1, 0.5]) for name in HURTS}) for group in ablated]
    given = evidence(seen, edges=edges, groups=groups)
    columns = heads.compute(given)
    found = list(zip(columns["label"], columns["claim"], strict=True))
    assert found == [label_and_claim(given.tables, *head) for head in several]
