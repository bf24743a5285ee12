"""A page of metrics: tables as gauges, and whatever other metrics there are.

prometheus_client knows the text formats, but takes half a second over 100,000 rows, which are the
same in all of them. So it writes the headings, and the rows are put below these as Arrow text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from monitor.record import Field, ProbeSpec


def scalar_fields(spec: ProbeSpec) -> list[Field]:
    """The fields that can be shown as metrics."""
    return [field for field in spec.fields if field.is_number]


def has_heads(spec: ProbeSpec) -> bool:
    """Whether a row of the table is about a head, so that layers can be summed up."""
    return [dim.name for dim in spec.dims] == ["layer", "head"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRows:
    """One table: `shown` of its `valid` rows are on the page, `invalid` is how many cannot be;
    with `summed` the valid ones are summed up by layer.
    """

    spec: ProbeSpec
    valid: pa.Table
    shown: pa.Table
    invalid: int
    summed: bool = True

    def gauges(self, run: str) -> Iterator[_Gauge]:
        """The metrics of the rows, and of every layer summed up."""
        spec, fields = self.spec, scalar_fields(self.spec)
        yield _Gauge(
            f"phasewatch_{spec.name}_not_interpretable",
            "Rows of the latest measurement whose validity is not ok; they are not exposed.",
            _labels(run=pa.scalar(run)),
            pa.array([self.invalid]),
        )
        dims = {dim.name: self.shown[dim.name] for dim in spec.dims}
        labels = _labels(run=pa.scalar(run), **dims)
        for field in fields:
            help_of = {
                "": f"{field.help} {spec.source}.",
                "_stderr": f"Standard error of {field.name}.",
                "_null": f"What {field.name} would be without structure: {field.null}.",
                "_null_sd": f"Standard deviation of {field.name} without structure.",
            }
            for column in field.columns:
                help_text = help_of[column.removeprefix(field.name)]
                yield _Gauge(spec.metric(column), help_text, labels, self.shown[column])
        if self.summed and has_heads(spec):
            sums = [(field.name, how) for field in fields for how in ("max", "mean")]
            by_layer = self.valid.group_by("layer", use_threads=False).aggregate(sums)
            labels = _labels(run=pa.scalar(run), layer=by_layer["layer"])
            for name, how in sums:
                help_text = f"{how.capitalize()} over the heads of a layer: {spec.field(name).help}"
                metric = spec.metric(name, f"_layer_{how}")
                yield _Gauge(metric, help_text, labels, by_layer[f"{name}_{how}"])


class Page:
    """All that is shown at one time. Its text in each format is rendered once, when asked for."""

    def __init__(self, run: str, tables: Iterable[TableRows], others: Iterable[Metric]) -> None:
        self._runs = {run: tuple(tables)}
        self._others = tuple(others)
        self._texts: dict[str, bytes] = {}

    @classmethod
    def of_runs(cls, runs: Mapping[str, Iterable[TableRows]], others: Iterable[Metric]) -> Page:
        """The page of several runs: a metric that many of them have is one metric."""
        page = cls("", (), others)
        page._runs = {run: tuple(tables) for run, tables in runs.items()}
        return page

    def collect(self) -> list[Metric]:
        """The headings of the gauges, and the other metrics whole, for prometheus_client."""
        return [*(same[0] for same in self._gauges.values()), *self._others]

    def text(self, accept: str) -> tuple[bytes, str]:
        """The text in the format that is asked for, and its content type."""
        encode, content_type = choose_encoder(accept)
        if content_type not in self._texts:
            gauges = {f"# TYPE {n} gauge\n".encode(): same for n, same in self._gauges.items()}
            self._texts[content_type] = b"".join(
                line + b"".join(gauge.rows() for gauge in gauges.get(line, ()))
                for line in encode(self).splitlines(keepends=True)
            )
        return self._texts[content_type], content_type

    @cached_property
    def _gauges(self) -> dict[str, list[_Gauge]]:
        gauges: dict[str, list[_Gauge]] = {}
        for run, tables in self._runs.items():
            for gauge in (gauge for table in tables for gauge in table.gauges(run)):
                gauges.setdefault(gauge.name, []).append(gauge)
        return gauges


class _Gauge(GaugeMetricFamily):
    """To prometheus_client a metric without rows; its rows are those of Arrow columns."""

    def __init__(self, name: str, help_text: str, labels: Any, values: Any) -> None:
        super().__init__(name, help_text)
        self._labels = labels
        self._values = values

    def rows(self) -> bytes:
        numbers = self._values.cast(pa.float64())
        lines = _joined(self.name, self._labels, " ", numbers.cast(pa.string()), "\n")
        return "".join(lines.filter(pc.is_finite(numbers)).to_pylist()).encode()


def _labels(**values: Any) -> Any:
    """The labels of every row as text, `{layer="0",run="r"}`, escaped as by prometheus_client."""
    parts: list[Any] = []
    for name, value in sorted(values.items()):
        text = value.cast(pa.string())
        for raw, written in (("\\", r"\\"), ("\n", r"\n"), ('"', r"\"")):
            text = pc.replace_substring(text, raw, written)
        parts += [f'{"," if parts else "{"}{name}="', text, '"']
    return _joined(*parts, "}")


def _joined(*parts: Any) -> Any:
    return pc.binary_join_element_wise(*parts, "")
