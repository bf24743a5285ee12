"""Trainings in processes of their own: scraped by a real Prometheus while they run, and killed in
the middle and started again.
"""

import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import monitor
from dashboards import PROMETHEUS_CONFIG
from tests.programs import Server, free_port, program, started, wait_for

REPOSITORY = Path(__file__).parents[1]

# Trains a step every `pause` seconds and says each; goes on from `checkpoint` where that is given.
TRAINING = """
import sys, time
import pytorch_lightning as pl
import torch
from callbacks import TrainingDynamics
from tests.callbacks.tiny import loader, tiny_class, trainer

root, port, pause, steps, checkpoint = sys.argv[1:6]

class Pause(pl.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        time.sleep(float(pause))

    def on_train_batch_end(self, trainer, *_):
        print(trainer.global_step, flush=True)

    def on_train_end(self, *_):
        time.sleep(float(pause))

torch.set_num_threads(1)
torch.manual_seed(0)
saving = pl.callbacks.ModelCheckpoint(
    dirpath=root + "/checkpoints", filename="{step}", auto_insert_metric_name=False,
    every_n_train_steps=5, save_top_k=-1,
)
watching = TrainingDynamics(
    root=root, run=None if checkpoint else "mine", probes=["induction", "in_context"],
    overhead=None, schedule=1, sequences=4,
    metrics_port=int(port) if port else None,
)
running = trainer(
    "pytorch_lightning", root, callbacks=[watching, Pause(), saving], max_steps=int(steps),
    enable_checkpointing=True,
)
running.fit(tiny_class("pytorch_lightning")(), loader(), ckpt_path=checkpoint or None)
"""


def training(root, *, port="", pause=0.0, steps=8, checkpoint=""):
    """A training in a process of its own."""
    words = map(str, (root, port, pause, steps, checkpoint))
    return started(
        [sys.executable, "-c", TRAINING, *words],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@contextmanager
def prometheus(folder: Path, target: int):
    """Debian's Prometheus, which scrapes a port of this machine."""
    folder.mkdir()
    config = folder / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 200ms, scrape_timeout: 200ms}\n"
        "scrape_configs:\n"
        "  - job_name: phasewatch\n"
        f"    static_configs: [{{targets: ['127.0.0.1:{target}']}}]\n"
    )
    port = free_port()
    command = [
        program("prometheus"),
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    with (folder / "log").open("w") as log, started(command, stdout=log, stderr=log) as process:
        url = f"http://127.0.0.1:{port}"

        def ready():
            assert process.poll() is None, (folder / "log").read_text()
            with urllib.request.urlopen(f"{url}/-/ready", timeout=5) as answer:
                return answer.status == 200

        wait_for(ready, "prometheus to be ready")
        server = Server(url)
        # It begins to scrape some seconds after it is ready.
        wait_for(lambda: server.ask("query", query="up")["result"], "prometheus to scrape")
        yield server


@pytest.fixture(scope="module")
def scraped(tmp_path_factory):
    """A training of six steps that a Prometheus scraped: the server, and the root of the tables."""
    folder = tmp_path_factory.mktemp("scraped")
    root, port = folder / "runs", free_port()
    with prometheus(folder / "prometheus", port) as server:
        with training(root, port=port, pause=0.7, steps=6) as process:
            _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        # The last scrapes must have arrived.
        time.sleep(0.5)
        yield server, root


def test_prometheus_has_every_step(scraped):
    server, root = scraped
    steps = server.samples("phasewatch_step")
    assert sorted(set(steps.values())) == [0, 1, 2, 3, 4, 5, 6]
    assert list(steps.values()) == sorted(steps.values())
    tokens = server.samples("phasewatch_tokens")
    stored = monitor.read(root, "in_context").set_index("step")["tokens"]
    assert {int(steps[at]): value for at, value in tokens.items()} == stored.to_dict()


def test_every_head_is_scraped_as_it_is_stored(scraped):
    server, root = scraped
    steps = server.samples("phasewatch_step")
    heads = monitor.read(root, "induction")
    assert len(heads) == 7 * 4
    checked = 0
    for (layer, head), rows in heads.groupby(["layer", "head"]):
        stored = rows.set_index("step")
        for column in ("prefix_matching", "prefix_matching_stderr", "prefix_matching_null"):
            selector = f'phasewatch_induction_{column}{{run="mine",layer="{layer}",head="{head}"}}'
            for at, value in server.samples(selector).items():
                assert value == stored[column][int(steps[at])]
                checked += 1
    assert checked >= 4 * 3 * 7
    # Training moves them, so that the wrong step would show.
    assert heads.groupby(["layer", "head"])["prefix_matching"].nunique().min() > 1


def test_values_are_aligned_with_steps_in_promql(scraped):
    server, root = scraped
    steps = server.samples("phasewatch_step")
    heads = monitor.read(root, "induction").set_index(["step", "layer", "head"])
    for step in range(7):
        seen = [at for at, value in steps.items() if value == step]
        at = seen[len(seen) // 2]
        query = f"phasewatch_induction_entropy_nats and on(run) (phasewatch_step == {step})"
        found = server.instant(query, at)
        assert len(found) == 4
        for (layer, head), value in found.items():
            assert value == heads["entropy"][step, int(layer), int(head)]
        best = server.instant("max by (layer) (phasewatch_induction_prefix_matching)", at)
        shown = server.instant("phasewatch_induction_prefix_matching_layer_max", at)
        assert best == shown
        assert len(shown) == 2


def test_a_range_shows_when_each_value_held(scraped):
    server, root = scraped
    steps = server.samples("phasewatch_step")
    query = 'phasewatch_in_context_repeat_later_nats{run="mine"}'
    (series,) = server.ask("query_range", query=query, start=min(steps), end=max(steps), step=0.2)[
        "result"
    ]
    stored = monitor.read(root, "in_context")
    measured = stored["time"].map(pd.Timestamp.timestamp).to_numpy()
    values = stored["repeat_later"].to_numpy().astype(float)
    shown = [(at, float(value)) for at, value in series["values"]]
    assert {value for _, value in shown} == set(values)
    for at, value in shown:
        # From its measurement on, and until a scrape after the next one.
        begun = measured[values == value][0]
        following = measured[measured > begun]
        assert at >= begun
        assert not len(following) or at <= following[0] + 1.0
    # Prometheus's own time of the measurement is the stored one.
    last = server.samples("phasewatch_last_measurement_timestamp_seconds")
    assert np.allclose(sorted(set(last.values())), measured, atol=1e-3)


def test_the_run_can_be_joined_and_nothing_failed(scraped):
    server, _ = scraped
    steps = server.samples("phasewatch_step")
    at = list(steps)[len(steps) // 2]
    joined = server.ask(
        "query",
        query="phasewatch_step * on(run) group_left(model, attempt) phasewatch_run_info",
        time=at,
    )["result"]
    assert joined[0]["metric"]["model"] == "TinyLM"
    assert joined[0]["metric"]["attempt"] == "1"
    assert not server.ask("query", query="phasewatch_failures_total", time=at)["result"]
    assert set(server.samples("phasewatch_series_dropped_total").values()) == {0.0}
    assert set(server.samples("scrape_samples_scraped").values()) != {0.0}


def test_the_configuration_that_is_shipped_is_accepted():
    command = [program("promtool"), "check", "config", PROMETHEUS_CONFIG]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is valid prometheus config file syntax" in done.stdout
    # Training says by itself where it is to be scraped.
    assert "../runs/_targets/*.json" in PROMETHEUS_CONFIG.read_text()


def test_metrics_pass_the_linter_of_prometheus(tmp_path):
    """promtool knows the naming conventions: units, suffixes, help of every metric."""
    from monitor.sinks import PrometheusSink
    from tests.monitor.sinks.fabricated import measurement

    sink = PrometheusSink("r", port=0)
    try:
        sink.write(measurement(5, failures=["heads"]))
        with urllib.request.urlopen(f"{sink.url}/metrics", timeout=10) as answer:
            page = answer.read()
    finally:
        sink.close()
    done = subprocess.run(
        [program("promtool"), "check", "metrics"],
        check=False, input=page, capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr).decode()


def test_a_training_that_is_killed_goes_on_without_loss_and_without_doubles(tmp_path):
    root = tmp_path / "runs"
    with training(root, pause=0.02, steps=1000) as process:
        for line in process.stdout:
            if line.strip() == "13":
                break
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert process.returncode == -signal.SIGKILL
    before = monitor.read(root, "in_context")
    assert before["step"].tolist() == list(range(len(before)))
    assert len(before) >= 14
    heads = monitor.read(root, "induction")
    assert heads["step"].max() in (before["step"].max(), before["step"].max() + 1)

    checkpoint = root / "checkpoints" / "10.ckpt"
    with training(root, steps=15, checkpoint=checkpoint) as process:
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    frame = monitor.read(root, "in_context")
    assert set(frame["run"]) == {"mine"}
    assert frame["step"].tolist() == list(range(16))
    assert frame["attempt"].tolist() == [1] * 11 + [2] * 5
    assert frame["tokens"].tolist() == [step * 128 for step in range(16)]
    kept = ["step", "score", "repeat_later"]
    assert frame[kept][:11].equals(before[kept][:11])
    aside = list(root.glob("_superseded/in_context/run=mine/*.parquet"))
    assert len(aside) == len(before) - 11
    heads = monitor.read(root, "induction")
    assert heads["step"].tolist() == [step for step in range(16) for _ in range(4)]
    attempts = monitor.read(root, "attempts")
    assert attempts["resumed_from"].fillna(-1).tolist() == [-1, 10]
