"""What dashboards can be set to, and what they mark in time: variables and annotations."""

from __future__ import annotations

import re
from typing import TypeAlias

from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import prometheus
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.variants import Dataquery
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.common import DataSourceRef

from dashboards.panels import INFINITY, PROMETHEUS, Infinity
from dashboards.queries import Asked

_Variable: TypeAlias = Builder[models.VariableModel]


class _Tags(Dataquery, Builder[Dataquery]):
    """Grafana's own annotations that have all of these tags; the SDK has no such query."""

    def __init__(self, tags: list[str]) -> None:
        self._tags = tags

    def build(self) -> Dataquery:
        return self

    def to_json(self) -> dict[str, object]:
        tags = {"type": "tags", "tags": self._tags, "matchAny": False, "limit": 100}
        return {"refId": "Anno", "queryType": "annotations", **tags}


def variables(used: str) -> list[_Variable]:
    """Those variables that are named in a text, `$run` or `${run}`."""
    named = set(re.findall(r"\$\{?(\w+)", used))
    # These say what others are asked about.
    named |= {"prometheus", "run"}
    return [made for name, made in _variables().items() if name in named]


def marks() -> list[Builder[models.AnnotationQuery]]:
    """Transitions, as they were scraped; and, to be switched on, at their exact times."""
    provisional = 'phasewatch_transitions_provisional{run="$run"} == 1'
    confirmed = 'phasewatch_transitions_confirmed{run="$run"} == 1'
    confirmed += f" unless {confirmed.replace(' == 1', '')} offset 1m == 1"
    own = DataSourceRef(type_val="grafana", uid="-- Grafana --")
    asked = Asked(
        path="/api/transitions?run=$run",
        columns={
            "time": ("time", "timestamp"),
            "title": ("series", "string"),
            "text": ("state", "string"),
            "tags": ("direction", "string"),
        },
    )
    return [
        _scraped("Provisional transitions", provisional, "orange"),
        _scraped("Confirmed transitions", confirmed, "red"),
        builders.AnnotationQuery()
        .name("Transitions at their exact time, from the service")
        .datasource(INFINITY)
        .enable(False)
        .icon_color("purple")
        .target(Infinity(asked, "Anno")),
        builders.AnnotationQuery()
        .name("Transitions at their exact time, from GrafanaSink")
        .datasource(own)
        .enable(False)
        .icon_color("blue")
        .target(_Tags(["phasewatch", "$run"])),
    ]


def _scraped(name: str, expr: str, colour: str) -> builders.AnnotationQuery:
    query = prometheus.Dataquery().expr(expr).ref_id("Anno").datasource(PROMETHEUS).range()
    return (
        builders.AnnotationQuery()
        .name(name)
        .datasource(PROMETHEUS)
        .enable(True)
        .icon_color(colour)
        .target(query)
        .title_format("{{series}}")
        .text_format("{{run}}")
        .tag_keys("series")
    )


def _variables() -> dict[str, _Variable]:
    made: dict[str, _Variable] = {
        "prometheus": _source("prometheus", "Prometheus", "prometheus", "phasewatch-prometheus"),
        "infinity": _source(
            "infinity", "Service", "yesoreyeram-infinity-datasource", "phasewatch-service"
        ),
        "run": _labels("run", "Run", "phasewatch_step, run"),
        # In the other order, so that at first it is another one.
        "other": _labels("other", "Beside", "phasewatch_step, run").sort(
            models.VariableSort.NATURAL_ASC
        ),
        "runs": _labels("runs", "Runs", "phasewatch_step, run")
        .multi(True)
        .include_all(True)
        .current(models.VariableOption(text=["All"], value=["$__all"])),
        "attempt": _labels(
            "attempt", "Attempt", 'phasewatch_run_info{run="$run"}, attempt'
        ).description("By step one attempt is drawn: steps fall where another goes on."),
        "layer": _labels("layer", "Layers", '{__name__=~"phasewatch_.+",run="$run"}, layer')
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .sort(models.VariableSort.NUMERICAL_ASC)
        .current(models.VariableOption(text=["All"], value=["$__all"])),
        "one": _labels(
            "one", "Layer by step", 'phasewatch_induction_entropy_nats{run="$run"}, layer'
        )
        .sort(models.VariableSort.NUMERICAL_ASC)
        .description("By step the heads of one layer are drawn."),
        "band": builders.CustomVariable("band")
        .label("Interval")
        .description("Standard errors to both sides of a value, and deviations of a null.")
        .values("95% : 1.96, one standard error : 1, none : NaN")
        .current(models.VariableOption(text="95%", value="1.96")),
        "service": builders.TextBoxVariable("service")
        .label("Live page")
        .description("Where the service is seen from your browser.")
        .default_value("http://127.0.0.1:8787")
        .current(
            models.VariableOption(text="http://127.0.0.1:8787", value="http://127.0.0.1:8787")
        ),
    }
    return made


def _source(name: str, label: str, kind: str, uid: str) -> builders.DatasourceVariable:
    current = models.VariableOption(text=uid, value=uid)
    return builders.DatasourceVariable(name).label(label).type(kind).current(current)


def _labels(name: str, label: str, of: str) -> builders.QueryVariable:
    query = f"label_values({of})"
    return (
        builders.QueryVariable(name)
        .label(label)
        .datasource(PROMETHEUS)
        .query({"query": query, "refId": "StandardVariableQuery"})
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.NATURAL_DESC)
    )
