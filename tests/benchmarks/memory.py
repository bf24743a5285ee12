"""Memory, each read in a fresh process above what it holds once it has read a few tokens: the
weights, and all that is imported at first use.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table

from tests.benchmarks import works
from tests.benchmarks.works import CASES, MODELS, stimulus_for

_MIB = 2**20

# With more tokens than where time is taken, so that the peak is not that of small things.
_SEQUENCES_TIMES = 2

_CONTEXTS = (257, 513, 1025, 2049, 4097)
# Beyond it the patterns of two layers take gigabytes.
_LONGEST_PATTERN = 2049


class Memory(NamedTuple):
    """Bytes: the most that was held, and what is held while what was returned is there."""

    peak: int
    held: int


def peaks() -> Table:
    """The attention fields by phasewatch and by TransformerLens, beside a pass without logits."""
    printed = _table(
        "Attention fields: peak memory ÷ a pass without logits, and what is still held afterwards",
        "model",
        "tokens",
        "pass, MiB",
        "÷ pass",
        "held, MiB",
        "TransformerLens ÷ pass",
        "held, MiB",
    )
    for name, sequences, positions in CASES:
        batch = _SEQUENCES_TIMES * sequences
        floor, ours, lens = (
            _in_fresh_process(name, work.__name__, batch, positions)
            for work in (
                works.forward_without_logits,
                works.attention_probe,
                works.transformer_lens,
            )
        )
        row = [f"{batch} × {positions}", f"{floor.peak / _MIB:.0f}"]
        for one in (ours, lens):
            row += [f"{one.peak / floor.peak:.2f}", f"{max(0, one.held) / _MIB:.0f}"]
        printed.add_row(name, *row)
    return printed


def growth() -> Table:
    """The memory of the attention fields at longer and longer context."""
    name, sequences = "2 layers, width 512", 2
    printed = _table(
        f"Attention fields: extra memory as context grows ({name})",
        "tokens",
        "MiB",
        "÷ the one before",
        "TransformerLens, MiB",
        "÷ the one before",
    )
    kinds = (works.attention_probe, works.transformer_lens)
    before: list[int | None] = [None, None]
    for positions in _CONTEXTS:
        now = [
            _in_fresh_process(name, work.__name__, sequences, positions).peak
            if work is works.attention_probe or positions <= _LONGEST_PATTERN
            else None
            for work in kinds
        ]
        cells = itertools.chain.from_iterable(
            (f"{peak / _MIB:.0f}" if peak else "", f"{peak / last:.2f}" if peak and last else "")
            for peak, last in zip(now, before, strict=True)
        )
        printed.add_row(f"{sequences} × {positions}", *cells)
        before = now
    return printed


def losses() -> Table:
    """The memory of in-context losses beside that of all logits."""
    name = "2 layers, vocabulary 50,257"
    printed = _table(
        f"In-context losses: extra memory beside that of all logits ({name})",
        "tokens",
        "all logits, MiB",
        "losses, MiB",
        "a pass without logits, MiB",
    )
    for sequences, positions in ((4, 257), (16, 257), (16, 1025)):
        logits = 4 * sequences * positions * MODELS[name](1).config.vocab_size
        measured = (
            _in_fresh_process(name, work.__name__, sequences, positions).peak
            for work in (works.in_context_losses, works.forward_without_logits)
        )
        cells = (f"{size / _MIB:.0f}" for size in (logits, *measured))
        printed.add_row(f"{sequences} × {positions}", *cells)
    return printed


def _table(title: str, *columns: str) -> Table:
    printed = Table(title=title)
    for column in columns:
        printed.add_column(column, justify="left" if column == "model" else "right")
    return printed


def _in_fresh_process(name: str, work: str, sequences: int, positions: int) -> Memory:
    asked = [name, work, str(sequences), str(positions)]
    # Large blocks go back to the system as soon as they are freed, so that a peak is one.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.memory", *asked],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=environment,
    )
    return Memory(*json.loads(done.stdout.splitlines()[-1]))


def _measured(name: str, kind: str, sequences: int, positions: int) -> Memory:
    """Of this process."""
    torch.set_num_threads(1)
    model = MODELS[name](positions)
    work = getattr(works, kind)(model)
    work(stimulus_for(model, 1, 16))
    stimulus = stimulus_for(model, sequences, positions)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    returned = work(stimulus)
    peak, held = _resident("VmHWM"), _resident("VmRSS")
    del returned
    return Memory(peak=peak - before, held=held - before)


def _resident(kind: str) -> int:
    """Resident bytes of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(kind))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(json.dumps(_measured(*sys.argv[1:3], *map(int, sys.argv[3:]))))
