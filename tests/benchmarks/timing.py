"""Time beside the model's own forward pass.

All is run in turn in one process on one thread, and what is printed is the median over rounds of
the ratio to the forward pass of the same round: other work on the machine slows both alike. It is
CPU time, and on a GPU the time between two events there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime

import torch
from rich.table import Table
from torch import nn

from monitor.anatomy import find_language_model
from monitor.batches import StimulusOptions
from monitor.concepts import Concept
from monitor.optimising import OptimiserWatch
from monitor.probes import PROBES, Probe, select
from monitor.record import Moment
from monitor.subject import Subject
from monitor.tasks import ModularAddition
from tests.benchmarks.works import (
    CASES,
    MODELS,
    attention_probe,
    forward,
    forward_and_backward,
    stimulus_for,
    transformer_lens,
)

_MOMENT = Moment(run="bench", attempt=1, step=0, tokens=None, time=datetime.now(UTC))


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


def features(device: torch.device, dtype: torch.dtype, rounds: int) -> Table:
    """A row for each probe of labelled text alone, and one for all of them together, in all layers,
    with ten concepts: beside the model's own pass on the same text.
    """
    name, sequences, positions = "GPT-2 small", 8, 257
    chosen = {probe.spec.name: [probe] for probe in PROBES if _of_labelled(probe)}
    chosen["all of them"] = [probe for (probe,) in chosen.values()]
    model = MODELS[name](positions).to(device, dtype)
    subject = _subject(model, sequences, positions, [_concept(digit) for digit in range(10)])
    floor, stimulus = forward(model), subject.stimuli["concepts"]
    ratios: dict[str, list[float]] = {what: [] for what in chosen}
    for number in range(rounds + 1):
        once = _seconds(lambda: floor(stimulus), device)
        for what, its in chosen.items():
            spent = _seconds(lambda its=its: subject.measure(its, _MOMENT), device)
            if number > 0:
                ratios[what].append(spent / once)
    batch, _ = stimulus.tokens.shape
    printed = Table(
        title=f"Time in all layers ÷ the model's own pass on labelled text ({name}, "
        f"{batch} × {positions}, {device.type}, {dtype})"
    )
    printed.add_column("probe")
    printed.add_column("÷ pass", justify="right")
    for what, of_probe in ratios.items():
        printed.add_row(what, f"{statistics.median(of_probe):.2f}")
    return printed


def _of_labelled(probe: Probe) -> bool:
    return {stimulus for stimulus, _ in probe.spec.needs} == {"concepts"}


def _concept(digit: int) -> Concept:
    return Concept(f"digit_{digit}", label=lambda ids: ids // 7 % 10 == digit)


def probes(device: torch.device, dtype: torch.dtype, rounds: int) -> Table:
    """A row for each probe alone, with those that it reads."""
    title = f"Time ÷ the model's own pass on all stimuli ({device.type}, {dtype})"
    printed = Table(title=title)
    cases = CASES[:2]
    for column in ("probe", *(f"{name}, {n} × {positions}" for name, n, positions in cases)):
        printed.add_column(column, justify="left" if column == "probe" else "right")
    columns = [_of_probes(case, device, dtype, rounds) for case in cases]
    for probe in PROBES:
        name = probe.spec.name
        printed.add_row(name, *(f"{column[name]:.2f}" for column in columns))
    return printed


def walks(device: torch.device, dtype: torch.dtype) -> Table:
    """What the learning coefficient takes of a small model, beside passes forward and backward over
    the same text; once, since it is so many of them.
    """
    name, sequences, positions = "2 layers, width 256", 16, 65
    model = MODELS[name](positions).to(device, dtype)
    subject, both = _subject(model, sequences, positions), forward_and_backward(model)
    text = subject.stimuli["text"]
    once = statistics.median(_seconds(lambda: both(text), device) for _ in range(5))
    chosen = select(["learning_coefficient"])
    spent = _seconds(lambda: subject.measure(chosen, _MOMENT), device)
    title = f"Time ÷ a pass forward and backward on the text ({device.type}, {dtype})"
    printed = Table("model", "tokens", "learning_coefficient", title=title)
    printed.add_row(name, f"{sequences} × {positions}", f"{spent / once:.0f}")
    return printed


def _of_probes(
    case: tuple[str, int, int], device: torch.device, dtype: torch.dtype, rounds: int
) -> dict[str, float]:
    """By the name of a probe, its median ratio."""
    name, sequences, positions = case
    model = MODELS[name](positions).to(device, dtype)
    task = ModularAddition(23, train=[(a, b) for a in range(23) for b in range(a)])
    floor, subject = forward(model), _subject(model, sequences, positions, task=task)
    ratios: dict[str, list[float]] = {probe.spec.name: [] for probe in PROBES}
    for number in range(rounds + 1):
        once = _seconds(lambda: [floor(s) for s in subject.stimuli.values()], device)
        for probe in PROBES:
            spent = _seconds(lambda probe=probe: subject.measure([probe], _MOMENT), device)
            # The first round finds the parts of the model, and warms caches and allocators up.
            if number > 0:
                ratios[probe.spec.name].append(spent / once)
    return {name: statistics.median(of_probe) for name, of_probe in ratios.items()}


def _subject(
    model: nn.Module,
    sequences: int,
    positions: int,
    concepts: Sequence[Concept] = (),
    task: ModularAddition | None = None,
) -> Subject:
    """The model on stimuli of so many positions."""
    text = stimulus_for(model, 2 * sequences if concepts else sequences, positions).tokens
    options = StimulusOptions(
        text=text, concepts=concepts, task=task, context=positions, sequences=max(2, sequences)
    )
    return Subject.new(model, find_language_model(model), PROBES, options)


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
    subject = _subject(model, sequences, positions)
    # All probes read more tokens than the pass beside them.
    read = sum(s.tokens.numel() for s in subject.stimuli.values()) / stimulus.tokens.numel()
    for number in range(rounds + 1):
        once = _seconds(lambda: floor(stimulus), device)
        ratios = (
            _seconds(lambda: probe(stimulus), device) / once,
            _seconds(lambda: subject.measure(PROBES, _MOMENT), device) / (once * read),
            _seconds(lambda: lens(stimulus), device) / once,
        )
        # The first round warms caches and allocators up.
        if number > 0:
            yield ratios


def training(device: torch.device, dtype: torch.dtype, rounds: int) -> Table:
    """A row for each model: what it takes to read an update, and the table made of it."""
    printed = Table(title=f"Time ÷ a step of training with AdamW ({device.type}, {dtype})")
    for column in ("model", "tokens", "reading the update", "the table"):
        printed.add_column(column, justify="left" if column == "model" else "right")
    for name, sequences, positions in CASES[:2]:
        model = MODELS[name](positions).to(device, dtype)
        subject = _subject(model, sequences, positions)
        (probe,) = (probe for probe in PROBES if probe.spec.training)
        optimizer = torch.optim.AdamW(model.parameters())
        watch = OptimiserWatch([optimizer])
        tokens = stimulus_for(model, sequences, positions).tokens.to(device)

        def passed(model: nn.Module = model, tokens: torch.Tensor = tokens) -> None:
            model(tokens, labels=tokens).loss.backward()

        def told(
            subject: Subject = subject, watch: OptimiserWatch = watch, probe: Probe = probe
        ) -> None:
            subject.measure([probe], _MOMENT, training=watch.training(step=1))

        ratios = []
        for number in range(rounds + 1):
            once, update = _seconds(passed, device), _seconds(optimizer.step, device)
            watch.expect(True)
            read = _seconds(optimizer.step, device)
            watch.expect(False)
            table = _seconds(told, device)
            # The first round makes the optimiser's state, and finds the parts of the model.
            if number > 0:
                step = once + update
                ratios.append(((read - update) / step, table / step))
            optimizer.zero_grad()
        watch.close()
        medians = [statistics.median(column) for column in zip(*ratios, strict=True)]
        printed.add_row(name, f"{sequences} × {positions}", *(f"{m:.2f}" for m in medians))
    return printed


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
