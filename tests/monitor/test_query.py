"""Reading back: names of tables, one table as a sorted frame, SQL views that keep up with a run,
what is answered where there is nothing, and all of it on a machine without torch.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import monitor
from monitor.record import Measurement
from monitor.sinks import ParquetSink
from tests.monitor.sinks.fabricated import HEADS, START, failure, heads, measurement, moment

REPOSITORY = Path(__file__).parents[2]

# pandas or Arrow would take these for numbers, dates and truths.
LIKE_SOMETHING_ELSE = ["007", "20240506", "2024-05-06", "1e5", "1.5", "true", "nan", "null", "None"]


def record(root: Path, run: str = "r", steps=range(3), attempt: int = 1) -> ParquetSink:
    sink = ParquetSink(root, run)
    for step in steps:
        sink.write(measurement(step, run=run, attempt=attempt))
    return sink


# tables


def test_tables_are_named_in_order(tmp_path):
    record(tmp_path).write(Measurement(moment=moment(9), failures=(failure("heads"),)))
    assert monitor.tables(tmp_path) == ["failures", "heads", "losses"]
    assert monitor.tables(str(tmp_path)) == ["failures", "heads", "losses"]


def test_only_tables_of_ours_are_named(tmp_path):
    record(tmp_path)
    ParquetSink(tmp_path, "r").supersede(1)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / ".hidden" / "run=r").mkdir(parents=True)
    theirs = tmp_path / "theirs" / "run=r" / "000000000000.parquet"
    theirs.parent.mkdir(parents=True)
    pq.write_table(pa.table({"x": [1]}), theirs)
    assert monitor.tables(tmp_path) == ["heads", "losses"]


def test_an_empty_folder_has_no_tables(tmp_path):
    assert monitor.tables(tmp_path) == []


@pytest.mark.parametrize("ask", [monitor.tables, monitor.connect, lambda r: monitor.read(r, "x")])
@pytest.mark.parametrize("kind", ["missing", "file"])
def test_no_such_folder(tmp_path, ask, kind):
    root = tmp_path / "runs"
    if kind == "file":
        root.write_text("")
    with pytest.raises(FileNotFoundError, match=r"no folder .*runs: expected the root= of a run"):
        ask(root)


# read


def test_rows_come_in_order_of_run_step_and_dimensions(tmp_path):
    for run, steps in (("b", [5, 0]), ("a", [7, 2, 100])):
        record(tmp_path, run, steps)
    frame = monitor.read(tmp_path, "heads")
    keys = frame[["run", "step", "layer", "head"]]
    assert keys.values.tolist() == [
        [run, step, layer, head]
        for run, step in [("a", 2), ("a", 7), ("a", 100), ("b", 0), ("b", 5)]
        for layer in (0, 1)
        for head in (0, 1)
    ]
    assert frame.index.tolist() == list(range(20))


def test_columns_and_their_types(tmp_path):
    record(tmp_path, steps=[3])
    frame = monitor.read(tmp_path, "heads")
    assert frame.columns.tolist() == ["run", *HEADS.schema.names]
    assert pd.api.types.is_string_dtype(frame["run"])
    assert frame["time"][0] == pd.Timestamp(START) + pd.Timedelta(seconds=3)
    assert str(frame["time"].dt.tz) == "UTC"
    assert frame["score"].dtype == np.float32
    assert frame["score"][0] == np.float32(3.01)
    assert monitor.read(tmp_path, "losses")["by_position"][0].tolist() == [3.0, 2.0, 1.0]


def test_one_run_of_several(tmp_path):
    record(tmp_path, "a", [1])
    record(tmp_path, "b", [2])
    assert monitor.read(tmp_path, "losses", run="b")["step"].tolist() == [2]
    assert monitor.read(tmp_path, "losses")["run"].tolist() == ["a", "b"]


def test_what_was_superseded_is_left_out(tmp_path):
    record(tmp_path, steps=range(6)).supersede(2)
    record(tmp_path, steps=[3, 4], attempt=2)
    frame = monitor.read(tmp_path, "losses")
    assert frame[["step", "attempt"]].values.tolist() == [[0, 1], [1, 1], [2, 1], [3, 2], [4, 2]]


def test_what_a_killed_writer_left_is_left_out(tmp_path):
    record(tmp_path, steps=[1])
    (tmp_path / "losses/run=r/.000000000002.parquet.77.tmp").write_bytes(b"PAR1")
    assert monitor.read(tmp_path, "losses")["step"].tolist() == [1]
    with monitor.connect(tmp_path) as sql:
        assert sql.execute("SELECT step FROM losses").fetchall() == [(1,)]


def test_values_that_were_not_measured_are_nan_and_validity_says_why(tmp_path):
    when = moment(1)
    reading = heads(when, score=[0.5, float("nan"), 0.5, 0.5])
    ParquetSink(tmp_path, "r").write(Measurement(moment=when, readings=(reading,)))
    frame = monitor.read(tmp_path, "heads")
    assert frame["score"].isna().tolist() == [False, True, False, False]
    assert frame["validity"].tolist() == ["ok", "score is not finite", "ok", "ok"]


@pytest.mark.parametrize("run", LIKE_SOMETHING_ELSE)
def test_a_run_that_looks_like_something_else_stays_a_string(tmp_path, run):
    record(tmp_path, run, [1])
    assert monitor.read(tmp_path, "losses")["run"].tolist() == [run]
    assert monitor.read(tmp_path, "losses", run=run)["run"].tolist() == [run]
    with monitor.connect(tmp_path) as sql:
        assert sql.execute("SELECT run FROM losses").fetchall() == [(run,)]


def test_runs_that_all_look_like_something_else(tmp_path):
    for run in LIKE_SOMETHING_ELSE:
        record(tmp_path, run, [1])
    assert monitor.read(tmp_path, "losses")["run"].tolist() == sorted(LIKE_SOMETHING_ELSE)
    with monitor.connect(tmp_path) as sql:
        runs = sql.execute("SELECT run FROM losses ORDER BY run").fetchall()
    assert [run for (run,) in runs] == sorted(LIKE_SOMETHING_ELSE)


@pytest.mark.parametrize("fewer_last", [False, True])
def test_runs_that_were_recorded_with_different_fields(tmp_path, fewer_last):
    specs = {"a": HEADS, "b": HEADS.only(["entropy"])}
    if not fewer_last:
        specs = dict(zip("ab", reversed(specs.values()), strict=True))
    for run, spec in specs.items():
        when = moment(1, run=run)
        reading = heads(when, layers=1, spec=spec)
        ParquetSink(tmp_path, run).write(Measurement(moment=when, readings=(reading,)))
    frame = monitor.read(tmp_path, "heads")
    assert set(frame) == {"run", *HEADS.schema.names}
    assert frame["entropy"].notna().all()
    assert frame["score"].notna().tolist() == [run == "ab"[not fewer_last] for run in "aabb"]
    with monitor.connect(tmp_path) as sql:
        counts = sql.execute("SELECT count(*), count(score), count(entropy) FROM heads").fetchall()
    assert counts == [(4, 2, 4)]


@pytest.mark.parametrize("fewer_last", [False, True])
def test_one_run_whose_attempts_recorded_different_fields(tmp_path, fewer_last):
    specs = [HEADS, HEADS.only(["entropy"])]
    for attempt, spec in enumerate(specs if fewer_last else reversed(specs), start=1):
        when = moment(attempt, attempt=attempt)
        reading = heads(when, layers=1, spec=spec)
        ParquetSink(tmp_path, "r").write(Measurement(moment=when, readings=(reading,)))
    frame = monitor.read(tmp_path, "heads")
    assert set(frame) == {"run", *HEADS.schema.names}
    assert frame["entropy"].notna().all()
    assert frame["score"].notna().sum() == 2


def test_no_such_table_or_run(tmp_path):
    record(tmp_path, "mine")
    with pytest.raises(ValueError, match=r"table in .*'head'; known: heads, losses; .*'heads'\?"):
        monitor.read(tmp_path, "head")
    with pytest.raises(ValueError, match=r"run in .*'mime'; known: mine; did you mean 'mine'\?"):
        monitor.read(tmp_path, "heads", run="mime")
    for not_a_table in ("_superseded", "..", "", "notes.txt"):
        with pytest.raises(ValueError, match="unknown table"):
            monitor.read(tmp_path, not_a_table)


@pytest.mark.parametrize("place", [".hidden", "_private", "a=b", "step=7", "run=x", "[1]", "50%"])
def test_a_root_inside_a_folder_of_any_name(tmp_path, place):
    root = tmp_path / place / "runs"
    record(root, steps=[3])
    frame = monitor.read(root, "losses")
    assert frame[["run", "step"]].values.tolist() == [["r", 3]]
    assert frame.columns[0] == "run"
    with monitor.connect(root) as sql:
        assert sql.execute("SELECT run, step FROM losses").fetchall() == [("r", 3)]


# connect


def test_one_view_a_table(tmp_path):
    record(tmp_path)
    with monitor.connect(tmp_path) as sql:
        views = sql.execute("SELECT table_name FROM information_schema.tables ORDER BY 1")
        assert views.fetchall() == [("heads",), ("losses",)]
        best = sql.execute(
            "SELECT step, layer, head, score FROM heads ORDER BY score DESC, layer, head LIMIT 1"
        )
        assert best.fetchall() == [(2, 0, 0, pytest.approx(2.01))]
        joined = sql.execute("SELECT count(*) FROM heads JOIN losses USING (run, step)")
        assert joined.fetchall() == [(12,)]


def test_views_show_what_arrives_later(tmp_path):
    sink = record(tmp_path, steps=[0])
    with monitor.connect(tmp_path) as sql:
        steps = "SELECT DISTINCT run, step FROM heads ORDER BY run, step"
        assert sql.execute(steps).fetchall() == [("r", 0)]
        sink.write(measurement(1))
        record(tmp_path, "s", [0])
        assert sql.execute(steps).fetchall() == [("r", 0), ("r", 1), ("s", 0)]
        sink.supersede(0)
        assert sql.execute(steps).fetchall() == [("r", 0), ("s", 0)]


@pytest.mark.parametrize("name", ["it's mine", 'a "quoted" one', "läufe 走", "semi;colon --"])
def test_any_name_of_the_root(tmp_path, name):
    root = tmp_path / name
    record(root, steps=[1])
    assert monitor.read(root, "losses")["step"].tolist() == [1]
    with monitor.connect(root) as sql:
        assert sql.execute("SELECT run, step FROM losses").fetchall() == [("r", 1)]


def test_views_of_a_relative_root_stay_when_the_folder_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record(Path("runs"), steps=[1])
    with monitor.connect("runs") as sql:
        monkeypatch.chdir("/")
        assert sql.execute("SELECT step FROM losses").fetchall() == [(1,)]


def test_an_empty_folder_gives_a_connection_without_views(tmp_path):
    with monitor.connect(tmp_path) as sql:
        views = sql.execute("SELECT count(*) FROM information_schema.tables").fetchall()
    assert views == [(0,)]


# Without torch

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import monitor
root = sys.argv[1]
assert monitor.tables(root) == ["heads", "losses"]
assert len(monitor.read(root, "heads")) == 12
with monitor.connect(root) as sql:
    assert sql.execute("SELECT count(*) FROM heads").fetchall() == [(12,)]
import monitor.sinks, monitor.attempt
try:
    import monitor.measure
except ImportError:
    print("read without torch")
"""


def test_reading_needs_no_torch(tmp_path):
    record(tmp_path)
    command = [sys.executable, "-W", "error", "-c", WITHOUT_TORCH, str(tmp_path)]
    done = subprocess.run(
        command, cwd=REPOSITORY, check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "read without torch\n"
