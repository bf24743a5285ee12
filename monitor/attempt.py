"""One attempt of a run: what it ran with, so that its numbers can be understood later."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import secrets
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from monitor.record import ATTEMPTS

_PACKAGES = ("phasewatch", "torch", "pytorch-lightning", "lightning", "transformers", "numpy")


def new_run_name() -> str:
    """A name from date and time, with a random end that draws on no random stream of training."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def attempt_row(
    *,
    attempt: int,
    resumed_from: int | None,
    seed: int,
    parameters: int,
    config: Mapping[str, Any],
) -> pa.Table:
    """The one row of the `attempts` table that describes this attempt and where it runs."""
    row = {
        "attempt": attempt,
        "started": datetime.now(UTC),
        "resumed_from": resumed_from,
        "seed": seed,
        "parameters": parameters,
        "host": platform.node(),
        "revision": _code_revision(),
        "versions": json.dumps(_versions()),
        "config": json.dumps(config, default=str),
    }
    return with_cost(pa.Table.from_pylist([row], schema=ATTEMPTS))


def with_cost(
    row: pa.Table,
    *,
    measurements: int = 0,
    measured_seconds: float = 0.0,
    elapsed_seconds: float = 0.0,
    ended: datetime | None = None,
) -> pa.Table:
    """The row, saying how much of the attempt's time measuring took so far, and when the attempt
    was closed, if it was.
    """
    cost = {
        "measurements": measurements,
        "measured_seconds": measured_seconds,
        "elapsed_seconds": elapsed_seconds,
        "ended": ended,
    }
    return pa.Table.from_pylist([row.to_pylist()[0] | cost], schema=ATTEMPTS)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _code_revision() -> str | None:
    """The git revision of the working folder (with `-dirty` where it has changes), or None."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
