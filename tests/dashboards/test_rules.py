"""Rules and configurations: accepted by the programs that read them and made of metrics that exist,
and every alert tried where it is to fire and where it is not.
"""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from dashboards import ALERTMANAGER_CONFIG, PROMETHEUS_CONFIG, RULES
from monitor.detection.table import BROKEN
from monitor.detection.table import SPEC as TRANSITIONS
from monitor.probes import OPTIONAL, PROBES
from monitor.service.following import Folder
from monitor.service.showing import Shown
from tests.monitor.sinks.fabricated import measurement
from tests.programs import program
from tests.recorded import page

TRIED = Path(__file__).with_name("alerts.yml")
GROUPS = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
RECORDED = {r["record"]: r for group in GROUPS for r in group["rules"] if "record" in r}
ALERTS = {r["alert"]: r for group in GROUPS for r in group["rules"] if "alert" in r}


def run(*command) -> str:
    """What a program printed that is to succeed."""
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def declared(make) -> set[str]:
    """The names of all metrics there can be, without their rows."""
    specs = [*(probe.spec for probe in (*PROBES, *OPTIONAL)), TRANSITIONS]
    names = {f"phasewatch_{spec.name}_not_interpretable" for spec in specs}
    for spec in specs:
        for field in spec.fields:
            if field.is_number:
                names |= {spec.metric(column) for column in field.columns}
                if [dim.name for dim in spec.dims] == ["layer", "head"]:
                    names |= {spec.metric(field.name, f"_layer_{how}") for how in ("max", "mean")}
    sink = make()
    sink.write(measurement(1, failures=["heads"]))
    of_tables = ("phasewatch_heads_", "phasewatch_losses_")
    served = {line.split("{")[0] for line in page(sink.url).splitlines() if line[0] != "#"}
    told = Shown(Folder(Path("nowhere")), 1).page().text("")[0].decode()
    names |= set(re.findall(r"^# TYPE (\S+)", told, flags=re.MULTILINE))
    return names | {name for name in served if not name.startswith(of_tables)}


def test_rules_are_accepted():
    said = run(program("promtool"), "check", "rules", *RULES)
    assert f"{len(ALERTS)} rules found" in said
    assert f"{len(RECORDED)} rules found" in said


def test_the_configuration_of_alertmanager_is_accepted():
    said = run(program("amtool"), "check-config", ALERTMANAGER_CONFIG)
    assert "SUCCESS" in said
    named = re.findall(r"Phasewatch\w+", ALERTMANAGER_CONFIG.read_text())
    assert named
    assert set(named) <= set(ALERTS)


def test_both_stay_on_this_machine():
    configuration = yaml.safe_load(PROMETHEUS_CONFIG.read_text())
    (alertmanager,) = configuration["alerting"]["alertmanagers"]
    assert alertmanager["static_configs"] == [{"targets": ["127.0.0.1:9093"]}]
    addresses = re.findall(r"listen-address=([\w.]*)", ALERTMANAGER_CONFIG.read_text())
    assert set(addresses) == {"127.0.0.1", ""}


def test_what_rules_name_exists(make):
    known = declared(make) | set(RECORDED)
    for rule in (*RECORDED.values(), *ALERTS.values()):
        expression = rule["expr"]
        for pattern in re.findall(r'__name__=~"([^"]+)"', expression):
            assert any(re.fullmatch(pattern, name) for name in known), pattern
        words = re.sub(r'"[^"]*"', "", expression)
        for name in re.findall(r"[\w:]*phasewatch_[\w:]+", words):
            assert name in known, f"{name} is no metric that is declared"
        for series in re.findall(r'series!?="([^"]*)"', expression):
            assert series == BROKEN


def test_an_unknown_metric_would_be_noticed(make):
    known = declared(make)
    assert "phasewatch_induction_prefix_matching_null" in known
    assert "phasewatch_failures_total" in known
    assert "phasewatch_induction_prefix" not in known
    assert "phasewatch_heads_score" not in known


def test_every_alert_fires_where_it_is_to_and_only_there(tmp_path):
    (tmp_path / "rules").mkdir()
    for path in RULES:
        content = yaml.safe_load(path.read_text())
        for group in content["groups"]:
            for rule in group["rules"]:
                rule.pop("annotations", None)
        (tmp_path / "rules" / path.name).write_text(yaml.safe_dump(content))
    (tmp_path / TRIED.name).write_text(TRIED.read_text())
    assert "SUCCESS" in run(program("promtool"), "test", "rules", tmp_path / TRIED.name)


def test_every_rule_is_tried():
    tests = yaml.safe_load(TRIED.read_text())["tests"]
    tried = [each for test in tests for each in test.get("alert_rule_test", ())]
    assert {each["alertname"] for each in tried if each.get("exp_alerts")} == set(ALERTS)
    assert {each["alertname"] for each in tried if not each.get("exp_alerts")} == set(ALERTS)
    asked = " ".join(e["expr"] for test in tests for e in test.get("promql_expr_test", ()))
    # That one is tried by the alert that is made of it alone.
    assert {name for name in RECORDED if name not in asked} == {
        "run_table:phasewatch_not_interpretable:sum"
    }


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_what_it_means_what_fools_it_and_what_to_do(name):
    alert = ALERTS[name]
    assert alert["labels"]["severity"] in ("info", "warning", "critical")
    assert set(alert["annotations"]) == {"summary", "description"}
    assert "{{ $labels.run }}" in alert["annotations"]["summary"]
    said = re.fullmatch(
        r"Meaning: (.+\.) Fooled by: (.+\.) Do: (.+\.)", alert["annotations"]["description"]
    )
    assert said
    assert all(len(part) > 15 for part in said.groups())
