"""What the service answers in: 20 runs of 1,000 measurements of 9,216 heads each."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import psutil
from rich.table import Table

from monitor.record import HEAD, LAYER, Field, Measurement, Moment, ProbeSpec, Reading
from monitor.sinks import ParquetSink

_RUNS, _MEASUREMENTS, _LAYERS, _HEADS, _TIMES = 20, 1_000, 96, 96, 15
_SPEC = ProbeSpec(
    name="bench",
    help="Random numbers.",
    source="Nobody",
    dims=(LAYER, HEAD),
    fields=(Field(name="score", help="A random number.", null="always the same one"),),
    needs=(),
)
_CODE = "from monitor.cli import app; app()"


def table(rounds: int) -> Table:
    """Median and worst of each endpoint, the first answer apart, and the memory in the end."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        root = Path(folder)
        begun = time.perf_counter()
        _write(root)
        took = time.perf_counter() - begun
        return _asked(root, rounds, f"{_RUNS} runs × {_MEASUREMENTS:,}, written in {took:.0f} s")


def _write(root: Path) -> None:
    """One run for real; the others are names of the same files, which do not say whose they are."""
    chance, sink = np.random.default_rng(0), ParquetSink(root, "run-00")
    rows = _LAYERS * _HEADS
    columns = {
        "layer": np.repeat(np.arange(_LAYERS), _HEADS),
        "head": np.tile(np.arange(_HEADS), _LAYERS),
        "score_stderr": np.full(rows, 0.01, np.float32),
        "score_null": np.full(rows, 0.02, np.float32),
        "n": np.full(rows, 16),
        "validity": ["ok"] * rows,
    }
    for step in range(_MEASUREMENTS):
        when = Moment(
            run="run-00",
            attempt=1,
            step=step,
            tokens=1_000 * step,
            time=datetime.now(UTC) + timedelta(seconds=step),
        )
        score = {"score": chance.random(rows, dtype=np.float32)}
        reading = Reading.build(_SPEC, when, columns | score)
        sink.write(Measurement(moment=when, readings=(reading,)))
    first = root / "bench" / "run=run-00"
    for number in range(1, _RUNS):
        other = first.with_name(f"run=run-{number:02d}")
        other.mkdir()
        for path in first.iterdir():
            os.link(path, other / path.name)


def _asked(root: Path, rounds: int, what: str) -> Table:
    printed = Table(title=f"Serving {what}")
    for column in ("request", "first, ms", "median, ms", "worst, ms", "kB"):
        printed.add_column(column, justify="left" if column == "request" else "right")
    command = [sys.executable, "-c", _CODE, "serve", "--root", str(root), "--port", "0"]
    begun = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1]
            printed.add_row("started", f"{1e3 * (time.perf_counter() - begun):.0f}", "", "", "")
            for path, query in _REQUESTS:
                address = f"{url}{path}?{urllib.parse.urlencode(query, doseq=True)}"
                times, size = [], 0
                for _ in range(1 + _TIMES * rounds):
                    asked = time.perf_counter()
                    with urllib.request.urlopen(address, timeout=300) as answer:
                        size = len(answer.read())
                    times.append(1e3 * (time.perf_counter() - asked))
                again = times[1:]
                told = [f"{n:.1f}" for n in (times[0], statistics.median(again), max(again))]
                asked_for = (f"{k}={_short(v)}" for k, v in query.items() if k != "table")
                name = " ".join([path, *asked_for])
                printed.add_row(name, *told, f"{size / 1e3:.0f}")
            memory = psutil.Process(process.pid).memory_info().rss
            printed.add_row("memory in the end", f"{memory / 2**20:.0f} MB", "", "", "")
        finally:
            process.terminate()
    return printed


def _short(value: object) -> str:
    return f"({len(value)} runs)" if isinstance(value, list) else str(value)


_ONE = {"run": "run-00", "table": "bench", "field": "score"}
_REQUESTS: tuple[tuple[str, dict[str, object]], ...] = (
    ("/api/runs", {}),
    ("/api/tables", {"run": "run-00"}),
    ("/api/series", _ONE | {"layer": 3, "head": 5, "format": "columns"}),
    ("/api/series", _ONE | {"top": 8, "format": "columns"}),
    ("/api/series", _ONE | {"top": 8, "axis": "time", "points": 200}),
    ("/api/series", _ONE | {"layer": 3, "format": "columns"}),
    ("/api/series", _ONE | {"layer": 3, "points": 200, "format": "csv"}),
    ("/api/rows", {"run": "run-00", "table": "bench", "step": 500}),
    ("/api/transitions", {"run": "run-00", "axis": "tokens"}),
    ("/api/leads", {"run": "run-00"}),
    ("/metrics", {}),
    (
        "/api/series",
        _ONE | {"run": [f"run-{n:02d}" for n in range(4)], "top": 4, "format": "columns"},
    ),
)
