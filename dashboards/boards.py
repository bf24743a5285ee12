"""The dashboards, by name: which table is on which, and what else is on each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dashboards import panels, queries
from dashboards.queries import RUN, Asked, Query
from monitor.detection import SPEC as TRANSITIONS
from monitor.probes import OPTIONAL, PROBES
from monitor.record import ProbeSpec

SPECS = {spec.name: spec for spec in (*(p.spec for p in (*PROBES, *OPTIONAL)), TRANSITIONS)}

# A new probe is shown once it has a line here; a test misses it until then.
SHOWN_ON = {
    "induction": "induction",
    "in_context": "induction",
    "logit_lens": "features",
    "residual": "features",
    "sparse_probing": "features",
    "copying": "heads",
    "composition": "induction",
    "attribution": "heads",
    "ablation": "induction",
    "heads": "heads",
    "circuit": "induction",
    "concepts": "features",
    "directions": "features",
    "geometry": "features",
    "analogies": "features",
    "superposition": "features",
    "neurons": "features",
    "top_neurons": "features",
    "grokking": "transitions",
    "parameters": "transitions",
    "optimisation": "overview",
    "dictionary": "features",
    "learning_coefficient": "transitions",
    "transitions": "transitions",
}

_SMALL, _WIDE, _WHOLE, _THIRD, _SIXTH = (6, 4), (18, 8), (24, 8), (8, 8), (4, 4)


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under one heading, each with its width and height."""

    title: str
    sized: Sequence[tuple[Any, tuple[int, int]]]
    closed: bool = True

    @property
    def panels(self) -> list[Any]:
        """The panels from left to right."""
        return [panel for panel, _ in self.sized]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Of each panel its width, of 24 columns, and its height."""
        return [size for _, size in self.sized]


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """One dashboard."""

    name: str
    title: str
    description: str
    rows: Callable[[], Iterator[Row]]


def _of_tables(board: str) -> Iterator[Row]:
    """A row for each table that is shown on a dashboard."""
    for name, spec in SPECS.items():
        if SHOWN_ON.get(name) == board:
            yield _of_table(spec)


def _of_table(spec: ProbeSpec) -> Row:
    numbers = [field for field in spec.fields if field.is_number]
    sized: list[tuple[Any, tuple[int, int]]] = [(panels.not_interpretable(spec), (6, 8))]
    if any(field.null for field in numbers):
        sized.append((panels.beyond_null(spec), _WIDE))
    if [dim.name for dim in spec.dims] == ["layer", "head"]:
        sized += [(panels.layers(spec, field), _THIRD) for field in numbers]
    sized += [(panels.over_time(spec, field), _THIRD) for field in numbers]
    title = spec.name.replace("_", " ").capitalize()
    return Row(f"{title}: {spec.source}", sized)


def _by_step(*names: str) -> Row:
    """Fields of tables without dimensions along the steps, as scraped."""
    chosen = [name.split(".") for name in names]
    made = [panels.trend(SPECS[table], SPECS[table].field(field)) for table, field in chosen]
    return Row("By step, as scraped", [(panel, _THIRD) for panel in made], closed=False)


def _stored_by_layer(*names: str) -> Row:
    """Fields of tables of layers along the steps, as stored."""
    sized = []
    for table, field in (name.split(".") for name in names):
        spec = SPECS[table]
        asked = queries.series(table, field, by="layer", runs=["$run"])
        title = f"{field.replace('_', ' ')} of {table.replace('_', ' ')}, by step"
        made = panels.stored(title, spec, spec.field(field), asked, "layer")
        sized.append((made, _THIRD))
    return Row("By step, as stored", sized, closed=False)


def _overview() -> Iterator[Row]:
    def latest(metric: str) -> Query:
        return Query(ref="A", expr=f"max({metric}{{{RUN}}})", legend="", latest=True)

    best = Query(
        ref="A", expr=f"run:phasewatch_induction_beyond_null:max{{{RUN}}}", legend="best head"
    )
    score = Query(
        ref="A", expr=f"run:phasewatch_in_context_score_nats:max{{{RUN}}}", legend="score"
    )
    ages = f"time() - max(phasewatch_last_measurement_timestamp_seconds{{{RUN}}})"
    numbers = (
        ("Step", "Training step of the latest measurement.", "none", latest("phasewatch_step")),
        ("Tokens", "Training tokens seen until then.", "short", latest("phasewatch_tokens")),
        (
            "Since the last measurement",
            "How long ago that was. **Fooled by:** clocks that differ.",
            "s",
            Query(ref="A", expr=ages, legend="", latest=True),
        ),
        (
            "Longest gap, within a minute",
            "Time from the first to the last measurement of the latest minute; the alert of stalled "
            "training is made of it.",
            "s",
            latest("run:phasewatch_measurement_gap_seconds:max"),
        ),
        (
            "Provisional transitions",
            "Series in which a change seems to have begun. **Fooled by:** trends that bend within "
            "few measurements.",
            "none",
            latest("run:phasewatch_transitions_provisional:sum"),
        ),
        (
            "Confirmed transitions",
            "Series in which a change holds, or something has formed; breaks of the chain of "
            "checkpoints are none. **Fooled by:** whatever else changed then: see their labels.",
            "none",
            latest("run:phasewatch_transitions_confirmed:sum"),
        ),
    )
    yield Row("Now", [(panels.number(*each), _SIXTH) for each in numbers], closed=False)
    induction, in_context = SPECS["induction"], SPECS["in_context"]
    yield Row(
        "What forms",
        [
            (
                panels.plain(
                    "Prefix matching of the best head, beyond its null",
                    "How much more the best head looks where induction heads do than it would on "
                    f"other tokens; 0 is the null. **Fooled by:** "
                    f"{induction.field('prefix_matching').fooled_by} "
                    f"**Source:** {induction.source}.",
                    "none",
                    [best],
                ),
                (12, 8),
            ),
            (
                panels.plain(
                    "In-context score",
                    f"{in_context.field('score').help} **Null:** 0. **Fooled by:** "
                    f"{in_context.field('score').fooled_by} **Source:** {in_context.source}.",
                    "suffix: nats",
                    [score],
                ),
                (12, 8),
            ),
        ],
        closed=False,
    )
    info = Query(ref="A", expr=f"phasewatch_run_info{{{RUN}}}", legend="", latest=True)
    told = "The run, its attempts and its model, from the labels of a metric."
    yield Row("The run", [(panels.rows("Run", told, info), (24, 5))])
    yield from _of_tables("overview")


def _induction() -> Iterator[Row]:
    yield _by_step("in_context.score", "in_context.paired_score", "in_context.repeat_later")
    yield from _of_tables("induction")


def _heads() -> Iterator[Row]:
    spec, sized = SPECS["induction"], []
    for field in ("prefix_matching", "previous_token", "first_token"):
        asked = queries.series("induction", field, by="head", runs=["$run"], layer="$one")
        title = f"{field.replace('_', ' ')} of the heads of a layer, by step"
        sized.append((panels.stored(title, spec, spec.field(field), asked, "head"), _THIRD))
    yield Row("All heads of a layer by step, as stored", sized, closed=False)
    yield from _of_tables("heads")


def _features() -> Iterator[Row]:
    yield _stored_by_layer(
        "residual.participation_ratio", "logit_lens.kl", "superposition.dimensionality"
    )
    yield from _of_tables("features")


def _transitions() -> Iterator[Row]:
    names = ("time", "step", "series", "state", "kind", "direction", "began", "onset", "midpoint")
    columns = {
        name: (
            name,
            "timestamp"
            if name == "time"
            else "number"
            if name == "step" or (name in _NUMBERS_OF_TRANSITIONS)
            else "string",
        )
        for name in (*names, "end", "width", "height", "delta_bic", "label", "checkpoints")
    }
    table = panels.rows(
        "What was said",
        f"{TRANSITIONS.help} **Fooled by:** see label. **Source:** {TRANSITIONS.source}.",
        Asked(path="/api/transitions?run=$run", columns=columns),
    )
    state = Query(
        ref="A",
        expr='max by (series) (phasewatch_transitions_provisional{run="$run"}'
        ' + 2 * phasewatch_transitions_confirmed{run="$run"})',
        legend="{{series}}",
    )
    timeline = panels.states(
        "State of each series",
        "Provisional while a change seems to have begun, confirmed once it still holds some "
        f"measurements later. **Source:** {TRANSITIONS.source}.",
        state,
        {"0": ("none", "#808080"), "1": ("provisional", "orange"), "2": ("confirmed", "red")},
    )
    yield Row("Transitions", [(timeline, (24, 9)), (table, (24, 9))], closed=False)
    yield from _of_tables("transitions")
    yield _by_step(
        "grokking.held_out_loss",
        "grokking.restricted_loss",
        "learning_coefficient.estimate",
        "parameters.norm",
    )


_NUMBERS_OF_TRANSITIONS = {field.name for field in TRANSITIONS.fields if field.is_number}


def _compare() -> Iterator[Row]:
    induction = SPECS["induction"]
    yield Row(
        "The best heads of many runs",
        [(panels.of_runs(induction, field), _THIRD) for field in induction.fields],
        closed=False,
    )
    for name, spec in SPECS.items():
        if not spec.dims:
            sized = []
            for field in (field for field in spec.fields if field.is_number):
                asked = queries.series(name, field.name, by="run", runs=["$run", "$other"])
                title = f"{field.name.replace('_', ' ')} of two runs, by step"
                sized.append((panels.stored(title, spec, field, asked, "run"), _THIRD))
            yield Row(
                f"{name.replace('_', ' ').capitalize()} of two runs by step, as stored", sized
            )


def _health() -> Iterator[Row]:
    def of(title: str, told: str, unit: str, expr: str, legend: str) -> Any:
        asked = Query(ref="A", expr=expr, legend=legend)
        return panels.plain(title, told, unit, [asked]), (12, 8)

    names = ("run", "state", "first_step", "last_step", "tokens", "time", "measurements")
    numbers = {
        "first_step",
        "last_step",
        "tokens",
        "measurements",
        "attempts",
        "seed",
        "parameters",
    }
    runs = panels.rows(
        "Runs",
        "Every run under the folder of the service: running until nothing was written for five of "
        "its usual intervals, then finished or stalled. **Fooled by:** copied runs begin anew.",
        Asked(
            path="/api/runs",
            columns={
                name: (name, "number" if name in numbers else "string")
                for name in (*names, "attempts", "seed", "model", "parameters")
            },
        ),
    )
    alerts = Query(
        ref="A", expr='ALERTS{alertname=~"Phasewatch.+"}', legend="{{alertname}}", latest=True
    )
    yield Row(
        "Runs and alerts",
        [
            (runs, (12, 8)),
            (
                panels.rows("Alerts", "Alerts that are pending or firing, of all runs.", alerts),
                (12, 8),
            ),
        ],
        closed=False,
    )
    yield Row(
        "Measuring",
        [
            of(
                "What each probe costs",
                "Seconds that each probe of the latest measurement took, forward passes included.",
                "s",
                f"max by (probe) (phasewatch_probe_duration_seconds{{{RUN}}})",
                "{{probe}}",
            ),
            of(
                "Failures",
                "Probes and sinks that raised, since the attempt began. The table failures says why.",
                "none",
                f"max by (part) (phasewatch_failures_total{{{RUN}}})",
                "{{part}}",
            ),
            of(
                "Series that are dropped",
                "Series left out for the series budget, summed over measurements. Parquet has all.",
                "none",
                f"max(phasewatch_series_dropped_total{{{RUN}}})",
                "dropped",
            ),
            of(
                "Rows that cannot be interpreted",
                "Rows of the latest measurement whose validity is not ok, by table.",
                "none",
                f"run_table:phasewatch_not_interpretable:sum{{{RUN}}}",
                "{{table}}",
            ),
        ],
        closed=False,
    )
    yield Row(
        "Scraping",
        [
            of(
                "Whether it answers",
                "1 while a run is scraped, 0 once it does not answer.",
                "none",
                'up{job="phasewatch"}',
                "{{run}}",
            ),
            of(
                "How long a scrape takes",
                "Seconds for a page of metrics.",
                "s",
                'scrape_duration_seconds{job="phasewatch"}',
                "{{run}}",
            ),
        ],
        closed=False,
    )


_LEGEND = (
    "Solid lines are values, dashed ones their nulls; dotted lines and bands are intervals, set by "
    "the variable Interval. Each panel says what fools its number."
)

BOARDS = (
    Board(
        name="overview",
        title="Overview",
        description=f"Where a run is, and what forms in it. {_LEGEND}",
        rows=_overview,
    ),
    Board(
        name="induction",
        title="Induction and in-context learning",
        description=f"Heads that copy from before, and what the context is good for. {_LEGEND}",
        rows=_induction,
    ),
    Board(
        name="heads",
        title="Heads",
        description=f"What single attention heads do, and what is claimed of them. {_LEGEND}",
        rows=_heads,
    ),
    Board(
        name="features",
        title="Features and superposition",
        description=f"What is represented where, by neurons and directions. {_LEGEND}",
        rows=_features,
    ),
    Board(
        name="transitions",
        title="Transitions",
        description=f"What was said of sudden changes, and progress measures. {_LEGEND}",
        rows=_transitions,
    ),
    Board(
        name="compare",
        title="Compare runs",
        description=f"Several runs by time, and two by step. {_LEGEND}",
        rows=_compare,
    ),
    Board(
        name="health",
        title="Service health",
        description="Whether runs are measured, scraped and served.",
        rows=_health,
    ),
)
