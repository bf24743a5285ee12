"""Time beside the model's own forward pass.

All is run in turn in one process on one thread, and what is printed is the median over rounds of
the ratio to the forward pass of the same round: other work on the machine slows both alike. It is
CPU time, and on a GPU the time between two events there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import torch
from rich.table import Table

from monitor.anatomy import find_language_model
from monitor.probes import select
from monitor.record import Moment
from monitor.subject import StimulusOptions, Subject
from tests.benchmarks.works import (
    CASES,
    MODELS,
    attention_probe,
    forward,
    stimulus_for,
    transformer_lens,
)


def table(device: torch.device, dtype: torch.dtype, rounds: int) -> Table:
    """A row for each model."""
    title = f"Time ÷ the model's own pass on the same tokens ({device.type}, {dtype})"
    printed = Table(title=title)
    for column in ("model", "tokens", "attention fields", "all probes", "TransformerLens"):
        printed.add_column(column, justify="left" if column == "model" else "right")
    for name, sequences, positions in CASES:
        of_rounds = list(_rounds(name, sequences, positions, device, dtype, rounds))
        medians = [statistics.median(ratios) for ratios in zip(*of_rounds, strict=True)]
        printed.add_row(name, f"{sequences} × {positions}", *(f"{ratio:.2f}" for ratio in medians))
    return printed


def _rounds(
    name: str,
    sequences: int,
    positions: int,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
) -> Iterator[tuple[float, float, float]]:
    """In each round, what is printed in one row."""
    model = MODELS[name](positions).to(device, dtype)
    stimulus = stimulus_for(model, sequences, positions)
    floor, probe, lens = forward(model), attention_probe(model), transformer_lens(model)
    found, chosen = find_language_model(model), select(None)
    options = StimulusOptions(text=stimulus.tokens, context=positions, sequences=max(2, sequences))
    subject = Subject.new(model, found, chosen, options)
    moment = Moment(run="bench", attempt=1, step=0, tokens=None, time=datetime.now(UTC))
    # All probes read more tokens than the pass beside them.
    read = sum(s.tokens.numel() for s in subject.stimuli.values()) / stimulus.tokens.numel()
    for number in range(rounds + 1):
        once = _seconds(lambda: floor(stimulus), device)
        ratios = (
            _seconds(lambda: probe(stimulus), device) / once,
            _seconds(lambda: subject.measure(chosen, moment), device) / (once * read),
            _seconds(lambda: lens(stimulus), device) / once,
        )
        # The first round warms caches and allocators up.
        if number > 0:
            yield ratios


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        work()
        ended.record()
        torch.cuda.synchronize(device)
        return begun.elapsed_time(ended) / 1e3
    started = time.process_time()
    work()
    return time.process_time() - started
