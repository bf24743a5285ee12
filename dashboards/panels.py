"""Panels of Grafana, made from declarations. Needs the extra `dev`: the SDK builds what is shipped,
and is not needed to use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from grafana_foundation_sdk.builders import common, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import statetimeline as timeline
from grafana_foundation_sdk.builders import trend as trends
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.variants import Dataquery
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import prometheus as promql
from grafana_foundation_sdk.models import table as tables
from grafana_foundation_sdk.models.common import DataSourceRef

from dashboards import queries
from dashboards.queries import Asked, Query
from monitor.record import Field, ProbeSpec

PROMETHEUS = DataSourceRef(type_val="prometheus", uid="${prometheus}")
INFINITY = DataSourceRef(type_val="yesoreyeram-infinity-datasource", uid="${infinity}")

# Where a run can be seen along its steps, and points be picked.
LIVE_PAGE = "${service}/?run=${run}"

# Of layer N it is the colour N modulo 8: each differs from the others for most who do not see all
# colours, and stands out from Grafana's dark and light backgrounds by 3 to 1 at least.
LAYERS = (
    "#0072B2",
    "#D55E00",
    "#00875F",
    "#C0529A",
    "#7A6BD1",
    "#A6761D",
    "#2E8FBF",
    "#D6336C",
)
_MOST_LAYERS = 128
_GREY = "#808080"
# Below the null and above it; neither is good or bad by itself.
BELOW, ABOVE = "#9D7660", "#3B7DD8"

_UNITS = {"": "none", "seconds": "s"}

Built: TypeAlias = Builder[models.Panel]
_Lines: TypeAlias = timeseries.Panel | trends.Panel
_Asking: TypeAlias = _Lines | stat.Panel | timeline.Panel
_Config = models.DynamicConfigValue


class Infinity(Dataquery, Builder[Dataquery]):
    """A query of the Infinity plugin, which the SDK does not know."""

    def __init__(self, asked: Asked, ref: str = "A") -> None:
        self._asked, self._ref = asked, ref

    def build(self) -> Dataquery:
        """The query itself."""
        return self

    def to_json(self) -> dict[str, object]:
        """As Infinity has it in a dashboard."""
        return {
            "refId": self._ref,
            "datasource": INFINITY,
            "type": "json",
            "source": "url",
            "parser": "backend",
            "format": "table",
            # Below the address of the data source.
            "url": self._asked.path,
            "url_options": {"method": "GET", "data": ""},
            "root_selector": "",
            "columns": [
                {"selector": selector, "text": name, "type": kind}
                for name, (selector, kind) in self._asked.columns.items()
            ],
            "filters": [],
        }


def unit_of(field: Field) -> str:
    """The unit of a field as Grafana names it: where it knows none it is written after the value.

    >>> unit_of(Field(name="loss", help="A loss.", unit="nats"))
    'suffix:nats'
    """
    return _UNITS.get(field.unit, f"suffix:{field.unit}")


def description_of(spec: ProbeSpec, field: Field, drawn: str) -> str:
    """What a panel says of a number: what it is, its null, what fools it, and from which paper."""
    parts = (
        field.help,
        f"**Null:** {field.null}." if field.null else "",
        f"**Fooled by:** {field.fooled_by}" if field.fooled_by else "",
        f"**Source:** {spec.source}.",
        f"**Drawn:** {drawn}",
    )
    return "\n\n".join(part for part in parts if part)


def over_time(spec: ProbeSpec, field: Field) -> Built:
    """A field with its interval and its null, as it was scraped."""
    asked = queries.of_field(spec, field)
    rows = f"; of the {queries.MOST} rows that reached most" if "topk(" in asked[0].expr else ""
    drawn = _drawn(asked) + rows + "."
    panel = _lines(_words(field.name), description_of(spec, field, drawn), field)
    _ask(panel, asked)
    _style(panel, spec, asked)
    return _linked(panel)


def layers(spec: ProbeSpec, field: Field) -> Built:
    """The best head and the mean of each layer."""
    drawn = "thick the best head of each layer, thin the mean of its heads, dashed the null."
    asked = queries.by_layer(spec, field)
    title = f"{_words(field.name)} by layer"
    panel = _lines(title, description_of(spec, field, drawn), field)
    _ask(panel, asked)
    _style(panel, spec, asked)
    panel.override_by_query("B", [_THIN])
    return _linked(panel)


def of_runs(spec: ProbeSpec, field: Field) -> Built:
    """The best head of each of several runs."""
    asked = queries.best_of_runs(spec, field)
    drawn = "solid the best head of each run, dashed the highest null of its heads."
    title = f"best {_words(field.name)} by run"
    panel = _lines(title, description_of(spec, field, drawn), field)
    _ask(panel, asked)
    panel.override_by_query("N", [_THIN, _DASHED])
    return panel


def plain(title: str, description: str, unit: str, asked: Sequence[Query]) -> Built:
    """Lines over time of what no probe declares."""
    panel = _lines(title, description, None).unit(unit)
    _ask(panel, asked)
    return panel


def number(title: str, description: str, unit: str, asked: Query) -> Built:
    """One number: the latest."""
    panel = stat.Panel().title(title).description(description).unit(unit).datasource(PROMETHEUS)
    panel.color_mode(options.BigValueColorMode.NONE).graph_mode(options.BigValueGraphMode.NONE)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    _ask(panel, [asked])
    return panel


def beyond_null(spec: ProbeSpec) -> Built:
    """By how much each field is beyond its null now, coloured there."""
    asked = queries.beyond_null(spec)
    panel = stat.Panel().title("Beyond the null, now").datasource(PROMETHEUS)
    panel.description(
        f"{spec.help} Each number minus its null, of the row farthest above it; the colour "
        "changes at the null, which is 0 here. **Fooled by:** noise, and the choice of the best "
        f"of many rows: look at the interval. **Source:** {spec.source}."
    )
    steps = [models.Threshold(color=BELOW), models.Threshold(value=0, color=ABOVE)]
    panel.thresholds(builders.ThresholdsConfig().steps(steps)).unit("none").decimals(3)
    panel.color_scheme(_colour(models.FieldColorModeId.THRESHOLDS))
    panel.color_mode(options.BigValueColorMode.VALUE).graph_mode(options.BigValueGraphMode.NONE)
    panel.text_mode(options.BigValueTextMode.VALUE_AND_NAME)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    _ask(panel, asked)
    for query in asked:
        if (unit := unit_of(spec.field(query.ref))) != "none":
            panel.override_by_query(query.ref, [_Config(id_val="unit", value=unit)])
    return panel


def not_interpretable(spec: ProbeSpec) -> Built:
    """How many rows of a table cannot be interpreted now."""
    return number(
        "Rows that cannot be interpreted",
        f"Rows of {spec.name} whose validity is not ok at the latest measurement: they are not "
        f"shown. The table says why. **Fooled by:** nothing. **Source:** {spec.source}.",
        "short",
        queries.not_interpretable(spec),
    )


def trend(spec: ProbeSpec, field: Field) -> Built:
    """A field along the steps of one attempt, from what was scraped.

    Trend draws nothing where steps repeat or fall. They do repeat, as a page is scraped several
    times before the next measurement: of what was scraped at one step the last is taken.
    """
    asked = queries.along_steps(spec, field)
    names = [query.legend for query in asked[1:]]
    drawn = _drawn(asked) + "; one attempt of the run, by step."
    title = f"{_words(field.name)} by step"
    panel = _along(title, description_of(spec, field, drawn), field, x="step")
    panel.datasource(PROMETHEUS)
    _ask(panel, asked)
    taken = {name: {"aggregations": ["lastNotNull"], "operation": "aggregate"} for name in names}
    of_steps = {"step": {"aggregations": [], "operation": "groupby"}} | taken
    panel.transformations(
        [
            _transformer("joinByField", byField="Time", mode="outer"),
            _transformer("groupBy", fields=of_steps),
            _transformer("sortBy", fields={}, sort=[{"field": "step", "desc": False}]),
            _transformer("renameByRegex", regex="(.*) \\(lastNotNull\\)", renamePattern="$1"),
        ]
    )
    for query in asked[1:]:
        # What is joined is of no single query any more.
        if properties := _STYLES_OF_ONE.get(query.ref):
            panel.override_by_name(query.legend, list(properties))
    panel.color_scheme(_colour(models.FieldColorModeId.FIXED).fixed_color(ABOVE))
    return _linked(panel)


def stored(title: str, spec: ProbeSpec, field: Field, asked: Asked, by: str) -> Built:
    """A field along the steps as it is stored, from the service; one line for each `by`."""
    drawn = f"as stored, by step; one line for each {by}. Prometheus need not have scraped it."
    panel = _along(title, description_of(spec, field, drawn), field, x=f"step\\{by}")
    panel.datasource(INFINITY).with_target(Infinity(asked))
    # Another run may have been measured at other steps: between those of one there are gaps.
    panel.span_nulls(by == "run")
    panel.transformations(
        [
            _transformer(
                "groupingToMatrix",
                columnField=by,
                rowField="step",
                valueField="value",
                emptyValue="null",
            ),
            _transformer("sortBy", fields={}, sort=[{"field": f"step\\{by}", "desc": False}]),
            _transformer("renameByRegex", regex="^(-?\\d+)$", renamePattern=f"{by} $1"),
        ]
    )
    if by == "layer":
        _colour_layers(panel)
    return _linked(panel)


def listing(title: str, description: str, asked: Asked | Query) -> Built:
    """A table, of the service or of the latest values."""
    panel = table.Panel().title(title).description(description).unit("none")
    panel.cell_options(options.TableAutoCellOptions())
    # Grafana's tables have none any more, and the SDK's have.
    made = panel.build().options
    if isinstance(made, tables.Options):
        made.footer = None
    if isinstance(asked, Asked):
        return panel.datasource(INFINITY).with_target(Infinity(asked))
    panel.datasource(PROMETHEUS)
    query = _promql(asked).format(promql.PromQueryFormat.TABLE)
    return panel.with_target(query)


def states(
    title: str, description: str, asked: Query, meanings: dict[str, tuple[str, str]]
) -> Built:
    """When something was in which state: `meanings` of its values, with colours."""
    panel = timeline.Panel().title(title).description(description).unit("none")
    mapped = {
        value: models.ValueMappingResult(text=text, color=colour, index=index)
        for index, (value, (text, colour)) in enumerate(meanings.items())
    }
    panel.datasource(PROMETHEUS).mappings([models.ValueMap(options=mapped)])
    panel.color_scheme(_colour(models.FieldColorModeId.THRESHOLDS))
    _ask(panel, [asked])
    return panel


_THIN = _Config(id_val="custom.lineWidth", value=1)
_NO_LINE = _Config(id_val="custom.lineWidth", value=0)
_DASHED = _Config(id_val="custom.lineStyle", value={"fill": "dash", "dash": [10, 6]})
_DOTTED = _Config(id_val="custom.lineStyle", value={"fill": "dash", "dash": [2, 6]})
_NO_LEGEND = _Config(
    id_val="custom.hideFrom", value={"legend": True, "tooltip": False, "viz": False}
)
_AROUND = (_THIN, _DOTTED, _NO_LEGEND)
# By the names of queries.
_STYLES = {
    "L": _AROUND,
    "H": _AROUND,
    "N": (_THIN, _DASHED, _NO_LEGEND),
    "M": _AROUND,
    "P": _AROUND,
}
# Of one line there is room for more: a band, and the null in the legend.
_STYLES_OF_ONE = _STYLES | {
    "L": (_NO_LINE, _NO_LEGEND),
    "H": (
        _NO_LINE,
        _NO_LEGEND,
        _Config(id_val="custom.fillOpacity", value=18),
        _Config(id_val="custom.fillBelowTo", value="low"),
    ),
    "N": (_THIN, _DASHED),
}


def _lines(title: str, description: str, field: Field | None) -> timeseries.Panel:
    panel = timeseries.Panel().title(title).description(description).datasource(PROMETHEUS)
    _draw_as_lines(panel, field)
    return panel


def _along(title: str, description: str, field: Field, *, x: str) -> trends.Panel:
    panel = trends.Panel().title(title).description(description).x_field(x)
    axis = _Config(id_val="custom.axisLabel", value="step")
    panel.override_by_name(x, [_Config(id_val="unit", value="none"), axis])
    _draw_as_lines(panel, field)
    return panel


def _draw_as_lines(panel: _Lines, field: Field | None) -> None:
    panel.line_width(2).show_points(options.VisibilityMode.AUTO).fill_opacity(0)
    panel.color_scheme(_colour(models.FieldColorModeId.PALETTE_CLASSIC_BY_NAME))
    panel.legend(
        common.VizLegendOptions()
        .display_mode(options.LegendDisplayMode.LIST)
        .placement(options.LegendPlacement.BOTTOM)
        .show_legend(True)
    )
    panel.tooltip(common.VizTooltipOptions().mode(options.TooltipDisplayMode.MULTI))
    if field is not None:
        panel.unit(unit_of(field))
        if field.low is not None:
            panel.axis_soft_min(field.low)


def _style(panel: timeseries.Panel, spec: ProbeSpec, asked: Sequence[Query]) -> None:
    styles = _STYLES if spec.dims else _STYLES_OF_ONE
    for query in asked:
        if properties := styles.get(query.ref):
            panel.override_by_query(query.ref, list(properties))
    if any(dim.name == "layer" for dim in spec.dims):
        _colour_layers(panel)
    if not spec.dims:
        panel.color_scheme(_colour(models.FieldColorModeId.FIXED).fixed_color(ABOVE))


def _colour_layers(panel: _Lines) -> None:
    for index, colour in enumerate(LAYERS):
        numbers = "|".join(map(str, range(index, _MOST_LAYERS, len(LAYERS))))
        fixed = {"mode": "fixed", "fixedColor": colour}
        panel.override_by_regexp(
            f"/\\blayer ({numbers})\\b/", [_Config(id_val="color", value=fixed)]
        )
    embedded = {"mode": "fixed", "fixedColor": _GREY}
    panel.override_by_regexp("/\\blayer -1\\b/", [_Config(id_val="color", value=embedded)])


def _colour(mode: models.FieldColorModeId) -> builders.FieldColor:
    return builders.FieldColor().mode(mode)


def _transformer(name: str, **given: object) -> models.DataTransformerConfig:
    return models.DataTransformerConfig(id_val=name, options=given)


def _ask(panel: _Asking, asked: Sequence[Query]) -> None:
    for query in asked:
        panel.with_target(_promql(query))


def _promql(query: Query) -> prometheus.Dataquery:
    built = prometheus.Dataquery().expr(query.expr).ref_id(query.ref).datasource(PROMETHEUS)
    built.legend_format(query.legend).editor_mode(promql.QueryEditorMode.CODE)
    return built.instant() if query.latest else built.range()


def _drawn(asked: Sequence[Query]) -> str:
    refs = {query.ref for query in asked}
    parts = {"N": "dashed the null", "L": "dotted or shaded the interval", "M": "dotted the null's"}
    return ", ".join(["solid the value", *(text for ref, text in parts.items() if ref in refs)])


def _linked(panel: _Lines) -> Built:
    link = builders.DashboardLink("By step, on the live page").url(LIVE_PAGE).target_blank(True)
    return panel.links([link.type(models.DashboardLinkType.LINK)])


def _words(name: str) -> str:
    return name.replace("_", " ")
