"""The docs are true: the README's Python runs, its file tree exists, generated pages are fresh."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from typer.testing import CliRunner

from monitor.cli import app
from monitor.demo.model import AttentionOnly
from monitor.measure import measure
from tests.models import AttentionBlock, attend_by_sums, gpt2
from tests.models import AttentionOnly as BlocksOfAttention
from tests.monitor.concepts.tokenizers import characters

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MODELS = (ROOT / "docs" / "models.md").read_text()


SOURCES = [
    f"def add{i}(one, two):\n    # adds {i} to them\n    return one + two + {i}\n" * 4
    for i in range(9)
]


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = AttentionOnly(vocab_size=64, context=64, width=24)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


@pytest.mark.filterwarnings("ignore:.*")  # the trainer's own advice on workers and logging
def test_every_python_block_of_the_readme_runs_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tokens = torch.randint(0, 64, (80, 64))
    module = Module()
    names = {
        "my_module": module,
        "my_data": DataLoader(tokens, batch_size=4),
        "held_out_tokens": tokens,
        "batches": range(201),
        "train_on": lambda batch: None,
        "model": module.net,
        "my_model": gpt2(),
        "my_arguments": TrainingArguments("out", max_steps=2, report_to=[], use_cpu=True),
        "my_tokenizer": characters("".join(SOURCES)),
        "my_files": SOURCES,
        "my_rows": [{"input_ids": row % 48, "labels": row % 48} for row in tokens],
    }
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 9
    for block in blocks:
        exec(block.replace("max_steps=1000", "max_steps=2, accelerator='cpu'"), names)
    # Of two steps that take no time the budget admits what is saved, and not what is scheduled.
    assert set(names["heads"]["step"]) >= {0, 2, 100, 200}
    assert names["heads"]["run"].nunique() == 3
    assert names["best"].fetchall()
    assert len(names["tables"]["induction"]) == 6
    told = names["tables"]["concepts"]
    assert {"digit", "argument", "function_name"} <= set(told["concept"])
    assert (told["validity"] == "ok").any()


class MyAttention(AttentionBlock):
    """A module that writes attention in a way that nothing recognises."""

    def __init__(self, block):
        super().__init__(width=64, heads=4, attend=attend_by_sums)
        self.load_state_dict(block.state_dict())

    def queries_and_keys(self, residual):
        return self.projected(residual)[:2]


def test_the_adapter_of_the_page_on_models_reads_what_would_be_recognised():
    (block,) = re.findall(r"```python\n(.*?)```", MODELS, flags=re.DOTALL)
    torch.manual_seed(0)
    model = BlocksOfAttention()
    expected = measure(model, probes=["induction"])["induction"]
    model.blocks = torch.nn.ModuleList(map(MyAttention, model.blocks))
    names = {"model": model, "MyAttention": MyAttention}
    exec(block, names)
    found = names["tables"]["induction"]
    assert (found["prefix_matching"] - expected["prefix_matching"]).abs().max() < 1e-6
    assert found["validity"].eq("ok").all()


def test_the_file_tree_of_the_readme_is_the_file_tree():
    tree = README.split("Prometheus\n\n    monitor/")[1].split("\n\n")[0]
    named = set(re.findall(r"^\s+([a-z_]+(?:\.py|/))", tree, flags=re.MULTILINE))
    monitor = ROOT / "monitor"
    there = {path.name for path in monitor.glob("*.py")} - {"__init__.py"}
    there |= {f"{path.parent.name}/" for path in monitor.glob("*/__init__.py")}
    assert there <= named


def test_the_commands_of_the_readme_exist():
    targets = set(re.findall(r"^make (\w+)", README, flags=re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert targets == {"demo", "test"}
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)
    shown = CliRunner().invoke(app, ["demo", "--help"], env={"COLUMNS": "100"})
    assert shown.exit_code == 0
    assert all(option in shown.output for option in ("--steps", "--seed", "--root", "--port"))


def script(name):
    """One of the programs that make pages and pictures, loaded and not run."""
    found = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    loaded = importlib.util.module_from_spec(found)
    found.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "docs").glob("*.py")))
def test_what_makes_pages_and_pictures_finds_what_it_imports(name):
    assert script(name).__doc__


def test_the_tables_page_is_fresh():
    tables = script("tables")
    assert tables.page() == tables.PAGE.read_text(), "docs/tables.md is stale: run make docs"
