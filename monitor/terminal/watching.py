"""Following the runs under a folder in a terminal: `phasewatch watch`."""

from __future__ import annotations

import difflib
import io
import logging
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.live import Live

from monitor.service import telling
from monitor.service.following import Folder
from monitor.terminal.essentials import Axis, Essentials, Kept, essentials, started
from monitor.terminal.saying import plain
from monitor.terminal.view import View

_log = logging.getLogger("phasewatch")

# Seconds between two looks at the folder.
_POLL = 1.0


class Watching:
    """The runs under `root`, of which one is looked at: `run`, or the newest that is running, or
    where none is the one that was measured last.

    Raises `FileNotFoundError` where there is no such folder.
    """

    def __init__(self, root: Path, *, run: str | None, axis: Axis) -> None:
        if not root.is_dir():
            raise FileNotFoundError(
                f"no folder {root}: expected the root= of a run; begin one, or name its folder "
                "with --root"
            )
        self._root, self._run, self._axis = root, run, axis
        self._folder = Folder(root)
        self._known: tuple[Any, ...] = ()
        self._seen: Essentials | None = None
        self._kept: Kept = {}

    def look(self) -> tuple[Essentials | None, list[Mapping[str, Any]]]:
        """What there is to see now of the run that is looked at, and the other runs.

        None where there is no such run yet.
        """
        runs = telling.runs(self._folder)
        about = self._chosen(runs)
        if about is None:
            self._known, self._seen = (), None
            return None, list(runs)
        # Reading all of its files again is worth while only where there is another one.
        known = tuple(about.items())
        if self._seen is None or self._seen.about["run"] != about["run"]:
            self._kept.clear()
        if self._seen is None or known != self._known:
            self._seen = essentials(self._folder, about, self._axis, self._kept)
            self._known = known
        return self._seen, [one for one in runs if one is not about]

    def missing(self) -> str:
        """Why there is nothing to see, and what to do."""
        names = [one["run"] for one in telling.runs(self._folder)]
        if not names:
            return f"no runs in {self._root} yet: begin one, or name another folder with --root"
        close = difflib.get_close_matches(self._run or "", names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"no run {self._run!r} in {self._root}: expected one of {', '.join(names)}{hint}"

    def _chosen(self, runs: list[dict[str, Any]]) -> dict[str, Any] | None:
        if self._run is not None:
            return next((one for one in runs if one["run"] == self._run), None)

        def newest(one: Mapping[str, Any]) -> tuple[bool, float, str]:
            running = one["state"] == "running"
            return running, started(self._folder, one["run"]), one["time"] or ""

        return max(runs, key=newest, default=None)


def watch(root: Path, *, run: str | None, once: bool, axis: Axis, console: Console) -> None:
    """Shows a run in `console`, until Ctrl-C or, with `once`, as it is now.

    Where the console is no terminal that can be drawn on anew it is one line a measurement.
    Raises `FileNotFoundError` where there is no such folder, and with `once` `LookupError` where
    there is no run to show.
    """
    watching = Watching(root, run=run, axis=axis)
    if isinstance(console.file, io.TextIOWrapper):
        # Of what cannot be written where nothing but ASCII can, the numbers are left.
        console.file.reconfigure(errors="replace")
    if once:
        seen, others = watching.look()
        if seen is None:
            raise LookupError(watching.missing())
        console.print(View(root=str(root), seen=seen, others=others, now=time.time()))
        return
    if console.is_interactive:
        with _notes() as notes, _ends():
            _drawn(console, _views(root, watching, notes))
    else:
        _printed(console, _views(root, watching))


def _views(root: Path, watching: Watching, notes: Sequence[str] = ()) -> Iterator[View]:
    """What there is to see, once a second, with the last of the `notes`."""
    while True:
        seen, waiting = None, ""
        others: list[Mapping[str, Any]] = []
        try:
            seen, others = watching.look()
            if seen is None:
                waiting = watching.missing()
        except Exception as error:
            # Another process may be in the middle of anything; the next look may well succeed.
            _log.warning("the runs could not be read: %s", error)
            waiting = f"the runs could not be read: {error}"
        yield View(
            root=str(root),
            seen=seen,
            others=others,
            now=time.time(),
            note=notes[-1] if notes else "",
            waiting=waiting,
        )
        time.sleep(_POLL)


def _drawn(console: Console, views: Iterator[View]) -> None:
    """On a screen of its own, of which nothing is left behind but what was seen last."""
    last = next(views)
    live = Live(replace(last, screen=True), console=console, screen=True)
    try:
        # Not by `with`: the process may be ended while the first frame is drawn.
        live.start(refresh=True)
        for last in views:
            live.update(replace(last, screen=True))
    finally:
        live.stop()
        if last.seen is not None:
            console.print(last)


def _printed(console: Console, views: Iterator[View]) -> None:
    """What there is, and then a line for every measurement and transition that is new."""
    shown: Essentials | None = None
    waited = ""
    for view in views:
        seen = view.seen
        if seen is None and view.waiting != waited:
            console.print(plain(view.waiting), soft_wrap=True, markup=False)
        elif seen is not None and (shown is None or shown.about["run"] != seen.about["run"]):
            console.print(view)
        elif seen is not None and shown is not None:
            _print_new(console, shown, seen)
        shown, waited = seen or shown, view.waiting


def _print_new(console: Console, before: Essentials, now: Essentials) -> None:
    if now.about["last_step"] != before.about["last_step"]:
        shown = "   ".join(map(str, now.numbers))
        step = f"step {now.about['last_step']:5d}"
        console.print(f"{step}   {shown}", soft_wrap=True, markup=False)
    for one in reversed(now.said[: max(0, len(now.said) - len(before.said))]):
        console.print(str(one), soft_wrap=True, markup=False)
    if now.about["state"] != before.about["state"]:
        console.print(f"{now.about['run']} is {now.about['state']}", soft_wrap=True, markup=False)


@contextmanager
def _notes() -> Iterator[Sequence[str]]:
    """The last that phasewatch warned of, which would tear the view."""
    said: deque[str] = deque(maxlen=1)
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    before = _log.propagate
    _log.propagate = False
    _log.addHandler(handler)
    try:
        yield said
    finally:
        _log.removeHandler(handler)
        _log.propagate = before


@contextmanager
def _ends() -> Iterator[None]:
    """Lets what ends a process from outside leave the terminal as it was, too."""

    def leave(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {one: signal.signal(one, leave) for one in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
