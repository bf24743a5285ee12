"""Files that are there whole, or as they were before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ABANDONED = ".*.tmp"
"""Matches what a killed process was writing."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place where the block ends without error.

    Its name begins with a dot and ends with neither `.json` nor `.parquet`: nobody reads it.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "page.html"
        >>> with replacing(path) as temporary:
        ...     _ = temporary.write_text("half")
        ...     path.exists()
        False
        >>> path.read_text()
        'half'
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
