"""Whether names that users give can be used, and which one they may have meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

# No longer than the name of a folder may be.
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_LONGEST_LABEL = 60


def check_run_name(run: str) -> str:
    """Returns `run`, or raises `ValueError` when it cannot name a folder and a metric label."""
    if not _RUN_NAME.fullmatch(run):
        raise ValueError(
            f"run name {run!r} cannot be used: expected letters, digits, '.', '_' and '-', "
            "at most 200, beginning with a letter or digit (it names a folder); choose another run="
        )
    return run


def check_label(name: Any, of: str, example: str) -> str:
    """Returns the name that a user gave to something `of` a kind, such as `example`.

    Raises `TypeError` where it is no text, and `ValueError` where it does not fit a column or the
    label of a metric.
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of {of} is {name!r:.80}; expected text such as {example!r}")
    if not (name.strip() == name and name.isprintable() and 1 <= len(name) <= _LONGEST_LABEL):
        raise ValueError(
            f"the name of {of} is {name[:80]!r}; expected 1 to {_LONGEST_LABEL} printable "
            f"characters without spaces around them, such as {example!r}"
        )
    return name


def expect_one_of(what: str, name: str, known: Sequence[str]) -> None:
    """Raises `ValueError` naming the known ones, and the nearest, when `name` is none of them."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown {what}: {name!r}; known: {', '.join(known)}{hint}")
