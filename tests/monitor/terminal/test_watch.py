"""`phasewatch watch` as its users meet it: on runs that were written and on one that grows, in a
pipe and in a real terminal.
"""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from contextlib import contextmanager
from datetime import UTC, datetime

import pytest
from typer.testing import CliRunner

from monitor.attempt import attempt_row, with_cost
from monitor.cli import app
from monitor.sinks import ParquetSink
from tests.monitor.sinks.fabricated import measurement as unknown
from tests.monitor.terminal.runs import record
from tests.programs import PHASEWATCH

COMMAND = [*PHASEWATCH, "watch"]
STEPS = (0, 100, 200, 300, 400, 500)


def once(*arguments, code=0):
    """What it prints at once, and all that it says with its white space made even."""
    done = CliRunner().invoke(app, ["watch", "--once", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done.stdout, " ".join(done.output.split())


def test_the_essentials_of_a_run(tmp_path):
    record(tmp_path, *STEPS)
    text, even = once("--root", tmp_path)
    for part in (
        "step 500 · 50,000 tokens · 6 measurements",
        "loss late in held-out text, nats 2.50 ± 0.21 6.24",
        "in-context score (paired), nats -0.32 ± 0.11 0.00",
        "best induction head 1.0 0.32 ± 0.02 0.02",
        "best previous-token head 0.0 0.80 ± 0.02 0.03",
        "step 400 induction head formed since step 300: confirmed; after step 200",
        "concepts: 1 of 2 above chance (AUC): comment 0.90",
        "circuit: claim: attribution at step 500 (causal test: failed): 0.0 → 1.0, 1.0 → logits",
        "not interpretable: induction (1 of 4): not finite",
    ):
        assert part in even
    # Said again as confirmed, so that it was provisional is not what is true now.
    assert "provisional" not in even
    assert "1  3 ?" in text
    assert "┈" in text
    assert " step 500 " in text
    assert "\x1b" not in text


def test_what_cannot_be_interpreted_or_was_not_measured_says_so(tmp_path):
    record(tmp_path, 100, circuit="ablating took too long")
    even = once("--root", tmp_path)[1]
    assert "circuit: ablating took too long" in even
    assert "circuit (2 of 2): ablating took too long" in even
    # A run of other probes: nothing is made up for it.
    other = tmp_path / "other"
    record(other, 100)
    for table in ("induction", "concepts", "circuit"):
        for file in (other / table).rglob("*.parquet"):
            file.unlink()
    even = once("--root", other)[1]
    assert "heads: not measured" in even
    assert "concepts: not measured" in even
    assert "circuit: not measured" in even
    assert "best induction head" not in even


def test_tables_of_other_probes_are_no_reason_to_fail(tmp_path):
    sink = ParquetSink(tmp_path, "r")
    sink.write(unknown(3))
    sink.close()
    assert "step 3 · 300 tokens" in once("--root", tmp_path)[1]


def test_the_axis(tmp_path):
    record(tmp_path, *STEPS)
    assert "tokens 50,000" in once("--root", tmp_path, "--axis", "tokens")[1]
    assert re.search(r"\d\d:\d\d:\d\d UTC", once("--root", tmp_path, "--axis", "time")[1])


def test_the_newest_run_is_shown_and_the_others_are_named(tmp_path):
    record(tmp_path, 100, run="old")
    record(tmp_path, 100, 200, run="new")
    text = once("--root", tmp_path)[0]
    assert text.startswith("new  running")
    assert "1 more: old (running)" in text
    assert once("--root", tmp_path, "--run", "old")[0].startswith("old  running")


def test_a_finished_run_says_so_and_what_it_cost(tmp_path):
    record(tmp_path, 100)
    row = attempt_row(attempt=1, resumed_from=None, seed=3, parameters=7, config={})
    row = with_cost(row, measured_seconds=2, elapsed_seconds=80, ended=datetime.now(UTC))
    ParquetSink(tmp_path, "r").put("attempts", 1, row)
    text = once("--root", tmp_path)[0]
    assert text.startswith("r  finished")
    assert "cost 2.5%" in text


def test_a_broken_file_is_left_out(tmp_path):
    record(tmp_path, *STEPS)
    (tmp_path / "induction" / "run=r" / f"{600:012d}.parquet").write_bytes(b"PAR1 broken")
    (tmp_path / "circuit" / "run=r" / f"{500:012d}.parquet").write_bytes(b"")
    even = once("--root", tmp_path)[1]
    assert "best induction head 1.0 0.32" in even
    assert "attribution at step 400" in even


def test_nothing_of_a_run_can_steer_the_terminal(tmp_path):
    record(tmp_path, 100)
    (tmp_path / "induction" / "run=r").rename(tmp_path / "induction" / "run=\x1b[2Jevil")
    text = once("--root", tmp_path, "--run", "\x1b[2Jevil")[0]
    assert "\x1b" not in text
    assert "?[2Jevil" in text


def test_errors_say_what_to_do(tmp_path):
    assert "no folder" in once("--root", tmp_path / "none", code=1)[1]
    told = once("--root", tmp_path, code=1)[1]
    assert "no runs in" in told
    assert "--root" in told
    record(tmp_path, 100, run="mine")
    assert "did you mean 'mine'" in once("--root", tmp_path, "--run", "mien", code=1)[1]


@contextmanager
def terminal(root, *arguments, size=(24, 80), **environment):
    """It in a terminal of so many rows and columns: a function that reads on until something is
    shown, or with nothing named until it has ended; the process; and our side of the terminal.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    clean = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [*COMMAND, "--root", str(root), *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**clean, "TERM": "xterm-256color", **environment},
        start_new_session=True,
    )
    os.close(theirs)
    seen = b""

    def read(until: str, seconds: float = 60) -> str:
        nonlocal seen
        end = time.monotonic() + seconds
        start = len(seen)
        while time.monotonic() < end:
            if select.select([ours], [], [], 0.2)[0]:
                try:
                    seen += os.read(ours, 65_536)
                except OSError:
                    break
            new = seen[start:].decode(errors="replace")
            if until and until in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", new):
                return new
        assert not until, f"no {until!r} in {seen[start:].decode(errors='replace')}"
        return seen[start:].decode(errors="replace")

    try:
        yield read, process, ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_a_terminal_follows_a_run_that_begins_and_grows_and_is_left_clean(tmp_path):
    with terminal(tmp_path) as (read, process, ours):
        assert "\x1b[?1049h" in read("waiting")
        record(tmp_path, 0, 100)
        read("step 100 ")
        record(tmp_path, 200, 300)
        read("step 300  induction head formed")
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
        os.kill(process.pid, signal.SIGWINCH)
        wide = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", read("layer × head") + read("Ctrl-C"))
        assert max(map(len, wide.splitlines())) > 100
        (tmp_path / "induction" / "run=r" / f"{350:012d}.parquet").write_bytes(b"broken")
        read("is left out")
        process.send_signal(signal.SIGINT)
        left = read("")
        assert process.wait(timeout=30) == 0
        # The screen of before is back, and so is the cursor.
        assert "\x1b[?1049l" in left
        assert "\x1b[?25h" in left
        assert "Traceback" not in left


def test_it_fits_a_small_terminal_to_the_row(tmp_path):
    record(tmp_path, *STEPS)
    with terminal(tmp_path, NO_COLOR="1") as (read, process, _):
        shown = read("Ctrl-C")
        frame = shown[shown.rindex("\x1b[H") :]
        rows = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", frame).splitlines()
        assert len(rows) == 24
        assert max(map(len, rows)) <= 80
        assert rows[-1].startswith("Ctrl-C")
        assert not re.search(r"\x1b\[[0-9;]*[34]8;", frame)
        process.send_signal(signal.SIGTERM)
        assert "\x1b[?1049l" in read("")
        assert process.wait(timeout=30) == 128 + signal.SIGTERM


def test_a_dumb_terminal_gets_lines(tmp_path):
    record(tmp_path, 0, 100, 200)
    with terminal(tmp_path, TERM="dumb") as (read, process, _):
        read("circuit:")
        record(tmp_path, 300)
        told = read("induction head formed since step 300: provisional")
        assert "step   300   loss late in held-out text, nats 3.50 ± 0.21" in told
        process.send_signal(signal.SIGINT)
        told += read("")
        assert process.wait(timeout=30) == 0
        assert "\x1b" not in told
        assert "Traceback" not in told


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_pipe_gets_it_whole_whatever_it_can_take(tmp_path, encoding):
    record(tmp_path, *STEPS)
    done = subprocess.run(
        [*COMMAND, "--once", "--root", str(tmp_path)],
        check=False,
        capture_output=True,
        timeout=60,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 0, done.stderr
    assert b"best induction head 1.0" in done.stdout
    assert b"0.32" in done.stdout
