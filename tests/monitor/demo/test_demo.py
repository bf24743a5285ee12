"""The demo as a user runs it: what it shows, tells and leaves behind, also when broken off."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import pytorch_lightning as pl
from typer.testing import CliRunner

import monitor
from monitor.cli import app
from monitor.demo import corpus, training
from tests.programs import PHASEWATCH

COMMAND = [*PHASEWATCH, "demo", "--port", "0"]


def test_induction_heads_form_after_the_previous_token_head_and_it_says_so(tmp_path):
    done = subprocess.run(
        [*COMMAND, "--seed", "1", "--root", str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    # On a machine that is busy its budget may thin the schedule, and then it says so.
    thinned = done.stderr.startswith("measuring takes")
    assert thinned or done.stderr == ""
    best = (
        monitor.read(tmp_path, "induction")
        .groupby("step")[["previous_token", "prefix_matching"]]
        .max()
    )
    null = monitor.read(tmp_path, "induction")["prefix_matching_null"].max()
    assert best["prefix_matching"].iloc[0] < null + 0.01
    assert best["prefix_matching"].iloc[-1] > 0.4
    formed = best.gt(0.4).idxmax()
    assert formed["previous_token"] < formed["prefix_matching"]
    found = monitor.formations(tmp_path).set_index("event")
    assert found["formed"].iloc[:3].all()
    # What begins is measured more often.
    assert (found["step_by"] - found["step_after"]).iloc[:3].le(40).all()
    assert found.loc["previous-token head", "step"] <= formed["previous_token"]
    assert found.loc["induction head", "step"] <= formed["prefix_matching"]
    lead = monitor.leads(found.reset_index()).iloc[0]
    assert (lead["before"], lead["runs"]) == (1, 1)
    score = monitor.read(tmp_path, "in_context").iloc[-1]
    assert score["paired_score"] + 1.96 * score["paired_score_stderr"] < 0
    told = " ".join(done.stdout.split())
    assert re.search(r"In a browser, while it trains: http://127\.0\.0\.1:\d+", told)
    assert f"phasewatch serve --root {tmp_path}" in done.stdout
    concepts = monitor.read(tmp_path, "concepts").query("layer == 0 and method == 'diff_in_means'")
    auc = concepts.set_index("step").query("concept == 'function_name'")["auc"]
    stderr = concepts.set_index("step").query("concept == 'function_name'")["auc_stderr"]
    assert auc.iloc[-1] - 3 * stderr.iloc[-1] > 0.5
    assert f"function name {auc.iloc[-1]:.2f} ±" in told
    assert "their directions lie as they do at the end: comment since step" in told
    assert f"to pass 0.4, at step {formed['prefix_matching']}" in told
    assert f"to pass 0.4, at step {formed['previous_token']}" in told
    query = re.search(r"^monitor\.read\(.*?\)", done.stdout, flags=re.MULTILINE).group()
    steps = eval(query, {"monitor": monitor})["step"].value_counts()
    assert steps.eq(6).all()
    planned = {*range(0, 1_601, 40)}
    assert {*steps.index} - planned, "it measures more often while something is provisional"
    assert thinned or planned < {*steps.index}
    said = monitor.read(tmp_path, "transitions").set_index(["series", "state"])
    for event in ("previous-token head", "induction head"):
        assert said.loc[(f"{event} formed", "provisional"), "step"] == found.loc[event, "step"]
        confirmed = said.loc[(f"{event} formed", "confirmed"), "step"]
        assert f"{event} formed (seen at step {found.loc[event, 'step']}, confirmed at" in told
        assert confirmed > found.loc[event, "step"]


def broken_off(arguments: list[str], when: Callable[[str], bool]) -> tuple[int, str]:
    """The demo with Ctrl-C pressed when it has said so much: its exit code and all that it said."""
    with subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        bufsize=1,
    ) as process:
        try:
            seen = ""
            while not when(seen):
                line = process.stdout.readline()
                assert line, f"it ended early: {seen}"
                seen += line
            process.send_signal(signal.SIGINT)
            seen += process.communicate(timeout=120)[0]
        finally:
            process.kill()
    return process.returncode, seen


# On a machine that is busy any but the first measurement may be passed over.
@pytest.mark.parametrize("after", ["reading", "step +[1-9]"])
def test_breaking_it_off_leaves_what_was_measured_and_no_traceback(tmp_path, after):
    code, seen = broken_off(["--root", str(tmp_path)], lambda seen: re.search(after, seen))
    assert "Traceback" not in seen
    if after == "reading":
        assert code == 130
        assert "Stopped before training began" in seen
    else:
        assert code == 0
        assert monitor.read(tmp_path, "induction")["step"].nunique() >= 2
        assert "No head's prefix-matching score passed 0.4" in " ".join(seen.split())


def test_several_runs_differ_in_their_seed_and_are_compared_at_the_end(tmp_path):
    done = subprocess.run(
        [*COMMAND, "--runs", "2", "--seed", "3", "--steps", "60", "--root", str(tmp_path / "two")],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    # On a machine that is busy its budget may thin the schedule, and then it says so.
    assert done.stderr == "" or done.stderr.startswith("measuring takes")
    told = " ".join(done.stdout.split())
    assert "What formed in the 2 runs that came to their end" in told
    assert "induction head" in told.split("What formed in the 2 runs")[1]
    two = monitor.read(tmp_path / "two", "induction")
    # Of a run that was measured but once nothing can be said.
    often = two.groupby("run")["step"].nunique().min() > 1
    assert ("induction head 0 of 2 runs 0% to 84%" in told) == often
    names = two["run"].unique().tolist()
    assert [name.split("-")[1] for name in names] == ["seed3", "seed4"]
    again = re.search(r"^phasewatch (transitions .*)$", done.stdout, flags=re.MULTILINE).group(1)
    assert all(f"--run {name}" in again for name in names)
    shown = CliRunner().invoke(app, again.split())
    assert "induction head" in shown.stdout
    assert ("0 of 2 runs" in shown.stdout) == often
    # The second of a row is the run that it would have been alone.
    alone = [*COMMAND, "--seed", "4", "--steps", "60", "--root", str(tmp_path / "alone")]
    subprocess.run(alone, check=True, capture_output=True, timeout=300)
    place = ["step", "layer", "head"]
    ran_alone = monitor.read(tmp_path / "alone", "induction").set_index(place)
    second = two[two["run"] == names[1]].set_index(place)
    # On a machine that is busy its budget may thin the schedule, but for the first.
    both = ran_alone.index.intersection(second.index)
    assert 0 in both.get_level_values("step")
    assert second.loc[both, "prefix_matching"].equals(ran_alone.loc[both, "prefix_matching"])


@pytest.mark.parametrize("of", [1, 2])
def test_breaking_off_one_of_several_runs_keeps_those_that_ended(tmp_path, of):
    arguments = ["--runs", "3", "--steps", "400", "--root", str(tmp_path)]
    code, seen = broken_off(arguments, lambda seen: seen.count("step     0") == of)
    assert code == 0
    assert "Traceback" not in seen
    names = monitor.read(tmp_path, "induction")["run"].unique().tolist()
    assert len(names) == of
    told = " ".join(seen.split())
    if of == 1:
        assert "No run came to its end" in told
    else:
        assert "What formed in the 1 of 3 runs that came to their end" in told
        compared = seen.split("What formed")[1]
        assert names[0] in compared
        assert names[1] not in compared


def test_a_terminal_shows_a_live_view(tmp_path):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "--root", str(tmp_path), "--steps", "60"],
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"},
    )
    os.close(theirs)
    shown = b""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        try:
            shown += os.read(ours, 65_536)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert process.wait(timeout=60) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode(errors="replace"))
    for part in ("60/60", "best induction head", "in-context score", "/metrics", "▁"):
        assert part in text


def test_bad_options_are_refused_with_a_sentence(tmp_path):
    file = tmp_path / "file"
    file.touch()
    done = subprocess.run(
        [*COMMAND, "--root", str(file), "--steps", "5"],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_the_corpus_is_the_same_every_time_and_split_by_file():
    first, second = corpus.load(), corpus.load()
    assert first.train.equal(second.train)
    assert first.held_out.equal(second.held_out)
    assert len(first.train) > 5 * len(first.held_out) > 0
    assert int(first.train.max()) < 512
    assert "def " in first.tokenizer.decode(first.train[:5_000].tolist())


def test_a_python_without_its_source_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(RuntimeError, match="found 0 source files"):
        corpus.load()


def test_ctrl_c_as_a_run_ends_begins_no_other(tmp_path, monkeypatch, capsys):
    """Lightning ends the process where it comes while a trained run is closed."""
    fit = pl.Trainer.fit

    def interrupted(*arguments):
        fit(*arguments)
        sys.exit(1)

    monkeypatch.setattr(pl.Trainer, "fit", interrupted)
    training.run(steps=2, seed=0, root=tmp_path, port=0, runs=2)
    (run,) = monitor.read(tmp_path, "attempts")["run"].unique()
    said = capsys.readouterr().out
    assert "What formed in the 1 of 2 runs that came to their end" in " ".join(said.split())
    assert run in said
