"""What recording one measurement of a very large model costs: 9,216 heads with 8 random fields."""

from __future__ import annotations

import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from rich.table import Table

from monitor.record import HEAD, LAYER, Field, Measurement, Moment, ProbeSpec, Reading
from monitor.sinks import ParquetSink, PrometheusSink

_LAYERS = _HEADS = 96
_FIELDS = tuple(f"field_{number}" for number in range(8))
_SPEC = ProbeSpec(
    name="bench",
    help="Random numbers.",
    source="Nobody",
    dims=(LAYER, HEAD),
    fields=tuple(Field(name=name, help="A random number.", stderr=False) for name in _FIELDS),
    needs=(),
)
# A round of these takes milliseconds.
_TIMES = 5


def table(rounds: int) -> Table:
    """Times, and sizes of what is written and sent."""
    chance = np.random.default_rng(0)
    given = [_columns(chance) for _ in range(_TIMES * rounds)]
    measurements = [
        Measurement(moment=_moment(step), readings=(Reading.build(_SPEC, _moment(step), columns),))
        for step, columns in enumerate(given)
    ]
    title = f"Recording {_LAYERS * _HEADS:,} heads with {len(_FIELDS)} random fields"
    printed = Table(title=title)
    for column, justify in (("work", "left"), ("ms", "right"), ("kB", "right")):
        printed.add_column(column, justify=justify)

    built = [_ms(Reading.build, _SPEC, _moment(0), columns) for columns in given]
    printed.add_row("the table", f"{statistics.median(built):.1f}", "")

    # Not in /tmp, which may be memory: fsync is to cost what it costs.
    with tempfile.TemporaryDirectory(dir=".") as folder:
        store = ParquetSink(folder, "bench")
        written = [_ms(store.write, m) for m in measurements]
        size = max(path.stat().st_size for path in Path(folder).rglob("*.parquet"))
    printed.add_row("Parquet", f"{statistics.median(written):.1f}", f"{size / 1e3:.0f}")

    for what, budget in (("all series", {"budget": 10**6}), ("the default budget", {})):
        sink = PrometheusSink("bench", port=0, **budget)
        handed, first, again = [], [], []
        for measurement in measurements:
            handed.append(_ms(sink.write, measurement))
            first.append(_ms(_page, sink.url))
            again.append(_ms(_page, sink.url))
        size = len(_page(sink.url))
        sink.close()
        for part, times in (
            ("on the training thread", handed),
            ("first scrape, rendered and sent", first),
            ("later scrapes, only sent", again),
        ):
            printed.add_row(
                f"/metrics with {what}: {part}",
                f"{statistics.median(times):.1f}",
                f"{size / 1e3:.0f}" if times is not handed else "",
            )
    return printed


def _columns(chance: np.random.Generator) -> dict[str, object]:
    rows = _LAYERS * _HEADS
    return {
        "layer": np.repeat(np.arange(_LAYERS), _HEADS),
        "head": np.tile(np.arange(_HEADS), _LAYERS),
        "n": np.full(rows, 16),
        "validity": ["ok"] * rows,
        **{name: chance.random(rows, dtype=np.float32) for name in _FIELDS},
    }


def _moment(step: int) -> Moment:
    return Moment(run="bench", attempt=1, step=step, tokens=step, time=datetime.now(UTC))


def _page(url: str) -> bytes:
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        return answer.read()


def _ms(work: Callable[..., object], *args: object) -> float:
    begun = time.perf_counter()
    work(*args)
    return 1e3 * (time.perf_counter() - begun)
