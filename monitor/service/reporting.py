"""A report: the live page of a run as one file, with the tables that it shows in it.

Opened from disk it asks nobody for anything. What does not fit in is left out evenly and said so:
of tables with very many rows all of the last measurement are kept, and of the others those of the
best rows, at fewer steps.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd

from monitor.names import expect_one_of
from monitor.query import connect
from monitor.record import Field
from monitor.replacing import replacing
from monitor.service import charting, leading, pages, telling
from monitor.service.following import NOT_BY_STEP, Folder
from monitor.service.gathering import Gatherer
from monitor.service.rendering import plain

# What a table takes at most: all of it where a run has some hundred heads and measurements.
_NUMBERS = 250_000
# As few steps as are kept before rows are left out.
_STEPS = 100
# More digits than standard errors leave to any number.
_DIGITS = 5

# Nothing is fetched, and only what stands in the file runs.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' data:; style-src 'unsafe-inline'; img-src data:"
)
_IMPORT = re.compile(r'(?<=from )"\./([\w-]+\.js)"')


def write(root: str | Path, output: str | Path, runs: Sequence[str] | None = None) -> Path:
    """Writes a report of some runs under `root`, by default of the one that was measured last.

    Raises `FileNotFoundError` where there is no such folder, `ValueError` where there is no such
    run, and `OSError` where the file cannot be written; one that was there is replaced at once.
    """
    root, output = Path(root), Path(output)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}: expected the root= of a run")
    known = {info["run"]: info for info in telling.runs(Folder(root))}
    if not known:
        raise ValueError(f"no runs in {root}: expected the root= of a run")
    if not runs:
        runs = [max(known, key=lambda run: str(known[run]["time"] or ""))]
    for run in runs:
        expect_one_of(f"run in {root}", run, sorted(known))
    text = _page(_gathered(root, [*dict.fromkeys(runs)], known))
    with replacing(output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return output


def _gathered(
    root: Path, runs: Sequence[str], known: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """All that `embedded.js` answers from."""
    folder = Folder(root)
    gatherer = Gatherer(folder)
    stored: dict[str, dict[str, Any]] = {}
    declared = {run: telling.tables(folder, run) for run in runs}
    for run, told in declared.items():
        with connect(root, run) as connection:
            stored[run] = {
                each["table"]: _stored(connection, each["table"], each)
                for each in told
                if each["table"] not in (*NOT_BY_STEP, "transitions")
            }
    try:
        transitions = {run: charting.transitions(folder, gatherer, [run], "step") for run in runs}
    finally:
        gatherer.close()
    thinned = sorted(
        {name for tables in stored.values() for name, table in tables.items() if table["thinned"]}
    )
    made = f"Report of {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    if thinned:
        made += f"; the best rows at some steps alone, of {', '.join(thinned)}"
    return {
        "about": {"made": made, "runs": [*runs]},
        "runs": [known[run] for run in runs],
        "tables": declared,
        "rows": stored,
        "transitions": transitions,
        "leads": {axis: leading.at_once(folder, runs, axis) for axis in leading.AXES},
    }


def _stored(
    connection: duckdb.DuckDBPyConnection, name: str, told: Mapping[str, Any]
) -> dict[str, Any]:
    """A table of one run, in order of steps, as `embedded.js` has it."""
    view = connection.table(name)
    fields = [field for each in told["fields"] if not (field := Field(**each)).per]
    dims = [dim["name"] for dim in told["dims"]]
    shown = [*dims, *(column for f in fields for column in f.columns), "n", "validity"]
    shown = [column for column in shown if column in view.columns]
    counts = dict(view.aggregate("step, count(*)", "step").order("step").fetchall())
    room = _NUMBERS // len(shown)
    most = max(counts.values())
    steps = _evenly([*counts], max(_STEPS, room // most))
    rows = view.filter(f"step IN ({', '.join(map(str, steps))})").select(
        ", ".join(["step, tokens, epoch(time) AS seconds", *(f'"{column}"' for column in shown)])
    )
    table = rows.order(", ".join(["step", *(f'"{dim}"' for dim in dims)])).to_arrow_table()
    of_best = most > room // len(steps)
    if of_best:
        table = table.filter(_foremost(table.to_pandas(), dims, fields, room // len(steps)))
    step = table["step"].to_numpy()
    first = np.unique(step, return_index=True)[1]
    moments = table.select(["step", "tokens", "seconds"]).take(first)
    return {
        "steps": moments["step"].to_pylist(),
        "tokens": moments["tokens"].to_pylist(),
        "time": moments["seconds"].to_pylist(),
        "rows": np.diff([*first, len(step)]).tolist(),
        "columns": {column: [_short(v) for v in table[column].to_pylist()] for column in shown},
        "thinned": of_best or len(steps) < len(counts),
    }


def _evenly(steps: Sequence[int], most: int) -> list[int]:
    """At most so many of the steps, the first and the last among them."""
    if len(steps) <= most:
        return [*steps]
    return [steps[at] for at in np.linspace(0, len(steps) - 1, most).round().astype(int)]


def _foremost(
    frame: pd.DataFrame, dims: Sequence[str], fields: Sequence[Field], most: int
) -> np.ndarray[Any, Any]:
    """Which rows are of the last step, or of those `most` that were ever furthest above the null of
    a field: the best of each field, then the second best, and so on.
    """
    above = pd.DataFrame(
        {
            field.name: frame[field.name] - (frame[f"{field.name}_null"] if field.null else 0)
            for field in fields
            if field.is_number and field.name in frame
        }
    ).where(frame["validity"] == "ok")
    key = frame.groupby(list(dims), dropna=False, sort=False).ngroup()
    ranks = above.groupby(key).max().rank(ascending=False, method="first").min(axis=1)
    best = ranks.nsmallest(most).index
    return np.asarray(key.isin(best) | (frame["step"] == frame["step"].max()))


def _short(value: Any) -> Any:
    """As JSON has it, with no more digits than tell something."""
    return plain(float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value)


def _page(told: Mapping[str, Any]) -> str:
    """The page with all of its parts, and what it tells, in one file."""
    files = {name: path.read_text(encoding="utf-8") for name, path in pages.files().items()}
    modules = {
        f"phasewatch/{name}": _data_url("text/javascript", _IMPORT.sub(r'"phasewatch/\1"', text))
        for name, text in files.items()
        if name.endswith(".js") and "/" not in name
    }
    packed = gzip.compress(json.dumps(told, allow_nan=False).encode(), mtime=0)
    body = files["index.html"].partition("<body>")[2]
    uplot = _data_url("text/javascript", files["vendor/uPlot.iife.min.js"])
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">\n<title>phasewatch</title>',
            f'<link rel="icon" href="{_data_url("image/svg+xml", files["icon.svg"])}">',
            *(f"<style>{files[name]}</style>" for name in ("vendor/uPlot.min.css", "style.css")),
            f'<script type="importmap">{json.dumps({"imports": modules})}</script>',
            f'<script src="{uplot}"></script>',
            f'<script id="report" type="application/gzip">{_base64(packed)}</script>',
            '<script type="module">import "phasewatch/main.js";</script>\n</head>\n<body>',
            body,
        ]
    )


def _data_url(kind: str, text: str) -> str:
    return f"data:{kind};base64,{_base64(text.encode())}"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
