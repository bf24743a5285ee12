"""The example of grokking, recorded: with key frequencies that each measurement finds by itself the
restricted loss falls before the held-out accuracy rises; without weight decay neither happens. A
short re-run goes as the recorded one did.
"""

import importlib.util
import math
from pathlib import Path

import pandas as pd
import pytest

from monitor.transitions import fit

EXAMPLES = Path(__file__).parents[1] / "examples"
GUESS = math.log(59)


def recorded(name: str) -> pd.DataFrame:
    return pd.read_csv(EXAMPLES / f"{name}.csv", index_col="step")


@pytest.fixture(scope="module")
def grokked():
    return recorded("grokking")


@pytest.fixture(scope="module")
def remembered():
    return recorded("grokking_without_decay")


def largest(table, series, direction):
    found = [one for one in fit(table.index, table[series]) if one.direction == direction]
    return max(found, key=lambda one: one.height)


def test_what_was_recorded_is_grokking(grokked):
    by_heart = grokked.loc[100]
    assert by_heart["train_accuracy"] == 1
    assert by_heart["held_out_accuracy"] < 0.01
    assert grokked["held_out_accuracy"].iloc[-1] > 0.99
    assert (grokked["validity"] == "ok").all()
    assert grokked["weight_norm"].iloc[-1] < grokked["weight_norm"].iloc[5]


def test_the_restricted_loss_falls_before_held_out_accuracy_rises(grokked):
    """Midpoint before midpoint, by intervals that do not touch; and most of the fall is over before
    the rise begins.
    """
    fall = largest(grokked, "restricted_loss", "down")
    rise = largest(grokked, "held_out_accuracy", "up")
    assert fall.height > 3
    assert rise.height > 0.9
    lead = rise.midpoint - fall.midpoint
    low, high = rise.midpoint_low - fall.midpoint_high, rise.midpoint_high - fall.midpoint_low
    assert 300 < low < lead < high < 500
    assert fall.onset_high < rise.onset_low
    assert fall.end_high < rise.onset_low


def test_the_fall_is_that_of_the_key_frequencies(grokked):
    """As many others at random lower the loss by little; without the key ones it comes back."""
    late = grokked[grokked["held_out_accuracy"] > 0.5]
    beyond = late["restricted_loss_null"] - late["restricted_loss"]
    assert (beyond > 5 * (late["restricted_loss_stderr"] + late["restricted_loss_null_sd"])).all()
    assert (late["restricted_loss_null"] > 0.8 * GUESS).all()
    assert (late["excluded_loss"] > 50 * late["excluded_loss_null"]).all()
    for of in ("logits", "embedding", "unembedding"):
        least = late[f"gini_{of}_null"] + 5 * late[f"gini_{of}_null_sd"]
        assert (late[f"gini_{of}"] > least).all(), of


def test_hindsight_is_a_series_of_its_own(grokked):
    """The key frequencies of the end, named in a second pass, are those of the last measurement;
    before they are others.
    """
    last = grokked.iloc[-1]
    assert last["restricted_loss_named"] == pytest.approx(last["restricted_loss"], rel=1e-4)
    assert last["excluded_loss_named"] == pytest.approx(last["excluded_loss"], rel=1e-4)
    assert grokked["key_frequencies"].nunique() > 10
    apart = (grokked["restricted_loss_named"] - grokked["restricted_loss"]).abs()
    assert apart.loc[300:900].max() > 0.5


def test_without_weight_decay_nothing_of_the_kind_happens(remembered):
    assert (remembered["train_accuracy"].loc[100:] == 1).all()
    assert remembered["held_out_accuracy"].max() < 0.03
    assert remembered["restricted_loss"].min() > GUESS - 0.1
    late = remembered.loc[100:]
    assert (late["excluded_loss"] - late["train_loss"]).abs().max() < 0.01
    assert fit(remembered.index, remembered["held_out_accuracy"]) == []
    assert all(
        one.direction == "up" for one in fit(remembered.index, remembered["restricted_loss"])
    )


@pytest.mark.parametrize(
    ("name", "weight_decay"), [("grokking", 1.0), ("grokking_without_decay", 0.0)]
)
def test_a_short_run_goes_as_the_recorded_one(name, weight_decay, tmp_path):
    found = importlib.util.spec_from_file_location("grokking", EXAMPLES / "grokking.py")
    example = importlib.util.module_from_spec(found)
    found.loader.exec_module(example)
    table = example.train(tmp_path / "runs", steps=60, weight_decay=weight_decay)
    example.write(table, tmp_path / "again.csv")
    again = pd.read_csv(tmp_path / "again.csv", index_col="step")
    expected = recorded(name).loc[:60]
    assert again.columns.tolist() == expected.columns.tolist()
    assert again.index.tolist() == expected.index.tolist() == [0, 20, 40, 60]
    # Processors add up in orders of their own, and what is named depends on the end.
    numbers = expected.select_dtypes("number").filter(regex="^(?!key|.*_named)").columns
    for column in numbers:
        assert again[column].tolist() == pytest.approx(
            expected[column].tolist(), rel=0.02, abs=1e-3
        ), column
