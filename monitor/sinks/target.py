"""Where a run's metrics are served, in a file that Prometheus finds: `<root>/_targets/<run>.json`.

The format is that of Prometheus' `file_sd_configs`, with the run as a label.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from urllib.parse import urlsplit

from monitor.names import check_run_name
from monitor.replacing import replacing

FOLDER = "_targets"

_EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104  # compared with, and not listened on


class Target:
    """Says that the metrics of `run` are served at `url`, until it is closed.

    The file appears whole or not at all. The latest attempt of a run has it: an earlier one that
    still ends leaves it alone. A process that is killed leaves its file behind; nothing answers
    there, or another run whose page the shipped configuration drops, since its run is not the
    file's. The run's next attempt replaces it. Metrics that are served on all addresses are to be
    found at the name of the machine. Raises `ValueError` where the run's name cannot name a file,
    and `OSError` where it cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as root:
    ...     target = Target(root, "mine", "http://127.0.0.1:9464")
    ...     print(target.path.read_text())
    ...     target.close()
    ...     target.path.exists()
    [{"targets": ["127.0.0.1:9464"], "labels": {"run": "mine"}}]
    False
    """

    def __init__(self, root: str | Path, run: str, url: str) -> None:
        self.path = Path(root) / FOLDER / f"{check_run_name(run)}.json"
        where = urlsplit(url)
        host = socket.gethostname() if where.hostname in _EVERYWHERE else None
        address = f"{host}:{where.port}" if host else where.netloc
        self._text = json.dumps([{"targets": [address], "labels": {"run": run}}])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as temporary:
            temporary.write_text(self._text)

    def close(self) -> None:
        """Removes the file, unless it is another attempt's by now."""
        if self.path.exists() and self.path.read_text() == self._text:
            self.path.unlink(missing_ok=True)
