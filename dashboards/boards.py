"""The dashboards, by name, and what is on each beside the rows of its tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dashboards import panels, queries
from dashboards.panels import Built
from dashboards.queries import RUN, Asked, Query
from dashboards.rows import SPECS, THIRD, Row, by_step, of_tables, stored_by_layer
from monitor.detection import SPEC as TRANSITIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """One dashboard."""

    name: str
    title: str
    description: str
    rows: Callable[[], Iterator[Row]]


def _overview() -> Iterator[Row]:
    def number(title: str, told: str, unit: str, expr: str) -> tuple[Built, tuple[int, int]]:
        asked = Query(ref="A", expr=expr, legend="", latest=True)
        return panels.number(title, told, unit, asked), (4, 4)

    last = f"phasewatch_last_measurement_timestamp_seconds{{{RUN}}}"
    gap = (
        "Time from the first to the last measurement of the latest minute, else 0. **Fooled by:** "
    )
    begun = "Series in which a change seems to have begun. **Fooled by:** trends that bend within "
    held = "Series in which a change holds or something has formed. **Fooled by:** whatever else "
    of_chain = "changed then: see their labels. Breaks of the chain of checkpoints are not counted."
    yield Row(
        "Now",
        [
            number("Step", "Of the latest measurement.", "none", _highest("phasewatch_step")),
            number("Tokens", "Trained on until then.", "short", _highest("phasewatch_tokens")),
            number(
                "Since the last measurement",
                "How long ago that was. **Fooled by:** clocks that differ.",
                "s",
                f"time() - max({last})",
            ),
            number(
                "Gap before it",
                f"{gap}a minute in which several were made.",
                "s",
                _highest("run:phasewatch_measurement_gap_seconds:max"),
            ),
            number(
                "Provisional transitions",
                f"{begun}few measurements.",
                "none",
                _highest("run:phasewatch_transitions_provisional:sum"),
            ),
            number(
                "Confirmed transitions",
                f"{held}{of_chain}",
                "none",
                _highest("run:phasewatch_transitions_confirmed:sum"),
            ),
        ],
        closed=False,
    )
    forming = (
        ("induction", "prefix_matching", "run:phasewatch_induction_beyond_null:max", "best head"),
        ("in_context", "score", "run:phasewatch_in_context_score_nats:max", "score"),
    )
    told = {
        "best head": ("Prefix matching beyond its null", "of the best head, minus its null."),
        "score": ("In-context score", "below 0 the context is used."),
    }
    made: list[tuple[Built, tuple[int, int]]] = []
    for table, name, metric, legend in forming:
        spec, (title, drawn) = SPECS[table], told[legend]
        description = panels.description_of(spec, spec.field(name), drawn)
        unit = panels.unit_of(spec.field(name))
        asked = Query(ref="A", expr=f"{metric}{{{RUN}}}", legend=legend)
        made.append((panels.plain(title, description, unit, [asked]), (12, 8)))
    yield Row("What forms", made, closed=False)
    info = Query(ref="A", expr=f"phasewatch_run_info{{{RUN}}}", legend="", latest=True)
    run = "The run, its attempts and its model, from the labels of a metric."
    yield Row("The run", [(panels.listing("Run", run, info), (24, 5))])
    yield from of_tables("overview")


def _highest(metric: str) -> str:
    return f"max({metric}{{{RUN}}})"


def _induction() -> Iterator[Row]:
    yield by_step("in_context.score", "in_context.paired_score", "in_context.repeat_later")
    yield from of_tables("induction")


def _heads() -> Iterator[Row]:
    spec, sized = SPECS["induction"], []
    for field in ("prefix_matching", "previous_token", "first_token"):
        asked = queries.series("induction", field, by="head", runs=["$run"], layer="$one")
        title = f"{field.replace('_', ' ')} of the heads of a layer, by step"
        sized.append((panels.stored(title, spec, spec.field(field), asked, "head"), THIRD))
    yield Row("All heads of a layer by step, as stored", sized, closed=False)
    yield from of_tables("heads")


def _features() -> Iterator[Row]:
    yield stored_by_layer(
        "residual.participation_ratio", "logit_lens.kl", "superposition.dimensionality"
    )
    yield from of_tables("features")


def _transitions() -> Iterator[Row]:
    numbers = {"step", *(field.name for field in TRANSITIONS.fields if field.is_number)}
    kinds = dict.fromkeys(numbers, "number") | {"time": "timestamp"}
    names: tuple[str, ...] = ("time", "step", "series", "state", "kind", "direction")
    names += ("began", "label", "onset", "midpoint", "end", "width", "height", "delta_bic")
    table = panels.listing(
        "What was said",
        f"{TRANSITIONS.help} **Fooled by:** see label. **Source:** {TRANSITIONS.source}.",
        Asked(
            path="/api/transitions?run=$run",
            columns={n: (n, kinds.get(n, "string")) for n in names},
        ),
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
    yield from of_tables("transitions")
    yield by_step(
        "grokking.held_out_loss",
        "grokking.restricted_loss",
        "learning_coefficient.estimate",
        "parameters.norm",
    )


def _compare() -> Iterator[Row]:
    induction = SPECS["induction"]
    yield Row(
        "The best heads of many runs",
        [(panels.of_runs(induction, field), THIRD) for field in induction.fields],
        closed=False,
    )
    for name, spec in SPECS.items():
        if not spec.dims:
            sized = []
            for field in (field for field in spec.fields if field.is_number):
                asked = queries.series(name, field.name, by="run", runs=["$run", "$other"])
                title = f"{field.name.replace('_', ' ')} of two runs, by step"
                sized.append((panels.stored(title, spec, field, asked, "run"), THIRD))
            yield Row(
                f"{name.replace('_', ' ').capitalize()} of two runs by step, as stored", sized
            )


def _health() -> Iterator[Row]:
    def of(
        title: str, told: str, unit: str, expr: str, legend: str
    ) -> tuple[Built, tuple[int, int]]:
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
    runs = panels.listing(
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
                panels.listing("Alerts", "Alerts that are pending or firing, of all runs.", alerts),
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
                "Probes and sinks that raised in this attempt. The table failures says why.",
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
                "Series that the service leaves out",
                "Of the latest measurement, those for which its page has no room.",
                "none",
                f"max(phasewatch_series_left_out{{{RUN}}})",
                "left out",
            ),
            of(
                "Whether it has ended",
                "1 once the run was closed, 0 before that and where it was killed.",
                "none",
                f"max(phasewatch_run_finished{{{RUN}}})",
                "ended",
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
                "1 while a run, or the service, is scraped; 0 once it does not answer.",
                "none",
                'up{job=~"phasewatch.*"}',
                "{{job}} {{run}}",
            ),
            of(
                "How long a scrape takes",
                "Seconds for a page of metrics.",
                "s",
                'scrape_duration_seconds{job=~"phasewatch.*"}',
                "{{job}} {{run}}",
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
