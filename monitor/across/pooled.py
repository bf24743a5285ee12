"""How universal what formed is: in how many runs, when, with what spread, and in which order."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import numpy as np
import pandas as pd

from monitor.names import expect_one_of

Axis = Literal["step", "tokens"]

# Steps of runs whose steps take in so different numbers of tokens are not the same thing.
_ALIKE = 1.1
_QUARTILES_FROM = 4

_UNIVERSALITY = {
    "event": "object",
    "formed": "Int64",
    "runs": "Int64",
    "share": "float64",
    "share_low": "float64",
    "share_high": "float64",
    "unknown": "Int64",
    "axis": "object",
    "timed": "Int64",
    "median": "float64",
    "quartile_low": "float64",
    "quartile_high": "float64",
    "least": "float64",
    "most": "float64",
    "resolution": "float64",
    "watched": "float64",
    "validity": "object",
}
_LEADS = {
    "first": "object",
    "then": "object",
    "runs": "Int64",
    "before": "Int64",
    "after": "Int64",
    "unclear": "Int64",
    "axis": "object",
    "timed": "Int64",
    "median": "float64",
    "least": "float64",
    "most": "float64",
    "resolution": "float64",
    "validity": "object",
}


def universality(formations: pd.DataFrame, axis: Axis = "step") -> pd.DataFrame:
    """In how many runs each event happened, and when: a row for each event.

    `formed` of `runs` runs formed it, which is `share` with an exact 95% interval (Clopper and
    Pearson), as if the runs were drawn at random; of `unknown` more nothing can be said. `median`,
    quartiles (of four runs or more), `least` and `most` are those of the `timed` runs that formed
    it and for which it is known when; they say nothing of runs that have not formed it, which were
    watched until `watched` at least. `resolution` is the widest gap between measurements in which
    it formed.

    What cannot be put on the axis is not pooled, and `validity` says why.

    Args:
        formations: what `formations` found, or some of its rows.
        axis: `step` or `tokens`.

    Raises:
        ValueError: there is no such axis.
    """
    expect_one_of("axis", axis, ["step", "tokens"])
    rows = [
        {"event": event, "axis": axis, **_event(of_event, axis)}
        for event, of_event in formations.groupby("event", sort=False)
    ]
    return pd.DataFrame(rows, columns=list(_UNIVERSALITY)).astype(_UNIVERSALITY)


def leads(formations: pd.DataFrame, axis: Axis = "step") -> pd.DataFrame:
    """In which order events happened: a row for each event and the next in the table's order.

    Of the `runs` in which both happened, `first` came surely before `then` in `before`, surely
    after it in `after`, and in `unclear` both fell between the same measurements. `median`, `least`
    and `most` are of the lead of `first` in the `timed` runs, below 0 where it came later;
    `resolution` is how far a lead may be off for the gaps between measurements. What is compared is
    when each was seen: the event whose number has the larger standard error is seen later.

    Args:
        formations: what `formations` found, or some of its rows.
        axis: `step` or `tokens`.

    Raises:
        ValueError: there is no such axis.
    """
    expect_one_of("axis", axis, ["step", "tokens"])
    events = list(dict.fromkeys(formations["event"]))
    rows = [
        {"first": first, "then": then, "axis": axis, **_lead(formations, first, then, axis)}
        for first, then in itertools.pairwise(events)
    ]
    return pd.DataFrame(rows, columns=list(_LEADS)).astype(_LEADS)


def _event(rows: pd.DataFrame, axis: Axis) -> dict[str, Any]:
    known = rows[rows["formed"].notna()]
    formed = known[known["formed"].astype(bool)]
    pooled: dict[str, Any] = {"formed": len(formed), "runs": len(known)}
    pooled["unknown"] = len(rows) - len(known)
    if not len(known):
        return pooled | {"timed": 0, "validity": rows["validity"].iloc[0]}
    pooled["share"] = len(formed) / len(known)
    pooled["share_low"], pooled["share_high"] = exact_interval(len(formed), len(known))
    validity = _validity(known, formed, axis)
    if validity != "ok":
        return pooled | {"timed": 0, "validity": validity}
    ends = _numbers(known[~known["formed"].astype(bool)], f"{axis}_last")
    if np.isfinite(ends).any():
        pooled["watched"] = np.nanmin(ends)
    when = _numbers(formed, axis)
    timed = np.isfinite(when)
    return pooled | _spread(when[timed], _gap(formed, axis)[timed]) | {"validity": "ok"}


def _lead(formations: pd.DataFrame, first: str, then: str, axis: Axis) -> dict[str, Any]:
    formed = formations[formations["formed"].fillna(False).astype(bool)].set_index("run")
    one, other = (formed[formed["event"] == event] for event in (first, then))
    both = one.index.intersection(other.index, sort=False)
    one, other = one.loc[both], other.loc[both]
    # The order is one of measurements, which have steps where tokens were not counted.
    before = _numbers(one, "step_by") <= _numbers(other, "step_after")
    after = _numbers(other, "step_by") <= _numbers(one, "step_after")
    pooled: dict[str, Any] = {"runs": len(both), "before": before.sum(), "after": after.sum()}
    pooled["unclear"] = len(both) - before.sum() - after.sum()
    validity = _validity(one, one, axis) if len(both) else "no run formed both"
    if validity != "ok":
        return pooled | {"timed": 0, "validity": validity}
    lead = _numbers(other, axis) - _numbers(one, axis)
    gaps = np.maximum(_gap(one, axis), _gap(other, axis))
    timed = np.isfinite(lead)
    spread = _spread(lead[timed], gaps[timed])
    kept = {name: value for name, value in spread.items() if name in _LEADS}
    return pooled | kept | {"validity": "ok"}


def exact_interval(count: int, of: int) -> tuple[float, float]:
    """Clopper and Pearson's, of 95%."""
    # Here, so that reading a table need not wait for scipy.
    from scipy.special import betaincinv

    low = betaincinv(count, of - count + 1, 0.025) if count else 0.0
    high = betaincinv(count + 1, of - count, 0.975) if count < of else 1.0
    return float(low), float(high)


def _spread(when: np.ndarray[Any, Any], gaps: np.ndarray[Any, Any]) -> dict[str, Any]:
    spread: dict[str, Any] = {"timed": len(when)}
    if len(when):
        spread |= {"median": np.median(when), "least": when.min(), "most": when.max()}
        spread["resolution"] = gaps.max()
    if len(when) >= _QUARTILES_FROM:
        low, high = np.quantile(when, [0.25, 0.75])
        spread |= {"quartile_low": low, "quartile_high": high}
    return spread


def _validity(known: pd.DataFrame, formed: pd.DataFrame, axis: Axis) -> str:
    """Whether the axis is the same one for these runs."""
    if axis == "tokens":
        if len(formed) and formed["tokens_by"].isna().all():
            return "no run counted its tokens: align by step"
        return "ok"
    steps = _numbers(known, "step_last")
    with np.errstate(divide="ignore", invalid="ignore"):
        tokens_a_step = _numbers(known, "tokens_last") / steps
    tokens_a_step = tokens_a_step[np.isfinite(tokens_a_step)]
    if len(tokens_a_step) and tokens_a_step.max() > _ALIKE * tokens_a_step.min():
        return (
            f"a step takes {tokens_a_step.min():.0f} tokens in one run and "
            f"{tokens_a_step.max():.0f} in another: align by tokens"
        )
    return "ok"


def _gap(rows: pd.DataFrame, axis: Axis) -> np.ndarray[Any, Any]:
    """Between the measurements before and at which it had formed."""
    gap: np.ndarray[Any, Any] = _numbers(rows, axis) - _numbers(rows, f"{axis}_after")
    return gap


def _numbers(rows: pd.DataFrame, column: str) -> np.ndarray[Any, Any]:
    numbers: np.ndarray[Any, Any] = rows[column].to_numpy(dtype=np.float64, na_value=np.nan)
    return numbers
