"""`phasewatch transitions`: what it prints of several runs, in wide and narrow terminals and as
CSV, and what it answers where there is nothing.
"""

import io
import re
import subprocess
import sys

import pandas as pd
import pytest
from rich.console import Console
from typer.testing import CliRunner

import monitor
from monitor.across.printed import print_formations, print_universality
from monitor.cli import app
from monitor.probes.in_context import SPEC as IN_CONTEXT
from monitor.probes.induction import SPEC as INDUCTION
from monitor.record import Measurement, Reading
from monitor.sinks import ParquetSink
from tests.monitor.across.recorded import record_attempt, record_claims
from tests.monitor.sinks.fabricated import moment


def record(root, run, *, previous, induction, seed, tokens_a_step: int | None = 64):
    """A run of two heads which form at these measurements of every twenty steps, None: never."""
    sink = ParquetSink(root, run)
    for at in range(20):
        step = 20 * at
        scores = [
            0.6 if formed is not None and at >= formed else 0.02 for formed in (previous, induction)
        ]
        tokens = None if tokens_a_step is None else tokens_a_step * step
        when = moment(step, run=run, tokens=tokens)
        rows = {c: None for field in INDUCTION.fields for c in field.columns}
        rows |= {"layer": [0, 1], "head": [1, 0], "n": [8, 8], "validity": ["ok", "ok"]}
        for field, values in (
            ("previous_token", [scores[0], 0.02]),
            ("prefix_matching", [0.02, scores[1]]),
        ):
            rows |= {field: values, f"{field}_stderr": [0.01] * 2, f"{field}_null": [0.02] * 2}
        row = {c: None for field in IN_CONTEXT.fields for c in field.columns}
        row |= {"n": [8], "validity": ["ok"]}
        row |= {"paired_score": [0.0], "paired_score_stderr": [0.01], "paired_score_null": [0.0]}
        readings = (Reading.build(INDUCTION, when, rows), Reading.build(IN_CONTEXT, when, row))
        sink.write(Measurement(moment=when, readings=readings))
    record_attempt(root, run, seed=seed, parameters=12_345)


@pytest.fixture
def runs(tmp_path):
    for seed, (previous, induction) in enumerate([(3, 8), (4, 10), (5, None)]):
        record(tmp_path, f"seed{seed}", previous=previous, induction=induction, seed=seed)
    return tmp_path


def ask(root, *options, code=0):
    done = CliRunner().invoke(app, ["transitions", "--root", str(root), *options])
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.stderr


def words(text: str) -> str:
    return " ".join(text.split())


def test_what_formed_in_each_run(runs):
    said = words(ask(runs))
    assert "seed0: probes' seed 0, 12,345 parameters, watched until step 380" in said
    assert "previous-token head 60 (after 40) 3,840 0.1 0.60 ± 0.02 (null 0.02)" in said
    assert "induction head 200 (after 180) 12,800 1.0" in said
    assert "induction head not by 380 - " in said
    assert "induction circuit: no table `circuit` was recorded (all 3 runs)." in said
    assert "95% interval" not in said


def test_the_runs_on_one_axis(runs):
    said = words(ask(runs, "--align"))
    assert "previous-token head 3 of 3 runs 29% to 100% 80 60 to 100 20" in said
    assert "induction head 2 of 3 runs 9% to 99% 180 160 to 200 20" in said
    assert "in-context learning 0 of 3 runs 0% to 71% - - -" in said
    assert "induction head: the runs that did not form it were watched until step 380" in said
    assert (
        "previous-token head before induction head in 2 of 2 runs: by 110 steps in the median "
        "(100 to 120), each known to within 20." in said
    )
    assert "induction head before in-context learning" not in said


def test_the_axis_of_tokens(runs):
    said = words(ask(runs, "--align", "--axis", "tokens"))
    assert "median training tokens" in said
    assert "previous-token head 3 of 3 runs 29% to 100% 5,120 3,840 to 6,400 1,280" in said
    assert "by 7,040 tokens in the median" in said


def test_runs_of_choice_and_reasons(runs):
    record(runs, "other", previous=0, induction=4, seed=9, tokens_a_step=640)
    record_claims(runs, "other", *[("attribution", "not made")] * 3)
    said = words(ask(runs, "--run", "seed1", "--run", "other", "--align"))
    assert "seed0" not in said
    assert "previous-token head by 0 0 0.1" in said
    assert "previous-token head: already formed at the first measurement (other)." in said
    assert "align by tokens" in said
    assert "induction circuit: no table `circuit` was recorded (seed1)." in said


def test_a_run_of_which_nothing_is_known(tmp_path):
    record_claims(tmp_path, "r", *[("attribution", "not made")] * 3)
    said = words(ask(tmp_path, "--align"))
    assert "nothing can be said of it" in said
    assert "too few measurements: `causal_test` was made never" in said


def test_csv_is_the_whole_table(runs):
    formed = pd.read_csv(io.StringIO(ask(runs, "--csv")))
    expected = monitor.formations(runs)
    assert formed.columns.tolist() == expected.columns.tolist()
    assert len(formed) == 12
    assert formed["step"].dropna().tolist() == expected["step"].dropna().tolist()
    summary = pd.read_csv(io.StringIO(ask(runs, "--align", "--csv")))
    assert summary["event"].tolist() == expected["event"].unique().tolist()
    assert summary["median"].iloc[:2].tolist() == [80, 180]


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("width", [30, 60, 200])
def test_nothing_is_lost_in_a_narrow_terminal(runs, width, terminal):
    written = io.StringIO()
    to = Console(file=written, width=width, force_terminal=terminal, color_system=None)
    formed = monitor.formations(runs)
    print_formations(to, formed)
    print_universality(to, formed, "step")
    lines = re.sub(r"\x1b\[[0-9;]*m", "", written.getvalue()).splitlines()
    assert all(len(line) <= width for line in lines)
    assert "…" not in "".join(lines)
    everything = "".join(words(line) for line in lines).replace(" ", "")
    assert "seed2" in everything
    assert everything.count("12,345") == 3


def test_a_pipe_gets_plain_text(runs):
    options = ["transitions", "--align", "--root", str(runs)]
    done = subprocess.run(
        [sys.executable, "-c", "from monitor.cli import app; app()", *options],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "", "COLUMNS": "40"},
    )
    assert "\x1b" not in done.stdout
    assert any(len(line) > 80 for line in done.stdout.splitlines())


def test_what_there_is_not(runs, tmp_path):
    assert "no folder" in ask(runs / "none", code=1)
    empty = runs / "empty"
    empty.mkdir()
    assert "no runs in" in ask(empty, code=1)
    assert "'seed3'; known: seed0, seed1, seed2" in words(ask(runs, "--run", "seed3", code=1))
    assert CliRunner().invoke(app, ["transitions", "--axis", "time"]).exit_code == 2


def test_neither_reading_nor_printing_needs_torch(runs):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import monitor; monitor.leads(monitor.formations(sys.argv[1]))\n"
        "from monitor.cli import app; app(['transitions', '--align', '--root', sys.argv[1]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(runs)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "3 of 3 runs" in done.stdout
