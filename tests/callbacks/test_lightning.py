"""TrainingDynamics as a callback: under every Lightning there is, by default and from a command
line, what it serves meanwhile, and what it keeps out of.
"""

import socket
import urllib.parse

import pytest
import torch

import monitor
from callbacks import TrainingDynamics
from monitor.measure import Monitor
from tests.callbacks.tiny import (
    LIGHTNING_WARNINGS,
    PACKAGES,
    TOKENS_A_BATCH,
    hook,
    loader,
    of,
    text,
    tiny_class,
    trainer,
)
from tests.recorded import attempt, page, steps, tokens

pytestmark = pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)


def test_it_is_a_callback_of_every_lightning_there_is(dynamics):
    watching = dynamics()
    assert all(isinstance(watching, of(package, "Callback")) for package in PACKAGES)


def test_everything_by_default(package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # Somebody else may use the default one.
    monkeypatch.setitem(TrainingDynamics.__init__.__kwdefaults__, "metrics_port", port)
    # In so short a training next to nothing would be within the budget.
    monkeypatch.setitem(TrainingDynamics.__init__.__kwdefaults__, "overhead", None)
    torch.manual_seed(0)
    trainer(package, tmp_path, callbacks=[TrainingDynamics()]).fit(tiny_class(package)(), loader())
    assert steps("runs") == [0, 1, 2, 4, 8]
    heads = monitor.read("runs", "induction")
    assert len(heads) == 5 * 4
    assert set(heads["validity"]) == {"ok"}
    assert tokens("runs") == [step * TOKENS_A_BATCH for step in (0, 1, 2, 4, 8)]
    row = attempt("runs")
    assert row["config"]["model"] == "TinyLM"
    assert row["config"]["module"] == "Tiny"
    assert row["config"]["accumulate_grad_batches"] == 1
    assert row["attempt"] == 1


def test_from_a_command_line(package, root, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    # Lightning calls what jsonargparse has deprecated.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    command_line = of(package, "cli.LightningCLI")
    data = loader()

    class Data(of(package, "LightningDataModule")):
        def train_dataloader(self):
            return data

    command_line(
        tiny_class(package),
        Data,
        save_config_callback=None,
        seed_everything_default=0,
        args=[
            "fit",
            "--trainer.callbacks=callbacks.TrainingDynamics",
            f"--trainer.callbacks.root={root}",
            "--trainer.callbacks.schedule=[2,6]",
            "--trainer.callbacks.overhead=null",
            "--trainer.callbacks.probes=[in_context]",
            "--trainer.callbacks.run=007",
            "--trainer.callbacks.model=net",
            "--trainer.callbacks.metrics_port=null",
            "--trainer.max_steps=8",
            "--trainer.accelerator=cpu",
            "--trainer.logger=false",
            "--trainer.enable_checkpointing=false",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
        ],
    )
    frame = monitor.read(root, "in_context")
    assert frame[["run", "step"]].values.tolist() == [["007", 2], ["007", 6]]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions(fit, dynamics, root, precision):
    fit(dynamics(schedule=2), precision=precision, max_steps=2)
    frame = monitor.read(root, "induction")
    assert set(frame["validity"]) == {"ok"}
    assert frame["prefix_matching"].between(0, 1).all()
    assert set(monitor.read(root, "in_context")["validity"]) == {"ok"}
    assert monitor.tables(root) == ["attempts", "in_context", "induction", "stimuli"]
    assert attempt(root)["config"]["precision"] == precision


def test_sanity_checks_and_validation_measure_nothing(dynamics, root, package, tmp_path):
    module = tiny_class(package)()
    watching = dynamics(schedule=[3])
    running = trainer(package, tmp_path, callbacks=[watching], num_sanity_val_steps=2)
    running.validate(module, loader(), verbose=False)
    assert not root.exists()
    running.fit(module, loader(), loader(text(8)))
    assert steps(root) == [3]
    running.validate(module, loader(), verbose=False)
    assert steps(root) == [3]
    assert len(monitor.read(root, "attempts")) == 1


def test_fast_dev_run_measures_and_writes_nothing(fit, dynamics, root, monkeypatch):
    measured, urls = [], []
    original = Monitor.measure

    def watched(self, model, step, tokens=None, **more):
        given = original(self, model, step, tokens, **more)
        measured.append((step, len(given.readings), len(given.failures)))
        urls.append(self.url)
        return given

    monkeypatch.setattr(Monitor, "measure", watched)
    # With a schedule that would never fire in so short a training.
    fit(dynamics(schedule=[0, 1, 1000], metrics_port=0), fast_dev_run=3)
    assert measured == [(0, 2, 0), (1, 2, 0)]
    assert urls == [None, None]
    assert not root.exists()


def test_metrics_while_it_trains_and_the_port_is_free_afterwards(
    fit, dynamics, root, package, caplog
):
    urls, pages = [], []

    def look(trainer, *_):
        urls.append(watching.monitor.url)
        pages.append(page(watching.monitor.url))

    # A taken port stops no training: the next free one is used.
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        watching = dynamics(schedule=1, run="mine", metrics_port=port)
        fit(watching, hook(package, on_train_batch_end=look), max_steps=3)
    assert steps(root) == [0, 1, 2, 3]
    assert f"port {port} is taken" in caplog.text
    (url,) = set(urls)
    number = urllib.parse.urlsplit(url).port
    assert number > port
    for step, shown in zip((1, 2, 3), pages, strict=True):
        assert f'phasewatch_step{{run="mine"}} {step}.0' in shown
        assert f'phasewatch_tokens{{run="mine"}} {step * TOKENS_A_BATCH}.0' in shown
    socket.create_server(("127.0.0.1", number)).close()
    assert watching.monitor is None


def test_a_probe_that_raises_does_not_stop_training(fit, dynamics, root, monkeypatch, caplog):
    def broken(observations):
        raise ZeroDivisionError("planted")

    prepare = Monitor.prepare

    def prepare_broken(self, *arguments):
        given = prepare(self, *arguments)
        first, *rest = self._probes
        self._probes = (type(first)(spec=first.spec, compute=broken), *rest)
        return given

    monkeypatch.setattr(Monitor, "prepare", prepare_broken)
    module = fit(dynamics(schedule=2))
    assert len(module.seen) == 8
    assert steps(root) == [0, 2, 4, 6, 8]
    assert len(monitor.read(root, "failures")) == 5
    assert caplog.text.count("induction failed, training goes on") == 1
