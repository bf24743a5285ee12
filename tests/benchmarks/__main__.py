"""What measuring costs, beside the model's own forward pass: `make bench`.

Both are run in turn in one process on one thread, and what is printed is the median over rounds of
the ratio of their CPU times: other work on the machine slows both alike. Peak memory is read in a
fresh process for each, above the memory that the model itself takes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from monitor.anatomy import find_language_model
from monitor.capture import observe
from monitor.probes import induction, select
from monitor.record import Moment
from monitor.stimuli import repeated
from monitor.subject import StimulusOptions, Subject

# name: (model, sequences, positions)
CASES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "2 layers, width 256": (lambda: _gpt2(layers=2, width=256, heads=4, vocabulary=4096), 16, 257),
    "GPT-2 small": (lambda: _gpt2(layers=12, width=768, heads=12, vocabulary=50257), 2, 257),
    "GPT-2 small, long": (lambda: _gpt2(layers=12, width=768, heads=12, vocabulary=50257), 1, 1025),
    "Pythia 410M": (lambda: _neox(layers=24, width=1024, heads=16, vocabulary=50304), 1, 513),
}


def main() -> None:
    """Prints one table, a row for each model."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of which the medians are taken")
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "WORK"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        print(json.dumps(_peak_bytes(*options.memory_of)))
        return
    table = Table(title="Cost as a ratio to the model's own forward pass on the same tokens")
    for column in (
        "model",
        "tokens",
        "attention probe: time",
        "all probes: time",
        "attention probe: peak memory",
        "to a pass without logits",
    ):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, (_, sequences, positions) in CASES.items():
        probe, everything = _time_ratios(name, options.rounds)
        peak = {work: _peak_in_fresh_process(name, work) for work in WORKS}
        table.add_row(
            name,
            f"{sequences} x {positions}",
            f"{probe:.2f}",
            f"{everything:.2f}",
            f"{peak['attention probe'] / peak['forward']:.2f}",
            f"{peak['attention probe'] / peak['forward without logits']:.2f}",
        )
    Console(width=120).print(table)


def _attention_probe(model: nn.Module, tokens: torch.Tensor) -> Callable[[], object]:
    found = find_language_model(model)
    stimulus = repeated(
        vocab_size=found.vocab_size, sequences=len(tokens), context=tokens.shape[1], bos=0, seed=0
    )
    # A monitor learns the number of calls from its first pass, which is not what is compared here.
    calls = model.config.num_hidden_layers

    def work() -> object:
        seen = observe(found, stimulus, attention=True, attention_calls=calls)
        return induction.compute({"repeated": seen})

    return work


def _forward(model: nn.Module, tokens: torch.Tensor) -> Callable[[], object]:
    def work() -> object:
        with torch.no_grad():
            return model(tokens, use_cache=False).logits

    return work


def _forward_without_logits(model: nn.Module, tokens: torch.Tensor) -> Callable[[], object]:
    def work() -> object:
        with torch.no_grad():
            return model.base_model(tokens, use_cache=False).last_hidden_state

    return work


WORKS = {
    "forward": _forward,
    "forward without logits": _forward_without_logits,
    "attention probe": _attention_probe,
}


def _time_ratios(name: str, rounds: int) -> tuple[float, float]:
    """CPU time of the attention probe, and of all probes, over that of a forward pass."""
    make, sequences, positions = CASES[name]
    model = make()
    tokens = torch.randint(0, 1000, (sequences, positions))
    forward, probe = _forward(model, tokens), _attention_probe(model, tokens)
    found, chosen = find_language_model(model), select(None)
    options = StimulusOptions(text=tokens, context=positions, sequences=max(2, sequences))
    subject = Subject.new(model, found, chosen, options)
    moment = Moment(run="bench", attempt=1, step=0, tokens=None, time=datetime.now(UTC))
    read = sum(stimulus.tokens.numel() for stimulus in subject.stimuli.values())
    probe_ratios, ratios = [], []
    for _ in range(rounds + 1):
        floor = _cpu_seconds(forward)
        probe_ratios.append(_cpu_seconds(probe) / floor)
        everything = _cpu_seconds(lambda: subject.measure(chosen, moment))
        ratios.append(everything / (floor * read / tokens.numel()))
    # The first round warms caches and allocators up.
    return statistics.median(probe_ratios[1:]), statistics.median(ratios[1:])


def _cpu_seconds(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def _peak_in_fresh_process(name: str, work: str) -> int:
    command = [sys.executable, "-m", "tests.benchmarks", "--memory-of", name, work]
    # Large blocks go back to the system as soon as they are freed, so that a peak is one.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(json.loads(done.stdout.splitlines()[-1]))


def _peak_bytes(name: str, work: str) -> int:
    """Peak memory of this process above what it held before, in bytes, the second time it works."""
    make, sequences, positions = CASES[name]
    run = WORKS[work](make(), torch.randint(0, 1000, (sequences, positions)))
    # The first time imports modules and fills caches that stay.
    run()
    before = psutil.Process().memory_info().rss
    _reset_peak()
    run()
    return _peak_rss() - before


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak_rss() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _gpt2(*, layers: int, width: int, heads: int, vocabulary: int) -> nn.Module:
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocabulary, n_positions=1025, **ids
    )
    return GPT2LMHeadModel(config).eval()


def _neox(*, layers: int, width: int, heads: int, vocabulary: int) -> nn.Module:
    config = GPTNeoXConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        vocab_size=vocabulary,
        max_position_embeddings=1025,
    )
    return GPTNeoXForCausalLM(config).eval()


if __name__ == "__main__":
    main()
