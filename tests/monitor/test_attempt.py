"""The row that describes an attempt, and names of new runs."""

import json
import platform
import random
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from monitor.attempt import attempt_row, new_run_name
from monitor.names import check_run_name
from monitor.record import ATTEMPTS


def row(**more) -> dict:
    given = {"attempt": 1, "resumed_from": None, "seed": 0, "parameters": 7, "config": {}}
    table = attempt_row(**given | more)
    assert table.schema.equals(ATTEMPTS, check_metadata=True)
    (only,) = table.to_pylist()
    return only


def test_what_it_was_given():
    given = row(attempt=3, resumed_from=100, seed=5, parameters=12_345, config={"a": [1, {"b": 2}]})
    assert (given["attempt"], given["resumed_from"], given["seed"]) == (3, 100, 5)
    assert given["parameters"] == 12_345
    assert json.loads(given["config"]) == {"a": [1, {"b": 2}]}
    assert row()["resumed_from"] is None


def test_where_and_when_it_runs():
    here = row()
    assert here["host"] == platform.node()
    assert timedelta(0) <= datetime.now(UTC) - here["started"] < timedelta(minutes=1)


def test_versions_of_what_matters():
    versions = json.loads(row()["versions"])
    assert versions["python"] == platform.python_version()
    assert versions["numpy"] == np.__version__
    assert {"torch", "pytorch-lightning", "phasewatch"} <= set(versions)


def test_a_configuration_of_anything():
    config = {"path": sys.path, "object": object(), "array": np.arange(2), "type": int}
    stored = json.loads(row(config=config)["config"])
    assert "object object" in stored["object"]
    assert stored["path"] == sys.path


def git(*words: str, folder) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    command = ["git", *identity, *words]
    return subprocess.run(
        command, cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_revision_of_the_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert row()["revision"] is None
    git("init", "--quiet", folder=tmp_path)
    # Nothing is committed yet.
    assert row()["revision"] is None
    (tmp_path / "train.py").write_text("1")
    git("add", "train.py", folder=tmp_path)
    git("commit", "--quiet", "--no-verify", "-m", "first", folder=tmp_path)
    git("tag", "v1", folder=tmp_path)
    revision = git("rev-parse", "HEAD", folder=tmp_path)
    assert row()["revision"] == revision
    (tmp_path / "train.py").write_text("2")
    assert row()["revision"] == f"{revision}-dirty"


def test_a_machine_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert row()["revision"] is None


def test_new_names_can_be_used_sort_by_time_and_differ():
    names = [new_run_name() for _ in range(50)]
    assert all(check_run_name(name) == name for name in names)
    assert len(set(names)) > 45
    prefix = f"{datetime.now(UTC):%Y%m%d}"
    assert any(name.startswith(prefix) for name in names)


@pytest.mark.parametrize("make", [new_run_name, row])
def test_no_random_stream_of_training_is_drawn_on(make):
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist()
    make()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
