"""What `/openapi.json` says, which is valid and holds for every answer of a real run."""

import urllib.parse

import jsonschema
import openapi_spec_validator
import pytest
import torch

from monitor.detection import table
from monitor.measure import Monitor
from monitor.record import Measurement
from monitor.service import Service
from monitor.sinks import ParquetSink
from tests.callbacks.tiny import TinyLM, text
from tests.monitor.detection.made_up import notice
from tests.monitor.service.served import ask, refused
from tests.monitor.sinks.fabricated import moment
from tests.programs import wait_for
from tests.recorded import get


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """Two runs of all that is measured by default, in one of which something was noticed."""
    root = tmp_path_factory.mktemp("runs")
    for run in ("a", "b"):
        torch.manual_seed(0)
        model = TinyLM()
        with Monitor(root, run=run, text=text(), sequences=4, false_alarms=None) as watch:
            for step in (0, 10, 20):
                assert watch.measure(model, step=step, tokens=100 * step).failures == ()
    when = moment(20, run="a")
    said = table.reading([notice("provisional", 20, 10), notice("retracted", 20, 0, "x")], when)
    ParquetSink(root, "a").write(Measurement(moment=when, readings=(said,)))
    made = Service(root, port=0)
    yield made
    made.close()


def schema(service, path, kind="application/json"):
    answers = ask(service, "/openapi.json")["paths"][path]["get"]["responses"]["200"]["content"]
    return answers[kind]["schema"]


def check(service, path, **query):
    told = ask(service, path, **query)
    jsonschema.validate(told, schema(service, path), cls=jsonschema.Draft202012Validator)
    return told


def test_the_description_is_valid(service):
    openapi_spec_validator.validate(ask(service, "/openapi.json"))


def test_what_is_described_is_served(service):
    for path, methods in ask(service, "/openapi.json")["paths"].items():
        told = methods["get"]
        if path == "/api/events":
            continue
        if any(parameter["required"] for parameter in told["parameters"]):
            assert refused(service, path)[0] == 400
            continue
        kind = get(f"{service.url}{path}")[1]
        (described,) = told["responses"]["200"]["content"]
        assert kind.split(";")[0] == described
        if described == "application/json":
            check(service, path)


def test_every_table_and_number_of_a_run(service):
    tables = check(service, "/api/tables", run="a")
    assert len(tables) > 10
    for told in tables:
        for form in ("columns", "json"):
            check(service, "/api/rows", run="a", table=told["name"], format=form)
        lists = [field["name"] for field in told["fields"] if field["per"]]
        if lists:
            rows = check(service, "/api/rows", run="a", table=told["name"], field=lists)
            assert {*lists} <= {*rows["columns"]}
        numbers = [f["name"] for f in told["fields"] if not (f["per"] or f["text"])]
        for number, axis in zip(numbers, ["step", "tokens", "time"] * len(numbers), strict=False):
            asked = {"run": "a", "table": told["name"], "field": number, "axis": axis}
            for form in ("columns", "json"):
                assert check(service, "/api/series", **asked, format=form)


@pytest.mark.parametrize("axis", ["step", "tokens", "time"])
def test_changes(service, axis):
    assert len(check(service, "/api/transitions", run=["a", "b"], axis=axis)) == 2


@pytest.mark.parametrize("axis", ["step", "tokens"])
def test_leads(service, axis):
    asked = {"run": ["a", "b"], "axis": axis}
    wait_for(lambda: check(service, "/api/leads", **asked)["ready"], "leads")


def test_errors(service):
    described = ask(service, "/openapi.json")["components"]["schemas"]["Error"]
    for path, query in (
        ("/api/tables", {"run": "x"}),
        ("/api/series", {"run": "a", "table": "induction", "field": "x"}),
        ("/nowhere", {}),
    ):
        jsonschema.validate(refused(service, path, **query)[1], described)


def test_what_is_not_json_is_what_it_is_said_to_be(service):
    asked = {"run": "a", "table": "induction", "field": "entropy", "format": "csv"}
    _, kind = get(f"{service.url}/api/series?{urllib.parse.urlencode(asked)}")
    assert kind.split(";")[0] == "text/csv"
    assert schema(service, "/api/series", "text/csv") == {"type": "string"}
