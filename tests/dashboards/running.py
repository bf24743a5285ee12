"""A real Prometheus with what is shipped, and runs that it finds."""

from __future__ import annotations

import shutil
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import dashboards
from monitor.recorder import Recorder
from monitor.sinks import ParquetSink
from tests.programs import Server, free_port, program, started, wait_for

# What the service alone tells; all else the runs tell themselves.
OF_SERVICE = """
  - job_name: phasewatch-service
    static_configs:
      - targets: ["{address}"]
    metric_relabel_configs:
      - source_labels: [__name__]
        action: keep
        regex: phasewatch_(run_finished|series_left_out)
"""


@contextmanager
def shipped(folder: Path, service: str | None = None):
    """A Prometheus with a copy of the shipped files beside `folder/runs`, only faster; it scrapes
    what the service at this address alone tells as well.
    """
    home = folder / "dashboards"
    shutil.copytree(Path(dashboards.__file__).parent, home)
    config = home / "prometheus.yml"
    text = config.read_text()
    for slow, fast in (
        ("scrape_interval: 5s", "scrape_interval: 200ms\n  scrape_timeout: 200ms"),
        ("evaluation_interval: 15s", "evaluation_interval: 200ms"),
        ("refresh_interval: 10s", "refresh_interval: 1s"),
    ):
        assert slow in text
        text = text.replace(slow, fast)
    if service is not None:
        text += OF_SERVICE.format(address=service.removeprefix("http://"))
    config.write_text(text)
    port = free_port()
    command = [
        program("prometheus"),
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    ]
    with (folder / "log").open("w") as log, started(command, stdout=log, stderr=log):
        server = Server(f"http://127.0.0.1:{port}")

        def ready():
            with urllib.request.urlopen(f"{server.url}/-/ready", timeout=5) as answer:
                return answer.status == 200

        wait_for(ready, "prometheus to be ready")
        yield server


def recorder(root: Path, run: str, **info: str) -> Recorder:
    """What records a run, and serves its metrics; `info` is about the run."""
    made = Recorder(ParquetSink(root, run), ())
    made.begin(run, address="127.0.0.1", port=0, info=info)
    return made
