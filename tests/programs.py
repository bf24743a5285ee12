"""Programs that the tests run for real, on loopback and on free ports: started, waited for, asked,
and ended.
"""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from contextlib import contextmanager, suppress

import pytest

# What a shell starts in the background ignores Ctrl-C, and so does all that it starts: not this.
_CODE = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from monitor.cli import app; app()"
)
PHASEWATCH = [sys.executable, "-c", _CODE]


@contextmanager
def started(command, **more):
    """A process, which is ended if it still runs when it is left."""
    with subprocess.Popen(command, **more) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(10)
            if process.poll() is None:
                process.kill()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def program(name: str) -> str:
    found = shutil.which(name)
    assert found, f"this test needs {name} on the PATH (see tests/install_components)"
    return found


def wait_for(condition, what: str, seconds: float = 60):
    """The first true value of `condition()`."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with suppress(OSError):
            if value := condition():
                return value
        time.sleep(0.05)
    pytest.fail(f"waited {seconds} seconds for {what}")


class Server:
    """A Prometheus that scrapes one address five times a second, and what it answers."""

    def __init__(self, url: str):
        self.url = url

    def ask(self, path: str, **parameters):
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=10) as answer:
            given = json.load(answer)
        assert given["status"] == "success"
        return given["data"]

    def samples(self, selector: str) -> dict[float, float]:
        """What was scraped of one series: its values by time."""
        (series,) = self.ask("query", query=f"{selector}[10m]")["result"]
        return {time: float(value) for time, value in series["values"]}

    def instant(self, query: str, at: float) -> dict[tuple[str, str], float]:
        """The values of a query at one time, by layer and head."""
        found = self.ask("query", query=query, time=at)["result"]
        return {
            (series["metric"].get("layer", ""), series["metric"].get("head", "")): float(
                series["value"][1]
            )
            for series in found
        }
