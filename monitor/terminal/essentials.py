"""The essentials of one run, from the files of its tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy.special import ndtr, ndtri

from monitor.claims import INDUCTION_CIRCUIT, Estimate
from monitor.service.following import NOT_BY_STEP, Folder, StoredFile
from monitor.terminal.drawing import Line, along
from monitor.terminal.saying import Number, called, plain, said

Axis = Literal["step", "tokens", "time"]

# Of a table without dimensions: what is shown of it, and what that is called.
_NUMBERS = {
    "in_context": {
        "loss_late": "loss late in held-out text, nats",
        "paired_score": "in-context score (paired), nats",
    },
    "grokking": {
        "train_loss": "loss on training questions, nats",
        "held_out_loss": "loss on held-out questions, nats",
    },
}
# The best head of each is a number too.
_HEADS = {
    "prefix_matching": "best induction head",
    "previous_token": "best previous-token head",
}
_BEST = 3

# A concept is told beyond chance by so many standard deviations, of whichever layer tells it best.
_DEVIATIONS = 3.0
_METHOD = "diff_in_means"

# Longer than a sparkline of the widest terminal that anyone reads.
_PLACES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What was said of a transition at `step`; `of` tells it from others."""

    of: tuple[str, float]
    step: int
    text: str

    def __str__(self) -> str:
        return f"step {self.step:,}  {self.text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Essentials:
    """What there is to show of one run.

    Attributes:
        about: what the service tells of the run: its state, its last step and so on.
        numbers: with their nulls and intervals.
        best: the best induction heads, the best first, along the axis, and `null`, theirs.
        heads: prefix matching [layer, head] at the last measurement, NaN where it is not known.
        said: of transitions, the last first.
        concepts: which of them are told above chance; `circuit`: what is claimed of it.
        unclear: what cannot be interpreted, and why.
        measured: seconds that measuring took, of so many `elapsed`, when that was last written.
    """

    about: Mapping[str, Any]
    numbers: Sequence[Number]
    best: Sequence[Line]
    null: Line | None
    axis: Axis
    heads: np.ndarray[Any, Any] | None
    said: Sequence[Said]
    concepts: str
    circuit: str
    unclear: Sequence[str]
    measured: float = math.nan
    elapsed: float = math.nan


Kept = dict[tuple[StoredFile, tuple[str, ...]], pa.Table]
"""Columns of files that were read before."""


def essentials(folder: Folder, about: Mapping[str, Any], axis: Axis, kept: Kept) -> Essentials:
    """Reads what there is of the run that `about` is about, as `telling.runs` tells it, and keeps
    in `kept` what need not be read again.
    """
    tables = _Tables(folder, about["run"], kept)
    # Where tokens were not counted there is no such axis.
    along_what: Axis = "step" if about[axis if axis != "step" else "last_step"] is None else axis
    heads = tables.of("induction", "layer", "head", *(c for f in _HEADS for c in _columns(f)))
    numbers = [*_numbers(tables, along_what), *_best_numbers(heads, along_what)]
    best, null = _best(heads, along_what)
    measured, elapsed = _cost(folder, about["run"])
    return Essentials(
        about=about,
        numbers=numbers,
        best=best,
        null=null,
        axis=along_what,
        heads=_map(heads),
        said=list(_said(tables.rows("transitions"), tables.steps)),
        concepts=_concepts(
            tables.newest("concepts", "layer", "concept", "method", *_columns("auc"))
        ),
        circuit=_circuit(tables.newest_rows("circuit")),
        unclear=list(_unclear(tables)),
        measured=measured,
        elapsed=elapsed,
    )


def started(folder: Folder, run: str) -> float:
    """When the last attempt of a run began, in seconds of the epoch; 0 where that is not known."""
    begun = [row["started"] for row in _attempts(folder, run) if row.get("started")]
    return max(time.timestamp() for time in begun) if begun else 0.0


def _cost(folder: Folder, run: str) -> tuple[float, float]:
    """Seconds that measuring took, and of how many; NaN where that is not known."""
    last = (_attempts(folder, run) or [{}])[-1]
    taken = (last.get("measured_seconds"), last.get("elapsed_seconds"))
    measured, elapsed = (math.nan if seconds is None else float(seconds) for seconds in taken)
    return measured, elapsed


def _attempts(folder: Folder, run: str) -> list[dict[str, Any]]:
    files = folder.of_run(run).get("attempts", [])
    read = (folder.read(file) for file in files)
    return [row for rows in read if rows is not None for row in rows.to_pylist()]


class _Tables:
    """The tables of one run."""

    def __init__(self, folder: Folder, run: str, kept: Kept) -> None:
        self._folder, self._kept = folder, kept
        self._files = {
            name: files for name, files in folder.of_run(run).items() if name not in NOT_BY_STEP
        }

    @property
    def names(self) -> list[str]:
        return sorted(self._files)

    @property
    def steps(self) -> list[int]:
        """At which steps something was measured."""
        return sorted({file.number for files in self._files.values() for file in files})

    def of(self, table: str, *columns: str) -> pd.DataFrame:
        """These columns of all measurements, with where they were made and whether they hold."""
        return self._read(self._files.get(table, ()), columns)

    def newest(self, table: str, *columns: str) -> pd.DataFrame:
        """The same of the last measurement that can be read."""
        for file in reversed(self._files.get(table, ())):
            if len(rows := self._read([file], columns)):
                return _newest(rows)
        return self._read([], columns)

    def newest_rows(self, table: str) -> list[dict[str, Any]]:
        """All that the rows of the last measurement say."""
        rows = self.rows(table, only_last=True)
        last = max((row["step"] for row in rows), default=None)
        return [row for row in rows if row["step"] == last]

    def rows(self, table: str, *, only_last: bool = False) -> list[dict[str, Any]]:
        """All that the rows of a table say, in order of steps; or those of its last file."""
        found: list[dict[str, Any]] = []
        for file in reversed(self._files.get(table, ())):
            read = self._folder.read(file)
            found[:0] = [] if read is None else read.to_pylist()
            if found and only_last:
                break
        return found

    def _read(self, files: Sequence[StoredFile], columns: Sequence[str]) -> pd.DataFrame:
        wanted = ("step", "tokens", "time", *columns, "n", "validity")
        read = (self._load(file, wanted) for file in files)
        # What phasewatch says of a table differs from one attempt to the next.
        there = [rows.replace_schema_metadata() for rows in read if rows is not None]
        if not there:
            return pd.DataFrame(columns=list(wanted))
        frame: pd.DataFrame = pa.concat_tables(there, promote_options="default").to_pandas()
        frame = frame.reindex(columns=list(wanted)).astype({"validity": object})
        return frame.sort_values("step", kind="stable")

    def _load(self, file: StoredFile, columns: tuple[str, ...]) -> pa.Table | None:
        if (file, columns) not in self._kept:
            rows = self._folder.load(file, columns)
            if rows is None:
                return None
            self._kept[file, columns] = rows
        return self._kept[file, columns]


def _columns(field: str) -> tuple[str, str, str]:
    return field, f"{field}_stderr", f"{field}_null"


def _newest(frame: pd.DataFrame) -> pd.DataFrame:
    newest: pd.DataFrame = frame[frame["step"] == frame["step"].max()]
    return newest


def _line(name: str, frame: pd.DataFrame, field: str, axis: Axis) -> Line:
    """A field of one row a step along the axis; what cannot be interpreted is no number."""
    frame = frame[frame[axis].notna()]
    at = frame[axis].map(lambda time: time.timestamp()) if axis == "time" else frame[axis]
    value = frame[field].astype(float).where(frame["validity"] == "ok")
    return Line(name=name, x=at.astype(float).tolist(), y=value.tolist())


def _numbers(tables: _Tables, axis: Axis) -> Iterator[Number]:
    for table, fields in _NUMBERS.items():
        frame = tables.of(table, *(column for field in fields for column in _columns(field)))
        for field, name in fields.items() if len(frame) else ():
            history = along(_line(name, frame, field, axis), _PLACES)
            yield Number.of(name, frame.iloc[-1], field, history)


def _best_numbers(heads: pd.DataFrame, axis: Axis) -> Iterator[Number]:
    """The best head of each kind, beside how good the best head was at each measurement."""
    if heads.empty:
        return
    for field, name in _HEADS.items():
        now = _valid(_newest(heads), field)
        if now.empty:
            yield Number.of(name, _newest(heads).iloc[0], field, ())
            continue
        valid = _valid(heads, field)
        then = _highest(valid, "step", field)
        best = now.sort_values(field).iloc[-1]
        history = along(_line(name, then, field, axis), _PLACES)
        yield Number.of(f"{name} {best['layer']:.0f}.{best['head']:.0f}", best, field, history)


def _valid(rows: pd.DataFrame, field: str) -> pd.DataFrame:
    kept: pd.DataFrame = rows[(rows["validity"] == "ok") & np.isfinite(rows[field].astype(float))]
    return kept


def _highest(rows: pd.DataFrame, by: str, field: str) -> pd.DataFrame:
    """Of each `by` the row with the highest value of a field."""
    return rows.sort_values(field).drop_duplicates(by, keep="last").sort_values("step")


def _best(heads: pd.DataFrame, axis: Axis) -> tuple[list[Line], Line | None]:
    """The heads that are the best now, from the start on, and the null of the best one."""
    field = "prefix_matching"
    now = _valid(_newest(heads), field).sort_values(field, ascending=False)[:_BEST]
    lines, nulls = [], []
    for layer, head in now[["layer", "head"]].astype(int).itertuples(index=False):
        own = heads[(heads["layer"] == layer) & (heads["head"] == head)]
        lines.append(_line(f"{layer}.{head}", own, field, axis))
        nulls.append(_line("null", own, f"{field}_null", axis))
    return lines, nulls[0] if nulls else None


def _map(heads: pd.DataFrame) -> np.ndarray[Any, Any] | None:
    if heads.empty:
        return None
    now = _newest(heads)
    layer, head = now["layer"].astype(int), now["head"].astype(int)
    found = np.full((layer.max() + 1, head.max() + 1), np.nan)
    found[layer, head] = now["prefix_matching"].astype(float).where(now["validity"] == "ok")
    return found


def _said(rows: Sequence[Mapping[str, Any]], steps: Sequence[int]) -> Iterator[Said]:
    for row in reversed(rows):
        of = plain(row["series"]), row["detected_at"]
        yield Said(of=of, step=row["step"], text=f"{said(row)}{_interval(row, steps)}")


def _interval(row: Mapping[str, Any], steps: Sequence[int]) -> str:
    """Where it happened: as fitted, or between which measurements."""
    if row["kind"] == "change":
        middle, low, high = (row.get(f"midpoint{end}") for end in ("", "_low", "_high"))
        if middle is None or low is None or high is None:
            return "; no fit is clear yet"
        return f"; midpoint {middle:,.0f} ({low:,.0f} to {high:,.0f})"
    before = [step for step in steps if step < row["began"]]
    return f"; after step {before[-1]:,}" if before else ""


def _concepts(rows: pd.DataFrame) -> str:
    """Which concepts can be told in some layer, with allowance for the number of layers."""
    now = rows[rows["method"] == _METHOD]
    if now.empty:
        return ""
    told, valid = [], _valid(now, "auc")
    # As improbable, by chance, in any of so many layers.
    deviations = -float(ndtri(ndtr(-_DEVIATIONS) / max(1, valid["layer"].nunique())))
    for row in _highest(valid, "concept", "auc").sort_values("auc")[::-1].to_dict("records"):
        estimate = Estimate.of(row, "auc")
        if estimate is not None and estimate.beyond(deviations):
            told.append(f"{called(row['concept'])} {row['auc']:.2f}")
    count = f"{len(told)} of {now['concept'].nunique()} above chance (AUC)"
    return f"{count}: {', '.join(told)}" if told else count


def _circuit(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    claim, why = rows[0]["claim"], rows[0]["validity"]
    if claim is None or why != "ok":
        return plain(why)
    edges = [
        f"{row['source_layer']}.{row['source_head']} → "
        + ("logits" if row["kind"] == "logits" else f"{row['target_layer']}.{row['target_head']}")
        for row in rows
        if row["kind"] != "none"
    ]
    words = claim if claim == INDUCTION_CIRCUIT else f"claim: {claim}"
    tested = rows[0]["causal_test"]
    return plain(f"{words} at step {rows[0]['step']:,} (causal test: {tested}): {', '.join(edges)}")


def _unclear(tables: _Tables) -> Iterator[str]:
    """Each reason with the tables and how many of their last rows it is said of."""
    by_reason: dict[str, dict[str, int]] = {}
    for name in tables.names:
        rows = tables.newest(name)
        for reason, count in rows["validity"][rows["validity"] != "ok"].value_counts().items():
            by_reason.setdefault(str(reason), {})[f"{name} ({count} of {len(rows)})"] = count
    for reason, of in by_reason.items():
        yield plain(f"{', '.join(of)}: {reason}")
