"""What others depend on: public names, their signatures, the command, and what the wheel holds."""

import importlib
import importlib.metadata
import inspect
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import callbacks
import dashboards
import monitor
import monitor.transitions
from monitor.measure import Monitor, measure

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def parameters(function) -> dict:
    """The defaults of a function's parameters, in order."""
    signature = inspect.signature(function)
    return {name: parameter.default for name, parameter in signature.parameters.items()}


def keyword_only(function) -> set[str]:
    signature = inspect.signature(function).parameters.values()
    return {p.name for p in signature if p.kind is p.KEYWORD_ONLY}


def test_the_names_of_each_package():
    assert set(monitor.__all__) >= {
        "apart",
        "connect",
        "early_warnings",
        "fitted",
        "formations",
        "leads",
        "read",
        "tables",
        "universality",
    }
    assert callbacks.__all__ == ["TrainingDynamics"]
    assert set(dashboards.__all__) >= {
        "ALERTMANAGER_CONFIG",
        "GRAFANA",
        "PROMETHEUS_CONFIG",
        "RULES",
    }
    for package in (monitor, callbacks, dashboards):
        assert sorted(package.__all__) == package.__all__
        assert all(getattr(package, name).__doc__ for name in package.__all__ if name.islower())


def test_transitions():
    assert monitor.transitions.__all__ == ["Event", "OnlineDetector", "Transition", "fit"]
    given = parameters(monitor.transitions.fit)
    assert list(given)[:2] == ["step", "value"]
    assert set(list(given)[2:]) == keyword_only(monitor.transitions.fit)


def test_the_callback():
    given = parameters(callbacks.TrainingDynamics)
    assert next(iter(given)) == "root"
    expected = {
        "root": "runs",
        "run": None,
        "probes": None,
        "text": None,
        "schedule": None,
        "model": None,
        "vocab_size": None,
        "metrics_port": 9464,
        "metrics_address": "127.0.0.1",
        "seed": 0,
    }
    assert {name: given[name] for name in expected} == expected
    assert keyword_only(callbacks.TrainingDynamics) == set(given) - {"root"}
    # Every argument is documented, and has a default.
    assert inspect.Parameter.empty not in given.values()
    assert all(f"{name}:" in callbacks.TrainingDynamics.__doc__ for name in given)


def test_the_monitor_for_plain_loops():
    given = parameters(Monitor)
    assert given["root"] == "runs"
    assert {"run", "text", "probes", "vocab_size", "seed", "context"} <= set(given)
    assert keyword_only(Monitor) == set(given) - {"root"}
    assert list(parameters(Monitor.measure)) == [
        "self",
        "model",
        "step",
        "tokens",
        "seconds",
        "loss",
    ]
    assert list(parameters(Monitor.watch)) == ["self", "optimizers", "every"]
    own = set(given) - set(parameters(measure))
    assert all(f"{name}:" in Monitor.__doc__ for name in own)


def test_measuring_once():
    given = parameters(measure)
    assert next(iter(given)) == "model"
    assert {"vocab_size", "probes", "context", "seed"} <= keyword_only(measure)
    assert given["seed"] == 0
    assert all(f"{name}:" in measure.__doc__ for name in given)


def test_reading():
    assert list(parameters(monitor.tables)) == ["root"]
    assert parameters(monitor.read) == {
        "root": inspect.Parameter.empty,
        "table": inspect.Parameter.empty,
        "run": None,
    }
    assert parameters(monitor.connect) == {"root": inspect.Parameter.empty, "run": None}


def test_every_module_says_what_it_is_for_and_can_be_imported():
    for package in (monitor, callbacks, dashboards):
        folder = Path(package.__file__).parent
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            name = ".".join(part for part in parts if part != "__init__")
            if not name.endswith("__main__"):
                assert importlib.import_module(name).__doc__, name


def test_the_command():
    module, _, attribute = PROJECT["project"]["scripts"]["phasewatch"].partition(":")
    assert module == "monitor.cli"
    assert callable(getattr(importlib.import_module(module), attribute))
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="phasewatch")
    assert entry.value == f"{module}:{attribute}"
    done = subprocess.run(
        [Path(sys.executable).with_name("phasewatch"), "--help"],
        check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "phasewatch" in done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(
        command, cwd=REPOSITORY, check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("phasewatch-*-py3-none-any.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_the_wheel_holds_the_three_packages_and_nothing_else(wheel):
    names = wheel.namelist()
    tops = {name.partition("/")[0] for name in names}
    version = PROJECT["project"]["version"]
    assert tops == {"monitor", "callbacks", "dashboards", f"phasewatch-{version}.dist-info"}
    for package in ("monitor", "callbacks", "dashboards"):
        here = {
            str(path.relative_to(REPOSITORY))
            for path in (REPOSITORY / package).rglob("*.py")
            if "__pycache__" not in path.parts
        }
        assert here <= set(names)
    of_grafana = ("provisioning/dashboards/phasewatch", "provisioning/datasources/phasewatch")
    for name in ("prometheus", "alertmanager", "rules/alerts", "rules/recording", *of_grafana):
        assert f"dashboards/{name}.yml" in names
    assert {f"dashboards/grafana/{path.name}" for path in dashboards.GRAFANA} <= set(names)
    assert len(dashboards.GRAFANA) == 7


def test_the_wheel_holds_the_live_page_with_the_licence_of_what_it_draws_with(wheel):
    from monitor.service import pages

    names = wheel.namelist()
    top = "monitor/service/page/"
    shipped = {name.removeprefix(top) for name in names if name.startswith(top)}
    assert shipped == {*pages.files(), "vendor/uPlot.LICENSE"}
    assert {"index.html", "main.js", "style.css", "vendor/uPlot.iife.min.js"} <= shipped
    assert "MIT License" in wheel.read("monitor/service/page/vendor/uPlot.LICENSE").decode()


def test_the_wheel_says_what_it_is(wheel):
    (path,) = [name for name in wheel.namelist() if name.endswith("/METADATA")]
    metadata = wheel.read(path).decode()
    assert "\nName: phasewatch\n" in metadata
    assert "\nRequires-Dist: torch>=" in metadata
    (path,) = [name for name in wheel.namelist() if name.endswith("/entry_points.txt")]
    assert "phasewatch = monitor.cli:app" in wheel.read(path).decode()
