"""The composition of containers, without any: what it mounts and names is there, what its programs
read they accept, and the service runs from what its image is made of.
"""

import fnmatch
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import compose_spec
import pytest
import yaml

from tests.dashboards.test_rules import RULES, run
from tests.monitor.sinks.fabricated import measurement
from tests.programs import Server, free_port, program, started, wait_for
from tests.recorded import get, page

HERE = Path(__file__).parents[2]
FILE = HERE / "docker-compose.yml"
COMPOSE = yaml.safe_load(FILE.read_text())
SERVICES = COMPOSE["services"]
DOCKERFILE = (HERE / "Dockerfile").read_text()


def mounts(name):
    """What is bound into a container: sources by target, and whether each can be written."""
    for volume in SERVICES[name].get("volumes", ()):
        if isinstance(volume, dict):
            yield volume["target"], volume["source"], volume.get("read_only", False)
        else:
            source, target, *mode = volume.split(":")
            if source not in COMPOSE["volumes"]:
                yield target, source, mode == ["ro"]


def inside(name, path):
    """The file of this machine that a container sees at a path."""
    for target, source, _ in mounts(name):
        if PurePosixPath(path).is_relative_to(target):
            return HERE / source / PurePosixPath(path).relative_to(target)
    return None


def option(name, option):
    return next(o.split("=", 1)[1] for o in SERVICES[name]["command"] if o.startswith(option))


def test_it_is_a_composition():
    # It knows neither merges of YAML nor variables: these are what they are where none is set.
    given = re.sub(r"\$\{\w+:(?:-([^}]*)|\?[^}]*)\}", r"\1", yaml.safe_dump(COMPOSE, width=1_000))
    assert "$" not in given
    assert set(compose_spec.PyCompose.from_yaml(given).service_names()) == set(SERVICES)
    with pytest.raises(ValueError, match="`porst`"):
        compose_spec.PyCompose.from_yaml("services: {a: {image: b, porst: []}}")


@pytest.mark.parametrize("name", SERVICES)
def test_it_is_guarded(name):
    service = SERVICES[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"mem_limit", "pids_limit"} <= set(service)
    assert not {"privileged", "network_mode", "cap_add", "user", "devices"} & set(service)
    assert re.fullmatch(r"[\w/-]+:v?\d+\.\d+\.\d+", service["image"])
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert "healthcheck" in service or ("build" in service and "\nHEALTHCHECK " in DOCKERFILE)
    for other, how in service.get("depends_on", {}).items():
        assert other in SERVICES
        assert how == {"condition": "service_healthy"}


def test_a_health_check_asks_where_the_container_listens():
    for name, service in SERVICES.items():
        (port,) = (published.split(":")[2] for published in service["ports"])
        asked = str(service.get("healthcheck", DOCKERFILE))
        assert f"http://127.0.0.1:{port}/" in asked, name


@pytest.mark.parametrize("name", SERVICES)
def test_what_it_mounts_is_there_and_cannot_be_written(name):
    for target, source, read_only in mounts(name):
        assert read_only, target
        if not source.startswith("${PHASEWATCH_RUNS:-./runs}"):
            assert (HERE / source).exists(), source
    named = {v.split(":")[0] for v in SERVICES[name].get("volumes", ()) if isinstance(v, str)}
    assert named & set(COMPOSE["volumes"]) == ({name} & set(COMPOSE["volumes"]))


def test_prometheus_and_alertmanager_accept_what_they_are_given(tmp_path):
    config = inside("prometheus", option("prometheus", "--config.file"))
    given = yaml.safe_load(config.read_text())
    rules = inside("prometheus", "/etc/prometheus/rules")
    assert given["rule_files"] == ["rules/*.yml"]
    assert sorted(rules.glob("*.yml")) == list(RULES)
    # As the container sees them, side by side.
    (tmp_path / "rules").symlink_to(rules)
    (tmp_path / config.name).write_text(config.read_text())
    assert "SUCCESS" in run(program("promtool"), "check", "config", tmp_path / config.name)
    alerts = inside("alertmanager", option("alertmanager", "--config.file"))
    assert "SUCCESS" in run(program("amtool"), "check-config", alerts)
    for name, where in (("prometheus", "--storage.tsdb.path"), ("alertmanager", "--storage.path")):
        assert f"{name}:{option(name, where)}" in SERVICES[name]["volumes"]


def listens(address):
    name, port = address.split(":")
    assert [published.split(":")[2] for published in SERVICES[name]["ports"]] == [port], address


def test_every_address_is_that_of_a_service():
    prometheus = yaml.safe_load(inside("prometheus", "/etc/prometheus/prometheus.yml").read_text())
    (scraped,) = prometheus["scrape_configs"]
    (target,) = scraped["static_configs"][0]["targets"]
    listens(target)
    assert target.startswith("service:")
    # Rules tell processes from the service by the name of their job.
    assert scraped["job_name"] != "phasewatch"
    (told,) = prometheus["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"]
    listens(told)
    sources = inside("grafana", "/etc/grafana/provisioning/datasources/phasewatch.yml")
    for source in yaml.safe_load(sources.read_text())["datasources"]:
        listens(urlsplit(source["url"]).netloc)


@pytest.mark.timeout(180)
def test_a_prometheus_that_is_given_the_service_sees_every_run_once(tmp_path):
    from monitor.service import Service
    from monitor.sinks import ParquetSink

    for name in ("a", "b"):
        sink = ParquetSink(tmp_path / "runs", name)
        sink.write(measurement(7, run=name))
        sink.close()
    service, port = Service(tmp_path / "runs", port=0), free_port()
    config = inside("prometheus", "/etc/prometheus/prometheus.yml").read_text()
    for given, here in (
        ("service:8787", urlsplit(service.url).netloc),
        ("scrape_interval: 5s", "scrape_interval: 1s"),
        ("evaluation_interval: 15s", "evaluation_interval: 1s"),
    ):
        assert given in config
        config = config.replace(given, here)
    (tmp_path / "rules").symlink_to(inside("prometheus", "/etc/prometheus/rules"))
    (tmp_path / "prometheus.yml").write_text(config)
    command = [
        program("prometheus"),
        f"--config.file={tmp_path / 'prometheus.yml'}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    ]
    server = Server(f"http://127.0.0.1:{port}")

    def runs(query):
        return sorted(s["metric"]["run"] for s in server.ask("query", query=query)["result"])

    try:
        with (tmp_path / "log").open("w") as log, started(command, stdout=log, stderr=log):
            wait_for(lambda: runs("phasewatch_step") == ["a", "b"], "both runs")
            wait_for(
                lambda: runs("run:phasewatch_measurement_gap_seconds:max") == ["a", "b"], "a rule"
            )
            assert runs("phasewatch_run_finished == 0") == ["a", "b"]
            groups = server.ask("rules")["groups"]
            assert all(rule["health"] == "ok" for group in groups for rule in group["rules"])
            assert not server.ask("query", query='{__name__=~".+",exported_run!=""}')["result"]
    finally:
        service.close()


def test_grafana_is_given_the_same_sources_and_all_dashboards():
    own = inside("grafana", "/etc/grafana/provisioning/datasources/phasewatch.yml")
    others = HERE / "dashboards/provisioning/datasources/phasewatch.yml"
    here, there = (yaml.safe_load(path.read_text())["datasources"] for path in (own, others))
    assert [s.pop("url") for s in here] != [s.pop("url") for s in there]
    assert here == there
    (provider,) = yaml.safe_load(
        inside("grafana", "/etc/grafana/provisioning/dashboards/phasewatch.yml").read_text()
    )["providers"]
    shown = [*inside("grafana", provider["options"]["path"]).glob("*.json")]
    assert shown
    # Dashboards find their sources by type.
    asked = {
        kind
        for path in shown
        for kind in re.findall(r'"datasource": {\s+"type": "([\w-]+)"', path.read_text())
    }
    assert asked - {"grafana"} == {"prometheus", "yesoreyeram-infinity-datasource"}
    assert asked - {"grafana"} <= {source["type"] for source in here}
    wanted = re.search(r"plugins install (\S+) (\S+)", others.read_text())
    environment = SERVICES["grafana"]["environment"]
    assert environment["GF_PLUGINS_PREINSTALL_SYNC"] == "@".join(wanted.groups())
    # Without a password of one's own it does not start.
    assert environment["GF_SECURITY_ADMIN_PASSWORD"].startswith("${GF_ADMIN_PASSWORD:?")
    assert environment["GF_AUTH_ANONYMOUS_ENABLED"] == "false"


def test_the_image_of_the_service_is_plain_and_unprivileged():
    done = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), HERE / "Dockerfile"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "\nUSER 10001:10001\n" in DOCKERFILE
    assert SERVICES["service"]["image"] == f"phasewatch:{importlib.metadata.version('phasewatch')}"
    ignored = (HERE / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in ignored if line.startswith("!")}
    copied = {
        word
        for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, flags=re.MULTILINE)
        for word in line.split()
    }
    assert kept == copied
    assert "*" in ignored
    assert all((HERE / name).exists() for name in copied)
    packages = tomllib.loads((HERE / "pyproject.toml").read_text())["tool"]["hatch"]
    assert set(packages["build"]["targets"]["wheel"]["packages"]) <= copied
    assert not any(fnmatch.fnmatch(name, "runs*") for name in kept)


@pytest.mark.timeout(300)
def test_the_service_runs_from_what_its_image_is_made_of(tmp_path):
    from monitor.sinks import ParquetSink

    root = tmp_path / "runs"
    sink = ParquetSink(root, "r")
    sink.write(measurement(7))
    sink.close()
    listed = re.search(r"pip install \\\n\s+([a-z \-]+) \\", DOCKERFILE).group(1).split()
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    constraints = ["--constraint", HERE / "constraints.txt"]
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, *constraints, *listed], check=True, timeout=240)
    built = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "dist"]
    subprocess.run(built, check=True, cwd=HERE, capture_output=True)
    subprocess.run([*pip, "--no-deps", *(tmp_path / "dist").glob("*.whl")], check=True)
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    asked = "import sys, monitor.cli, monitor.service, importlib.util as of; "
    asked += "print(of.find_spec('torch'), *{name.split('.')[0] for name in sys.modules})"
    torch, *imported = subprocess.check_output([python, "-c", asked], env=clean, text=True).split()
    assert torch == "None"
    assert {name.replace("-", "_") for name in listed} <= set(imported)
    entry = json.loads(re.search(r"ENTRYPOINT (\[.*\])", DOCKERFILE).group(1))
    port = str(free_port())
    command = [{"/runs": str(root), "8787": port, "0.0.0.0": "127.0.0.1"}.get(w, w) for w in entry]
    with started([home / "bin" / command[0], *command[1:]], env=clean, cwd=tmp_path):
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: get(f"{url}/readyz"), "the service", seconds=30)
        assert json.loads(get(f"{url}/api/runs")[0])[0]["last_step"] == 7
        series = f"{url}/api/series?run=r&table=heads&field=score&layer=0&head=0"
        assert json.loads(get(series)[0])[0]["value"] == pytest.approx(7.01)
        assert 'phasewatch_run_finished{run="r"}' in page(url)
