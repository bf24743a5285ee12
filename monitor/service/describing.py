"""What is served, for people and programs: the endpoints with their parameters and answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from monitor.service import leading
from monitor.service.charting import AXES, FORMATS

Schema = dict[str, Any]

_JSON, _CSV, _TEXT = "application/json", "text/csv", "text/plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """Something in a query; `repeats` where it can be there several times."""

    help: str
    schema: Schema
    needed: bool = False
    repeats: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One path: what it answers, by content type, and what it takes."""

    help: str
    answers: Mapping[str, Schema]
    takes: Mapping[str, Parameter]
    others: str = ""
    """What parameters of any other name are, where there may be some."""


def _of(*kinds: str) -> Schema:
    return {"type": [*kinds] if len(kinds) > 1 else kinds[0]}


def _one_of(*values: str, default: str) -> Schema:
    return {"type": "string", "enum": [*values], "default": default}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _object(optional: Mapping[str, Schema] | None = None, /, **needed: Schema) -> Schema:
    """An object of these keys, and no others."""
    return {
        "type": "object",
        "properties": {**needed, **(optional or {})},
        "required": [*needed],
        "additionalProperties": False,
    }


def _whole(least: int, most: int | None = None, default: int | None = None) -> Schema:
    bounds = {"minimum": least, "maximum": most, "default": default}
    return {"type": "integer"} | {k: v for k, v in bounds.items() if v is not None}


_TEXTS, _NUMBER, _COUNT = _of("string"), _of("number", "null"), _of("integer", "null")
_WORD, _YES = _of("string", "null"), _of("boolean")
_NUMBERS = _list(_NUMBER)
_VALUE: Schema = {"type": ["number", "string", "null", "array"]}
_DIM = _of("string", "integer", "null")

_FIELD = _object(
    name=_TEXTS,
    help=_TEXTS,
    unit=_TEXTS,
    low=_NUMBER,
    high=_NUMBER,
    null=_TEXTS,
    fooled_by=_TEXTS,
    stderr=_YES,
    null_sd=_YES,
    per=_TEXTS,
    text=_YES,
)
_RUN = _object(
    run=_TEXTS,
    state={"type": "string", "enum": ["running", "finished", "stalled"]},
    guessed=_YES,
    ended=_WORD,
    first_step=_COUNT,
    last_step=_COUNT,
    tokens=_COUNT,
    time=_WORD,
    measurements=_of("integer"),
    attempts=_of("integer"),
    seed=_COUNT,
    model=_WORD,
    parameters=_COUNT,
)
_TABLE = _object(
    table=_TEXTS,
    files=_of("integer"),
    name=_TEXTS,
    help=_TEXTS,
    source=_TEXTS,
    dims=_list(_object(name=_TEXTS, help=_TEXTS, text=_YES)),
    fields=_list(_FIELD),
    needs=_list(_list(_TEXTS)),
    reads=_list(_TEXTS),
    weights=_YES,
    interventions=_YES,
    lasting=_YES,
    training=_YES,
)
_POINT: Schema = {
    "type": "object",
    "properties": {
        "run": _TEXTS,
        "axis": {"type": ["number", "string", "null"]},
        "value": _NUMBER,
        "stderr": _NUMBER,
        "null": _NUMBER,
        "null_sd": _NUMBER,
        "validity": _TEXTS,
    },
    "required": ["run", "axis", "value", "validity"],
    "additionalProperties": _DIM,
}
_LINES = _object(
    table=_TEXTS,
    field=_FIELD,
    axis={"type": "string", "enum": [*AXES]},
    series=_list(
        _object(
            {"stderr": _NUMBERS, "null": _NUMBERS, "null_sd": _NUMBERS, "validity": _list(_TEXTS)},
            run=_TEXTS,
            dims={"type": "object", "additionalProperties": _DIM},
            axis=_NUMBERS,
            value=_NUMBERS,
        )
    ),
)
_ROWS = _object(
    table=_TEXTS,
    run=_TEXTS,
    step=_of("integer"),
    steps=_list(_of("integer")),
    columns={"type": "object", "additionalProperties": _list(_VALUE)},
)
_SAID: Schema = {
    "type": "object",
    "properties": {
        "run": _TEXTS,
        "step": _of("integer"),
        "series": _TEXTS,
        "state": {"type": "string", "enum": ["provisional", "confirmed", "retracted"]},
        "kind": {"type": "string", "enum": ["change", "formation", "break"]},
        "direction": {"type": ["string", "null"]},
        "validity": _TEXTS,
        "at": {"type": "object", "additionalProperties": _NUMBER},
    },
    "required": ["run", "step", "series", "state", "kind", "direction", "validity", "at"],
    "additionalProperties": _VALUE,
}
_KIND = {"type": "string", "enum": [*leading.MEANING]}
_LEADS = _object(
    axis={"type": "string", "enum": [*leading.AXES]},
    ready=_YES,
    meaning=_object(**dict.fromkeys(leading.MEANING, _TEXTS)),
    runs=_list(_object(run=_TEXTS, ready=_YES, until=_COUNT, error=_WORD)),
    within=_list(
        _object(
            run=_TEXTS,
            kind=_KIND,
            first=_TEXTS,
            then=_TEXTS,
            lead=_NUMBER,
            lead_low=_NUMBER,
            lead_high=_NUMBER,
            sure=_YES,
        )
    ),
    over=_list(
        _object(
            kind=_KIND,
            first=_TEXTS,
            then=_TEXTS,
            runs=_of("integer"),
            before=_of("integer"),
            after=_of("integer"),
            unclear=_of("integer"),
            timed=_of("integer"),
            median=_NUMBER,
            least=_NUMBER,
            most=_NUMBER,
            resolution=_NUMBER,
            validity=_TEXTS,
        )
    ),
)
_STATUS = _object(status={"const": "ok"})
_ERROR = _object(error=_TEXTS, expected=_TEXTS, do=_TEXTS)

_ONE_RUN = Parameter(help="Name of a run.", schema=_TEXTS, needed=True)
_SOME_RUNS = Parameter(help="Names of runs.", schema=_TEXTS, needed=True, repeats=True)
_OF_TABLE = Parameter(help="Name of a table.", schema=_TEXTS, needed=True)
_AXIS = Parameter(
    help="Along what; time is in seconds since the epoch where it is a number.",
    schema=_one_of(*AXES, default="step"),
)

ENDPOINTS: dict[str, Endpoint] = {
    "/runs": Endpoint(
        help="The runs, as a page without scripts.", answers={"text/html": _TEXTS}, takes={}
    ),
    "/api/runs": Endpoint(
        help="Every run and its state; guessed where only the times of its files tell it.",
        answers={_JSON: _list(_RUN)},
        takes={},
    ),
    "/api/tables": Endpoint(
        help="The tables of a run, as their probes declare them.",
        answers={_JSON: _list(_TABLE)},
        takes={"run": _ONE_RUN},
    ),
    "/api/series": Endpoint(
        help="A field along an axis: rows of points, or columns by series.",
        answers={_JSON: {"oneOf": [_list(_POINT), _LINES]}, _CSV: _TEXTS},
        takes={
            "run": _SOME_RUNS,
            "table": _OF_TABLE,
            "field": Parameter(help="A field that is a number.", schema=_TEXTS, needed=True),
            "axis": _AXIS,
            "points": Parameter(
                help="The most points of a series: the lowest and the highest of every stretch.",
                schema=_whole(4, 100_000, 1_000),
            ),
            "top": Parameter(
                help="Of each run only so many series, of those that were ever furthest above "
                "their null, the furthest first.",
                schema=_whole(1, 1_000),
            ),
            "format": Parameter(
                help="Rows of points, or columns by series.",
                schema=_one_of(*FORMATS, default="json"),
            ),
        },
        others="The value of a dimension, such as layer=3.",
    ),
    "/api/rows": Endpoint(
        help="The rows of a table at the last measurement at or before a step.",
        answers={
            _JSON: {
                "oneOf": [_ROWS, _list({"type": "object", "additionalProperties": _VALUE})],
            },
            _CSV: _TEXTS,
        },
        takes={
            "run": _ONE_RUN,
            "table": _OF_TABLE,
            "step": Parameter(help="By default the last one.", schema=_whole(0)),
            "field": Parameter(
                help="Only these, and what goes with them. Lists of numbers are told only where "
                "they are named here.",
                schema=_TEXTS,
                repeats=True,
            ),
            "format": Parameter(
                help="Columns, or rows.", schema=_one_of(*FORMATS, default="columns")
            ),
        },
    ),
    "/api/transitions": Endpoint(
        help="What was said of changes, in order of steps. at: the places of a row that are steps, "
        "on the axis, as if tokens and time passed evenly between measurements.",
        answers={_JSON: _list(_SAID)},
        takes={"run": _SOME_RUNS, "axis": _AXIS},
    ),
    "/api/leads": Endpoint(
        help="Which transitions came before which, and by how much: within each run, and over the "
        "runs. What is not ready yet is being worked out: ask again.",
        answers={_JSON: _LEADS},
        takes={
            "run": _SOME_RUNS,
            "axis": Parameter(help="In what.", schema=_one_of(*leading.AXES, default="step")),
        },
    ),
    "/api/events": Endpoint(
        help="Server-sent events. measurement: a new one, {run, step, tables}, once its tables are "
        "there. state: a run is in another one, {run, state}, gone where it is not there any more.",
        answers={"text/event-stream": _TEXTS},
        takes={},
    ),
    "/metrics": Endpoint(
        help="The latest values of all runs, for Prometheus.", answers={_TEXT: _TEXTS}, takes={}
    ),
    "/healthz": Endpoint(help="Whether the service lives.", answers={_JSON: _STATUS}, takes={}),
    "/readyz": Endpoint(help="Whether the root can be read.", answers={_JSON: _STATUS}, takes={}),
    "/openapi.json": Endpoint(
        help="This description.", answers={_JSON: {"type": "object"}}, takes={}
    ),
}


def described() -> dict[str, Any]:
    """All of it as an OpenAPI document."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "phasewatch",
            "version": "1",
            "description": "Every run under a folder, as far as it was measured. Read-only.",
        },
        "paths": {path: {"get": _described(of)} for path, of in ENDPOINTS.items()},
        "components": {"schemas": {"Error": _ERROR}},
    }


def _described(endpoint: Endpoint) -> dict[str, Any]:
    parameters = [
        {
            "name": name,
            "in": "query",
            "description": of.help,
            "required": of.needed,
            "schema": _list(of.schema) if of.repeats else of.schema,
        }
        for name, of in endpoint.takes.items()
    ]
    if endpoint.others:
        parameters.append(
            {
                "name": "dimensions",
                "in": "query",
                "description": endpoint.others,
                "required": False,
                "style": "form",
                "explode": True,
                "schema": {"type": "object", "additionalProperties": {"type": "string"}},
            }
        )
    answers = {kind: {"schema": schema} for kind, schema in endpoint.answers.items()}
    wrong = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    responses = {"200": {"description": endpoint.help, "content": answers}}
    if endpoint.takes:
        responses["400"] = {"description": "What was wrong with the query.", "content": wrong}
        responses["404"] = {"description": "There is no such run.", "content": wrong}
    return {"summary": endpoint.help, "parameters": parameters, "responses": responses}
