"""What panels ask: PromQL over the metrics of a declaration, and JSON of the service."""

from __future__ import annotations

import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from monitor.record import Dim, Field, ProbeSpec

RUN = 'run="$run"'
RUNS = 'run=~"$runs"'

# Without other attempts of the run: a metric of each process says which it is. Steps of one attempt
# only rise; where the next goes on from a checkpoint they fall. What the service serves says no
# attempt, and stays.
_ATTEMPT = 'unless on (run, instance) phasewatch_run_info{run="$run",attempt!="$attempt"}'

# So many rows of a table are drawn, those that reached most in the time shown.
MOST = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One query of Prometheus: `ref` is its name in the panel, `legend` that of its series.

    `latest`: it is asked for the latest value alone.
    """

    ref: str
    expr: str
    legend: str
    latest: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One question to the service: a path with its parameters, and the columns of the answer that
    are shown, by the names under which they are: pairs of a name and a type of Infinity's.
    """

    path: str
    columns: dict[str, tuple[str, str]]


def label_of(dims: Sequence[Dim]) -> str:
    """What series of these dimensions are called; of words the word alone.

    >>> label_of([Dim(name="concept", help="", text=True), Dim(name="layer", help="")])
    '{{concept}} layer {{layer}}'
    """
    names = ("" if dim.text else f"{dim.name.replace('_', ' ')} " for dim in dims)
    return " ".join(f"{name}{{{{{dim.name}}}}}" for name, dim in zip(names, dims, strict=True))


def of_field(spec: ProbeSpec, field: Field, *, run: str = RUN) -> list[Query]:
    """The value of a field, its interval, its null and how far that scatters.

    Where there may be many rows those with the highest values in the time shown are asked for, of
    fields that can be negative those farthest from 0 at its end.
    """
    names = ", ".join(dim.name for dim in spec.dims)
    within = _selector(spec, run)

    def of(column: str) -> str:
        return f"{_max(names)} ({spec.metric(column)}{within})"

    chosen = ""
    if any(dim.name != "layer" for dim in spec.dims):
        shown = f"{spec.metric(field.name)}{within}[$__range] @ end()"
        most = f"max_over_time({shown})" if field.low == 0 else f"abs(last_over_time({shown}))"
        chosen = f" and topk({MOST}, {_max(names)} ({most}))"
    return _with_uncertainty(field, of, chosen, label_of(spec.dims))


def along_steps(spec: ProbeSpec, field: Field) -> list[Query]:
    """The field of a table without dimensions in one attempt, and the steps at which it was."""

    def of(column: str) -> str:
        return in_attempt(spec.metric(column))

    step = Query(ref="S", expr=in_attempt("phasewatch_step"), legend="step")
    return [step, *_with_uncertainty(field, of, "", "")]


def in_attempt(metric: str) -> str:
    """The highest value of a metric in the chosen attempt of the run."""
    return f"max({metric}{{{RUN}}} {_ATTEMPT})"


def by_layer(spec: ProbeSpec, field: Field) -> list[Query]:
    """Of heads: the best and the mean of each layer, and the highest null of its heads."""
    within = _selector(spec, RUN)
    best, mean = (spec.metric(field.name, f"_layer_{how}") for how in ("max", "mean"))
    queries = [
        Query(ref="A", expr=f"max by (layer) ({best}{within})", legend="layer {{layer}} best"),
        Query(ref="B", expr=f"max by (layer) ({mean}{within})", legend="layer {{layer}} mean"),
    ]
    if field.null:
        null = spec.metric(f"{field.name}_null")
        expr = f"max by (layer) ({null}{within})"
        queries.append(Query(ref="N", expr=expr, legend="layer {{layer}} null"))
    return queries


def best_of_runs(spec: ProbeSpec, field: Field) -> list[Query]:
    """The best head of each of several runs, and the highest null."""
    best = f"max by (run) ({spec.metric(field.name, '_layer_max')}{{{RUNS}}})"
    null = f"max by (run) ({spec.metric(f'{field.name}_null')}{{{RUNS}}})"
    return [
        Query(ref="A", expr=best, legend="{{run}}"),
        Query(ref="N", expr=null, legend="{{run}} null"),
    ]


def beyond_null(spec: ProbeSpec) -> list[Query]:
    """Of each field that has a null: by how much the row that is farthest above it is so, now."""
    within = _selector(spec, RUN)

    def of(column: str) -> str:
        return spec.metric(column) + within

    return [
        Query(
            ref=field.name,
            expr=f"max({of(field.name)} - {of(f'{field.name}_null')})",
            legend=field.name.replace("_", " "),
            latest=True,
        )
        for field in spec.fields
        if field.is_number and field.null
    ]


def not_interpretable(spec: ProbeSpec) -> Query:
    """Rows of the latest measurement that cannot be interpreted."""
    metric = f"phasewatch_{spec.name}_not_interpretable"
    return Query(ref="A", expr=f"max({metric}{{{RUN}}})", legend=spec.name, latest=True)


def series(table: str, field: str, *, by: str, runs: Sequence[str], **dims: str) -> Asked:
    """A field along the steps, one series for each `by`, from the service."""
    pairs = [*(("run", run) for run in runs), ("table", table), ("field", field), *dims.items()]
    return Asked(
        path=f"/api/series?{urllib.parse.urlencode([*pairs, ('axis', 'step')], safe='${}')}",
        columns={
            "step": ("axis", "number"),
            by: (by, "string"),
            "value": ("value", "number"),
        },
    )


def _with_uncertainty(
    field: Field, of: Callable[[str], str], chosen: str, name: str
) -> list[Query]:
    value, name = of(field.name), f"{name} " if name else ""
    queries = [Query(ref="A", expr=value + chosen, legend=name.strip() or "value")]
    if field.stderr:
        spread = f"$band * {of(f'{field.name}_stderr')}"
        queries += [
            Query(ref="L", expr=f"({value} - {spread}){chosen}", legend=f"{name}low"),
            Query(ref="H", expr=f"({value} + {spread}){chosen}", legend=f"{name}high"),
        ]
    if field.null:
        null = of(f"{field.name}_null")
        queries.append(Query(ref="N", expr=null + chosen, legend=f"{name}null"))
    if field.null_sd:
        spread = f"$band * {of(f'{field.name}_null_sd')}"
        queries += [
            Query(ref="M", expr=f"({null} - {spread}){chosen}", legend=f"{name}null low"),
            Query(ref="P", expr=f"({null} + {spread}){chosen}", legend=f"{name}null high"),
        ]
    return queries


def _selector(spec: ProbeSpec, run: str) -> str:
    layer = ',layer=~"$layer"' if any(dim.name == "layer" for dim in spec.dims) else ""
    return f"{{{run}{layer}}}"


def _max(names: str) -> str:
    # The same row may be scraped twice, of the process and of the service, or of two attempts.
    return f"max by ({names})" if names else "max"
