"""What is said of transitions, as annotations that dashboards in Grafana show over all else."""

from __future__ import annotations

import json
import threading
import urllib.parse
import urllib.request
from collections import deque
from typing import Any

from monitor.record import Measurement, Moment

_TABLE = "transitions"

# A server that is down may come back; what waits for it must not fill the memory instead.
_MOST_WAITING = 1_000


class GrafanaSink:
    """Makes an annotation of each row of `transitions`, with the tags `phasewatch`, the run, the
    series and the state, by Grafana's HTTP API.

    Training waits for none of it: annotations are sent from a thread of their own. What could not
    be sent is tried again with the next measurement, which then says so, and at the end.

    >>> sink = GrafanaSink("http://localhost:3000", token="glsa_...")
    >>> sink.close()

    Args:
        url: where Grafana is.
        token: of a service account that may write annotations; None: Grafana asks for none.
        timeout: seconds to wait for an answer.

    Raises:
        ValueError: `url` is no http or https address.
    """

    def __init__(self, url: str, *, token: str | None = None, timeout: float = 5.0) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.netloc:
            raise ValueError(f"url={url!r}; expected Grafana's address, as http://localhost:3000")
        self._url = url.rstrip("/") + "/api/annotations"
        self._headers = {"Content-Type": "application/json"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._timeout = timeout
        self._waiting: deque[bytes] = deque(maxlen=_MOST_WAITING)
        self._error: OSError | None = None
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(
            target=self._send_all, name="phasewatch-grafana", daemon=True
        )
        self._thread.start()

    def write(self, measurement: Measurement) -> None:
        """Sends what the measurement says of transitions; raises what went wrong before."""
        rows = [
            row
            for reading in measurement.readings
            if reading.spec.name == _TABLE
            for row in reading.table.to_pylist()
        ]
        self._waiting += [_annotation(row, measurement.moment) for row in rows]
        if self._waiting:
            self._wake.set()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Sends what waits; raises `OSError` where that cannot be done."""
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout=2 * self._timeout)
        if self._waiting:
            raise OSError(
                f"{len(self._waiting)} annotations were not sent to {self._url}: {self._error}"
            )

    def _send_all(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            closing = self._closing.is_set()
            try:
                while self._waiting:
                    self._send(self._waiting[0])
                    self._waiting.popleft()
            except OSError as error:
                self._error = OSError(f"{self._url} took no annotation: {error}")
            if closing:
                return

    def _send(self, body: bytes) -> None:
        # The scheme was checked to be that of a web address.
        request = urllib.request.Request(self._url, data=body, headers=self._headers)  # noqa: S310
        with urllib.request.urlopen(request, timeout=self._timeout):  # noqa: S310
            pass


def _annotation(row: dict[str, Any], moment: Moment) -> bytes:
    what = f"{row['series']} {row['direction']}, {row['state']}"
    label = f" ({row['label']})" if row["label"] else ""
    return json.dumps(
        {
            "time": round(moment.time.timestamp() * 1000),
            "tags": ["phasewatch", moment.run, row["series"], row["state"]],
            "text": f"{what} at step {moment.step}, since step {row['began']:.0f}{label}",
        }
    ).encode()
