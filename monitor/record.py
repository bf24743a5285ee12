"""What is written: a probe's declaration, and one probe's table at one step of one run.

The declaration is the single source of the Parquet schema, the metric names and their help, and the
docs. Nothing here knows of torch: whoever reads the tables needs only Arrow.
"""

from __future__ import annotations

import dataclasses
import json
import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from monitor.names import expect_one_of

FORMAT = 1
METADATA_KEY = b"phasewatch"

# The columns that every measured row begins with.
MOMENT = {
    "step": pa.int64(),
    "tokens": pa.int64(),
    "time": pa.timestamp("us", tz="UTC"),
    "attempt": pa.int32(),
}

_IDENTIFIER = re.compile(r"[a-z][a-z0-9_]*")


def _check_identifier(what: str, name: str) -> None:
    if not _IDENTIFIER.fullmatch(name):
        raise ValueError(f"{what} name {name!r} must be lower case letters, digits and underscores")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dim:
    """One dimension of a table: together, a row's dimensions say what it is about.

    `text` dimensions hold names, the others whole numbers.
    """

    name: str
    help: str
    text: bool = False

    def __post_init__(self) -> None:
        _check_identifier("dimension", self.name)


LAYER = Dim(name="layer", help="Transformer block, counted from 0 at the embedding.")
STREAM_LAYER = Dim(
    name="layer",
    help="Transformer block after which the stream is read, counted from 0 at the embedding; -1 is "
    "what enters the first one.",
)
HEAD = Dim(name="head", help="Attention (query) head within its layer, counted from 0.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One measured quantity, with what it would be without structure and what can fool it.

    `null` says how the value in `<name>_null` arises; empty when the field has none. With `null_sd`
    the null is a distribution, and `<name>_null_sd` its standard deviation: the uncertainty of what
    is computed from weights, which are not a sample.
    `per` names an axis, `position` or `feature` say: such a field holds one number for every place
    along it, in a list column, and is no metric. `text` fields hold words: no metric either.
    """

    name: str
    help: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    null: str = ""
    fooled_by: str = ""
    stderr: bool = True
    null_sd: bool = False
    per: str = ""
    text: bool = False

    def __post_init__(self) -> None:
        _check_identifier("field", self.name)
        if (self.per or self.text) and (self.stderr or self.null):
            kind = "text" if self.text else f"per {self.per}"
            raise ValueError(f"field {self.name!r} is {kind}: it has no stderr and no null")
        if self.null_sd and not self.null:
            raise ValueError(f"field {self.name!r} has a null_sd, and so needs a null")

    @property
    def columns(self) -> tuple[str, ...]:
        """The field's columns: its value, then its standard error, its null and that one's standard
        deviation where they exist.
        """
        stderr = (f"{self.name}_stderr",) if self.stderr else ()
        null = (f"{self.name}_null",) if self.null else ()
        spread = (f"{self.name}_null_sd",) if self.null_sd else ()
        return (self.name, *stderr, *null, *spread)

    @property
    def is_number(self) -> bool:
        """Whether it holds one number a row, which can be a metric."""
        return not (self.per or self.text)

    @property
    def type(self) -> pa.DataType:
        """Arrow type of its columns."""
        if self.text:
            return pa.string()
        return pa.list_(pa.float32()) if self.per else pa.float32()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSpec:
    """The declaration of one probe, and so of one table.

    `needs` names what must be observed: pairs of a stimulus and what one forward pass on it shows
    (`attention`, `losses`; or, where the model's parts are known, `attribution`, `lens`, `stream`,
    and what `monitor.features` collects).
    `lasting`: a row holds until there is another one of the same dimensions. `weights`: it reads
    matrices of the model. `reads` names the probes whose tables of the same
    measurement it draws on, and so come before it. `interventions`: it has the model run with heads
    or weights exchanged, many times, which is done where time allows. `training`: it tells what
    training itself does: facts of one step, and no estimates.
    """

    name: str
    help: str
    source: str
    dims: tuple[Dim, ...]
    fields: tuple[Field, ...]
    needs: tuple[tuple[str, str], ...]
    reads: tuple[str, ...] = ()
    weights: bool = False
    interventions: bool = False
    lasting: bool = False
    training: bool = False

    def __post_init__(self) -> None:
        _check_identifier("probe", self.name)
        columns = ["run", *MOMENT, *(dim.name for dim in self.dims)]
        columns += [column for field in self.fields for column in field.columns]
        columns += ["n", "validity"]
        twice = {c for c in columns if columns.count(c) > 1}
        if twice or not self.fields:
            raise ValueError(
                f"probe {self.name!r} needs at least one field and distinct columns, got {columns}"
            )

    def field(self, name: str) -> Field:
        """The field of this name."""
        return next(field for field in self.fields if field.name == name)

    def metric(self, column: str, suffix: str = "") -> str:
        """Prometheus name of one column: `phasewatch_<table>_<column><suffix>[_<unit>]`."""
        unit = next(field.unit for field in self.fields if column in field.columns)
        return f"phasewatch_{self.name}_{column}{suffix}" + (f"_{unit}" if unit else "")

    def only(self, fields: Sequence[str]) -> ProbeSpec:
        """The same declaration with just these fields; `ValueError` names one that it lacks."""
        for name in fields:
            expect_one_of(f"field of probe {self.name!r}", name, [f.name for f in self.fields])
        return dataclasses.replace(self, fields=tuple(f for f in self.fields if f.name in fields))

    @property
    def schema(self) -> pa.Schema:
        """Arrow schema of the table, with this declaration in its metadata."""
        values = [(column, field.type) for field in self.fields for column in field.columns]
        return pa.schema(
            [
                *MOMENT.items(),
                *((dim.name, pa.string() if dim.text else pa.int32()) for dim in self.dims),
                *values,
                ("n", pa.int32()),
                ("validity", pa.string()),
            ],
            metadata=_metadata(self.name, {"probe": dataclasses.asdict(self)}),
        )


def _metadata(table: str, more: Mapping[str, Any] | None = None) -> dict[bytes, bytes]:
    return {METADATA_KEY: json.dumps({"format": FORMAT, "table": table, **(more or {})}).encode()}


ATTEMPTS = pa.schema(
    [
        ("attempt", pa.int32()),
        ("started", pa.timestamp("us", tz="UTC")),
        ("resumed_from", pa.int64()),
        ("seed", pa.int64()),
        ("parameters", pa.int64()),
        ("host", pa.string()),
        ("revision", pa.string()),
        ("versions", pa.string()),
        ("config", pa.string()),
        ("measurements", pa.int64()),
        ("measured_seconds", pa.float64()),
        ("elapsed_seconds", pa.float64()),
        ("ended", pa.timestamp("us", tz="UTC")),
    ],
    metadata=_metadata("attempts"),
)
FAILURES = pa.schema(
    [
        *MOMENT.items(),
        ("part", pa.string()),
        ("error", pa.string()),
        ("traceback", pa.string()),
    ],
    metadata=_metadata("failures"),
)
STIMULI = pa.schema(
    [
        ("stimulus", pa.string()),
        ("sequence", pa.int32()),
        ("period", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        # Of labelled stimuli: which part of the sequences it is in, how many of the tokens are no
        # padding, where it is from (sequences of one source are alike), and by concept what each
        # token is.
        ("split", pa.int32()),
        ("length", pa.int32()),
        ("source", pa.int32()),
        ("labels", pa.map_(pa.string(), pa.list_(pa.int8()))),
    ],
    metadata=_metadata("stimuli"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """When and where in a run something was measured.

    `tokens` counts the training tokens seen so far (None: unknown), `time` is in UTC.
    """

    run: str
    attempt: int
    step: int
    tokens: int | None
    time: datetime

    def columns(self) -> dict[str, Any]:
        """The values of the columns that every measured row begins with."""
        return {name: getattr(self, name) for name in MOMENT}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One probe's table at one step of one run."""

    spec: ProbeSpec
    moment: Moment
    table: pa.Table

    @classmethod
    def build(cls, spec: ProbeSpec, moment: Moment, columns: Mapping[str, Any]) -> Reading:
        """Puts a probe's columns under its declared schema.

        `columns` holds `validity` and `n`, every dimension and every declared column: arrays with
        one entry a row (rows of numbers for fields `per` an axis), or None for what could not be
        measured at all, as may be single entries of a list. Columns of fields that the declaration
        leaves out are dropped. A value that was measured and is not finite is stored as null and
        makes its row invalid: nobody should average over it unawares.
        """
        validity = np.array(columns["validity"], dtype=object)
        for field in spec.fields:
            if columns[field.name] is not None and field.is_number:
                numbers, measured = _numbers(columns[field.name])
                wrong = measured & ~np.isfinite(numbers) & (validity == "ok")
                validity[wrong] = f"{field.name} is not finite"
        moments = moment.columns()
        arrays = []
        for column in spec.schema:
            if column.name in moments:
                arrays.append(
                    pa.repeat(pa.scalar(moments[column.name], column.type), len(validity))
                )
            elif column.name == "validity":
                arrays.append(pa.array(validity, type=column.type))
            elif columns[column.name] is None:
                arrays.append(pa.nulls(len(validity), column.type))
            else:
                arrays.append(_array(columns[column.name], column.type))
        return cls(spec=spec, moment=moment, table=pa.Table.from_arrays(arrays, schema=spec.schema))


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A probe (or a sink) that raised; `part` is its name."""

    part: str
    error: str
    traceback: str

    @classmethod
    def of(cls, part: str, error: Exception) -> Failure:
        """The failure of `part` that this exception was."""
        return cls(
            part=part,
            error=f"{type(error).__name__}: {error}",
            traceback="".join(traceback.format_exception(error)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """All that one measurement gave: the readings, what failed, the seconds that each probe took,
    and how many of them went into `intervening`.
    """

    moment: Moment
    readings: tuple[Reading, ...] = ()
    failures: tuple[Failure, ...] = ()
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    intervening: float = 0.0

    def with_failure(self, failure: Failure) -> Measurement:
        """The same measurement, in which this failed too."""
        return dataclasses.replace(self, failures=(*self.failures, failure))

    def frame(self, table: str) -> pd.DataFrame:
        """One table of the measurement as a data frame."""
        by_name = {reading.spec.name: reading for reading in self.readings}
        expect_one_of("table of this measurement", table, list(by_name))
        frame: pd.DataFrame = by_name[table].table.to_pandas()
        return frame

    def failure_table(self) -> pa.Table:
        """The failures as rows of the `failures` table."""
        moment = self.moment.columns()
        rows = [moment | dataclasses.asdict(failure) for failure in self.failures]
        return pa.Table.from_pylist(rows, schema=FAILURES)


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    if pa.types.is_list(kind):
        rows = [None if row is None else _array(row, kind.value_type).to_pylist() for row in values]
        return pa.array(rows, type=kind)
    if pa.types.is_string(kind):
        return pa.array(values, type=kind)
    numbers, measured = _numbers(values)
    return pa.array(numbers, mask=~(measured & np.isfinite(numbers))).cast(kind)


def _numbers(values: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The values as numbers, and which of them there are: the others were None."""
    numbers = np.asarray(values)
    if numbers.dtype != object:
        return numbers, np.ones(numbers.shape, dtype=bool)
    measured = np.array([value is not None for value in numbers])
    return np.where(measured, numbers, 0).astype(np.float64), measured


def dims_of(schema: pa.Schema) -> list[str]:
    """Names of the dimensions of a table with this schema."""
    declared = json.loads((schema.metadata or {}).get(METADATA_KEY, b"{}"))
    return [dim["name"] for dim in declared.get("probe", {}).get("dims", ())]


def is_ours(schema: pa.Schema) -> bool:
    """Whether a Parquet file with this schema was written by phasewatch."""
    return METADATA_KEY in (schema.metadata or {})
