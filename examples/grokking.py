"""A small network groks addition modulo 59, under watch: `python examples/grokking.py`.

An embedding and one hidden layer, trained with weight decay on 40% of all pairs. It knows the
training pairs by heart within 100 steps, and gets the others right hundreds of steps later; the
restricted loss, with the key frequencies of each very measurement, falls before that. With
`--weight-decay 0` nothing of the kind happens. Takes some fifteen seconds on one core.

The run is written under `--root`; `--csv` writes its table as one file too, with columns of
hindsight, `..._named`: those of a second pass over the checkpoints, with the key frequencies that
the last measurement found. `grokking.csv` and `grokking_without_decay.csv` were made so.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

import monitor
from monitor.measure import Monitor, measure
from monitor.tasks import ModularAddition
from monitor.transitions import fit

P, SHARE, EVERY = 59, 0.4, 20


class TwoNumbers(nn.Module):
    """Reads two numbers [batch, 2] and gives the logits [batch, number] of their sum."""

    def __init__(self, width: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(P, width)
        self.hidden = nn.Linear(2 * width, hidden)
        self.unembedding = nn.Linear(hidden, P)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The two embeddings side by side: a + b and b + a have to be learned both."""
        logits: torch.Tensor = self.unembedding(
            F.relu(self.hidden(self.embedding(tokens).flatten(1)))
        )
        return logits


def train(root: Path, *, steps: int, weight_decay: float = 1.0, seed: int = 0) -> pd.DataFrame:
    """Trains under watch, and returns the table of the run with the columns of hindsight."""
    torch.manual_seed(seed)
    model = TwoNumbers()
    every = torch.cartesian_prod(torch.arange(P), torch.arange(P))
    pairs = every[torch.randperm(len(every))[: int(SHARE * len(every))]]
    task = ModularAddition(P, train=pairs, sequence=("a", "b"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=weight_decay)
    checkpoints = {}
    with Monitor(root, probes=["grokking"], task=task) as watch:
        for step in range(steps + 1):
            if step % EVERY == 0:
                watch.measure(model, step=step)
                checkpoints[step] = copy.deepcopy(model.state_dict())
            optimizer.zero_grad()
            F.cross_entropy(model(pairs), pairs.sum(1) % P).backward()
            optimizer.step()
    table = monitor.read(root, "grokking", run=watch.run).set_index("step")
    last = [int(key) for key in table["key_frequencies"].iloc[-1]]
    again = hindsight(model, checkpoints, dataclasses.replace(task, keys=last))
    return table.assign(**again)


def hindsight(
    model: nn.Module, checkpoints: Mapping[int, Mapping[str, Any]], task: ModularAddition
) -> pd.DataFrame:
    """What the frequencies that the task names do at each checkpoint."""
    rows = {}
    for step, weights in checkpoints.items():
        model.load_state_dict(weights)
        rows[step] = measure(model, probes=["grokking"], task=task)["grokking"].iloc[0]
    frame = pd.DataFrame.from_dict(rows, orient="index")
    return frame[[column for column in frame if "_named" in column]].astype(float)


def write(table: pd.DataFrame, path: Path) -> None:
    """One row a measurement; the lists of key frequencies as words, without the spectrum."""
    words = table["key_frequencies"].map(lambda keys: " ".join(f"{key:.0f}" for key in keys))
    kept = table.drop(columns=["run", "tokens", "time", "attempt", "spectrum"])
    kept.assign(key_frequencies=words).to_csv(path, float_format="%.6g")


def main() -> None:
    """Trains, and says when what changed."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    arguments.add_argument("--root", type=Path, default=Path("runs"))
    arguments.add_argument("--csv", type=Path)
    arguments.add_argument("--steps", type=int, default=1500)
    arguments.add_argument("--weight-decay", type=float, default=1.0)
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    table = train(given.root, steps=given.steps, weight_decay=given.weight_decay, seed=given.seed)
    if given.csv is not None:
        write(table, given.csv)
    for series in ("restricted_loss", "held_out_accuracy"):
        found = fit(table.index, table[series])
        for one in found:
            print(
                f"{series} goes {one.direction} by {one.height:.2f}: from step {one.onset:.0f} to "
                f"{one.end:.0f}, half of it by {one.midpoint:.0f} "
                f"({one.midpoint_low:.0f} to {one.midpoint_high:.0f})"
            )
        if not found:
            print(f"{series}: no transition")


if __name__ == "__main__":
    main()
