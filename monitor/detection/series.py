"""What is followed through a run: numbers, one a measurement, each a query over the tables."""

from __future__ import annotations

import math
from dataclasses import dataclass

import duckdb

from monitor.names import check_label

_ERRORS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """What one series was at some step, and its standard error, 0 where that is not known."""

    series: str
    value: float
    stderr: float = 0.0

    @property
    def least(self) -> float:
        """The height of a change from which on it is seen on other sequences as well. An error of
        the change itself would be smaller, as both its ends are of the same sequences.
        """
        return _ERRORS * self.stderr


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A number that is followed through a run.

    >>> second = Series(
    ...     name="induction in layer 1",
    ...     query="select step, max(prefix_matching) as value from induction "
    ...     "where layer = 1 group by step",
    ... )

    Attributes:
        name: what it is called.
        query: SQL over the tables of a run that gives columns `step` and `value`, one row a step,
            or with `part` one row a step and part, each a series of its own. As it is asked at each
            measurement, of that one alone, and again of all measurements, it has to group by step.
            With `stderr` too, the standard error of the value, changes are claimed only where they
            are twice as large: on other sequences smaller ones might not be there.

    How far a series scatters from one measurement to the next is no standard error, as the
    sequences are the same at every step; it is seen in the series itself.

    Raises:
        TypeError, ValueError: the name or the query is of no use.
    """

    name: str
    query: str

    def __post_init__(self) -> None:
        check_label(self.name, "a series", "induction in layer 1")
        if not isinstance(self.query, str):
            raise TypeError(f"series {self.name!r}: query={self.query!r:.80}; expected SQL as text")

    @classmethod
    def best(
        cls,
        name: str,
        table: str,
        field: str,
        *,
        by: str = "",
        where: str = "true",
        stderr: bool = True,
    ) -> Series:
        """The largest value of a field at each step, of all valid rows or of those with the same
        `by`, a dimension; `stderr` says whether the field has a standard error.
        """
        error = f", arg_max({field}_stderr, {field}) as stderr" if stderr else ""
        part = f"{by} as part, " if by else ""
        group = f", {by}" if by else ""
        return cls(
            name=name,
            query=f"select step, {part}max({field}) as value{error} from {table} "  # noqa: S608 -- ours
            f"where validity = 'ok' and {where} group by step{group}",
        )

    def values(self, connection: duckdb.DuckDBPyConnection) -> dict[int, list[Value]]:
        """What it is at every step that the tables of a connection hold, by step; nothing where
        they lack one that the query reads.

        Raises:
            ValueError: the query fails, or gives other columns or several values for one step.
        """
        try:
            found = connection.execute(self.query)
            columns = [column[0] for column in found.description or ()]
            rows = [dict(zip(columns, row, strict=True)) for row in found.fetchall()]
        except duckdb.CatalogException:
            return {}
        except duckdb.Error as error:
            raise ValueError(f"series {self.name!r}: its query failed: {error}") from error
        if not {"step", "value"} <= {*columns} <= {"step", "value", "part", "stderr"}:
            raise ValueError(
                f"series {self.name!r}: its query gives {', '.join(columns)}; expected step and "
                "value, part where one step has several, and stderr where it is known"
            )
        by_step: dict[int, dict[str, Value]] = {}
        for row in rows:
            if row["value"] is None or not math.isfinite(row["value"]):
                continue
            name = self.name if row.get("part") is None else f"{self.name}: {row['part']}"
            at = by_step.setdefault(row["step"], {})
            if name in at:
                raise ValueError(
                    f"series {name!r} has several values at step {row['step']}; expected one: "
                    "group by step, and give as part what else tells them apart"
                )
            at[name] = Value(
                series=name, value=float(row["value"]), stderr=_known(row.get("stderr"))
            )
        return {step: list(at.values()) for step, at in sorted(by_step.items())}


def _known(stderr: float | None) -> float:
    return float(stderr) if stderr is not None and math.isfinite(stderr) else 0.0


SERIES = (
    Series.best("induction head", "induction", "beyond_position"),
    Series.best("previous-token head", "induction", "previous_token"),
    Series.best("in-context learning", "in_context", "paired_score"),
    Series.best("loss on repeats", "in_context", "repeat_later"),
    Series.best("participation ratio", "residual", "participation_ratio", by="layer"),
    Series.best("concept", "concepts", "auc", by="concept", where="method = 'diff_in_means'"),
)
"""What is followed unless a user says otherwise.

The training loss is none of them: it follows the learning rate and the data as much as the model,
and what it says of these is in the labels. `Series.best("training loss", "optimisation", "loss",
where="family = 'all'", stderr=False)` follows it where optimisers are watched.
"""


def values_of(
    series: Series, connection: duckdb.DuckDBPyConnection
) -> tuple[dict[int, list[Value]], ValueError | None]:
    """The values of a series by step, and what went wrong with it. Of our own series only those are
    there whose probes and fields were asked for, which is no failure.
    """
    try:
        return series.values(connection), None
    except ValueError as error:
        return {}, None if series in SERIES else error
