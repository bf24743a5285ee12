"""Looks at what a Parquet sink has left on disk."""

from pathlib import Path

import monitor


def files(root: Path) -> list[str]:
    """Every file below `root`, Parquet or not."""
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def scores(root: Path) -> dict[int, set[float]]:
    """The scores of each step, rounded."""
    frame = monitor.read(root, "heads")
    return {
        int(step): {round(float(score), 2) for score in rows["score"]}
        for step, rows in frame.groupby("step")
    }
