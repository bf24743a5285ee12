"""The latest measurement of all runs as one page of metrics, within one budget.

The page is made anew only where something was measured. Where a table has more rows than its share
of the budget, those stay that were ever best, as in `PrometheusSink`; of what was measured before
the service looked, some measurements spread over the run have to do for that.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric

from monitor.record import ProbeSpec
from monitor.service import telling
from monitor.service.following import NOT_BY_STEP, Folder, StoredFile, spec_of
from monitor.sinks.exposition import Page, TableRows, has_heads, scalar_fields
from monitor.sinks.staying import Best, lasting

# So many measurements before the latest are looked at for what was ever best.
_LOOKED_AT = 16


@dataclass(slots=True)
class _Table:
    """What is known of one table of one run: of which files, and its rows that hold now."""

    spec: ProbeSpec
    best: Best = field(default_factory=Best)
    files: list[StoredFile] = field(default_factory=list)
    seen: set[StoredFile] = field(default_factory=set)
    rows: Any = None

    @property
    def valid(self) -> pa.Table:
        """The rows that can be interpreted."""
        return _valid(self.rows)


class Shown:
    """The page of the runs under a folder, of at most `budget` series."""

    def __init__(self, folder: Folder, budget: int) -> None:
        self._folder, self._budget = folder, budget
        self._tables: dict[tuple[str, str], _Table] = {}
        self._page: tuple[object, Page] | None = None
        self._lock = threading.Lock()

    def page(self) -> Page:
        """The page of now. The same one as before where nothing was measured since."""
        with self._lock:
            runs = telling.readable(self._folder)
            state = {
                (run, table): (files[-1], len(files))
                for run, of_run in runs.items()
                for table, files in of_run.items()
            }
            if self._page is None or self._page[0] != state:
                self._page = (state, self._made(runs))
            return self._page[1]

    def _made(self, runs: Mapping[str, Mapping[str, list[StoredFile]]]) -> Page:
        found: dict[tuple[str, str], _Table] = {}
        moments: dict[str, Mapping[str, Any]] = {}
        attempts: dict[str, Mapping[str, Any]] = {}
        for run, of_run in sorted(runs.items()):
            for name, files in sorted(of_run.items()):
                schema = None if name in NOT_BY_STEP else telling.schema_of(self._folder, files)
                spec = None if schema is None else spec_of(schema)
                if spec is not None:
                    table = self._tables.get((run, name))
                    # Another attempt may measure other fields.
                    if table is None or table.spec != spec:
                        table = _Table(spec)
                    self._follow(table, files)
                    if table.rows is not None:
                        found[run, name] = table
            if (moment := telling.moment_of(self._folder, of_run)) is not None:
                moments[run] = moment
            last = telling.last_attempt(self._folder, of_run)
            attempts[run] = last | {"state": telling.state_of(of_run, last)[0]}
        self._tables = found
        shown: dict[str, list[TableRows]] = {run: [] for run in runs}
        left_out = dict.fromkeys(runs, 0)
        valid = {key: table.valid for key, table in found.items()}
        needs = [
            _sums(t.spec, valid[key]) + _series(t.spec, valid[key]) for key, t in found.items()
        ]
        # Each table tells how many rows cannot be, each run six things of itself.
        given = shares(needs, self._budget - len(found) - 6 * len(runs))
        for (key, table), need, share in zip(found.items(), needs, given, strict=True):
            rows = self._fitting(table, valid[key], share)
            shown[key[0]].append(rows)
            sums = _sums(table.spec, valid[key]) if rows.summed else 0
            left_out[key[0]] += need - sums - _series(table.spec, rows.shown)
        about = [*_about(moments), *_attempts(attempts), _left_out(left_out)]
        return Page.of_runs(shown, about)

    def _follow(self, table: _Table, files: list[StoredFile]) -> None:
        """Brings the rows that hold up to date."""
        if not table.spec.lasting:
            table.files, table.rows = files, telling.newest(self._folder, files)
            return
        known = len(table.files)
        if table.files != files[:known]:
            # What held was set aside.
            known, table.rows = 0, None
        for file in files[known:]:
            if (read := self._folder.read(file)) is not None:
                table.rows = lasting(table.spec, table.rows, read)
        table.files = files

    def _fitting(self, table: _Table, valid: pa.Table, share: int) -> TableRows:
        """The rows of a table that its share has room for."""
        spec = table.spec
        columns = max(1, sum(len(of.columns) for of in scalar_fields(spec)))
        sums = _sums(spec, valid)
        # Layers come before heads, which they sum up, unless they would leave no room for any.
        summed = 0 < sums <= share - columns
        rows = (share - sums * summed) // columns
        if len(valid) > rows and not spec.lasting:
            self._look_back(table)
        shown = table.best.fitting(spec, valid, rows)
        invalid = len(table.rows) - len(valid)
        return TableRows(spec=spec, valid=valid, shown=shown, invalid=invalid, summed=summed)

    def _look_back(self, table: _Table) -> None:
        """Sees measurements that were not seen, if not all of them."""
        spec = table.spec
        new = [file for file in table.files[:-1] if file not in table.seen]
        if len(new) > _LOOKED_AT:
            new = [new[at] for at in np.linspace(0, len(new) - 1, _LOOKED_AT).astype(int)]
        columns = [*(d.name for d in spec.dims), *(f.name for f in scalar_fields(spec)), "validity"]
        for file in new:
            read = self._folder.load(file, columns)
            if read is not None and {*columns} <= {*read.column_names}:
                table.best.see(spec, _valid(read))
        table.seen = {*table.files}


def shares(needs: Sequence[int], budget: int) -> list[int]:
    """Who gets how much of a budget: what is needed, or an equal part of what the others leave.

    >>> shares([2, 50, 30], 40)
    [2, 19, 19]
    >>> shares([2, 50, 30], 100)
    [2, 50, 30]
    """
    given, left = [0] * len(needs), max(0, budget)
    for done, at in enumerate(sorted(range(len(needs)), key=needs.__getitem__)):
        given[at] = min(needs[at], left // (len(needs) - done))
        left -= given[at]
    return given


def _valid(rows: pa.Table) -> pa.Table:
    return rows.filter(pc.equal(rows["validity"].cast(pa.string()), "ok"))


def _series(spec: ProbeSpec, rows: pa.Table) -> int:
    return len(rows) * sum(len(of.columns) for of in scalar_fields(spec))


def _sums(spec: ProbeSpec, valid: pa.Table) -> int:
    """Series of the layers, two for each field."""
    if not has_heads(spec):
        return 0
    return 2 * len(scalar_fields(spec)) * len(pc.unique(valid["layer"]))


def _about(moments: Mapping[str, Mapping[str, Any]]) -> Iterator[Metric]:
    for name, key, help_text in (
        ("step", "step", "Training step of the latest measurement."),
        ("tokens", "tokens", "Training tokens seen at the latest measurement."),
        ("last_measurement_timestamp_seconds", "time", "When the latest measurement was made."),
    ):
        gauge = GaugeMetricFamily(f"phasewatch_{name}", help_text, labels=["run"])
        for run, moment in moments.items():
            value = moment[key]
            if value is not None:
                gauge.add_metric([run], value.timestamp() if key == "time" else value)
        yield gauge


def _attempts(attempts: Mapping[str, Mapping[str, Any]]) -> Iterator[Metric]:
    labels = ["run", "attempt", "model"]
    info = InfoMetricFamily("phasewatch_run", "The run that is measured.", labels=labels)
    # What is finished stays on this page, and has not stalled.
    finished = GaugeMetricFamily(
        "phasewatch_run_finished", "1 once the run has come to its end, else 0.", labels=["run"]
    )
    for run, last in attempts.items():
        if "attempt" in last:
            info.add_metric([run, str(last["attempt"]), str(last["model"])], {})
        finished.add_metric([run], float(last["state"] == "finished"))
    yield from (info, finished)


def _left_out(left_out: Mapping[str, int]) -> Metric:
    gauge = GaugeMetricFamily(
        "phasewatch_series_left_out",
        "Series of the latest measurement that this page has no room for.",
        labels=["run"],
    )
    for run, count in left_out.items():
        gauge.add_metric([run], count)
    return gauge
