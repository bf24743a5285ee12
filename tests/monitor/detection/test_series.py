"""What is followed through a run: what queries may give, and what is said where they may not."""

import duckdb
import pandas as pd
import pytest

from monitor.detection import SERIES, Series


def connected(**tables):
    connection = duckdb.connect()
    for name, rows in tables.items():
        connection.register(name, pd.DataFrame(rows))
    return connection


HEADS = [
    {
        "step": step,
        "layer": layer,
        "score": score,
        "score_stderr": score / 10,
        "validity": validity,
    }
    for step, layer, score, validity in (
        (3, 0, 0.5, "ok"),
        (3, 1, 0.25, "ok"),
        (1, 0, 0.75, "why not"),
        (1, 1, 0.125, "ok"),
    )
]


def test_the_best_of_the_valid_rows():
    found = Series.best("head", "heads", "score").values(connected(heads=HEADS))
    assert list(found) == [1, 3]
    (first,), (third,) = found.values()
    assert (first.series, first.value) == ("head", 0.125)
    assert third.value == 0.5
    assert (first.stderr, third.stderr) == (0.0125, 0.05)
    assert third.least == 0.1
    bare = Series.best("head", "heads", "score", stderr=False).values(connected(heads=HEADS))
    assert bare[3][0].least == 0


def test_parts_are_series_of_their_own():
    found = Series.best("head", "heads", "score", by="layer").values(connected(heads=HEADS))
    assert {value.series: value.value for value in found[3]} == {"head: 0": 0.5, "head: 1": 0.25}
    assert [value.series for value in found[1]] == ["head: 1"]


def test_a_query_of_the_users_own():
    query = "select step, avg(score) as value from heads group by step"
    found = Series(name="mean", query=query).values(connected(heads=HEADS))
    assert [value.value for value in found[3]] == [0.375]


def test_a_standard_error_of_the_users_own():
    rows = [{"step": 1, "x": 1.0, "e": 0.25}, {"step": 2, "x": 1.0, "e": float("nan")}]
    query = "select step, x as value, e as stderr from t"
    found = Series(name="x", query=query).values(connected(t=rows))
    assert [value.least for (value,) in found.values()] == [0.5, 0]


def test_what_was_not_measured_has_no_value():
    rows = [{"step": 1, "x": None}, {"step": 2, "x": float("nan")}, {"step": 3, "x": 2.0}]
    query = "select step, x as value from t"
    assert list(Series(name="x", query=query).values(connected(t=rows))) == [3]
    assert Series(name="x", query=query).values(connected()) == {}


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("select step, score from heads", "gives step, score; expected step and value"),
        ("select score as value from heads", "gives value; expected step and value"),
        ("select step, score as value, layer from heads", "gives step, value, layer; expected"),
        ("select step, score as value from heads", "several values at step 3; expected one"),
        ("select step, nothing as value from heads", "its query failed: .*nothing"),
        ("selekt", "its query failed"),
    ],
)
def test_queries_of_no_use_are_told_of(query, said):
    with pytest.raises(ValueError, match=f"series 'mine'.*{said}|{said}"):
        Series(name="mine", query=query).values(connected(heads=HEADS))


@pytest.mark.parametrize(
    ("name", "query", "error"),
    [("", "select 1", ValueError), ("a" * 61, "", ValueError), (3, "", TypeError)],
)
def test_names_and_queries_are_checked(name, query, error):
    with pytest.raises(error, match=r"the name of a series|a series has name"):
        Series(name=name, query=query)


def test_what_is_followed_anyway_has_names_of_its_own():
    names = [series.name for series in SERIES]
    assert len({*names}) == len(names)
