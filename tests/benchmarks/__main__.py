"""What measuring costs: `make bench`, or `make bench ARGS="--only time storage"` for some of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.table import Table

from tests.benchmarks import memory, serving, storage, timing


def main() -> None:
    """Prints the tables one by one."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES), metavar="TABLE")
    parser.add_argument("--rounds", type=int, default=3, help="of which the medians are taken")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=110)
    for name in options.only:
        for table in TABLES[name](options.rounds):
            console.print(table)


def _time(rounds: int) -> Iterator[Table]:
    yield timing.table(torch.device("cpu"), torch.float32, rounds)
    if torch.cuda.is_available():
        yield timing.table(torch.device("cuda"), torch.bfloat16, rounds)


def _probes(rounds: int) -> Iterator[Table]:
    yield timing.probes(torch.device("cpu"), torch.float32, rounds)


def _features(rounds: int) -> Iterator[Table]:
    yield timing.features(torch.device("cpu"), torch.float32, rounds)


def _walks(_rounds: int) -> Iterator[Table]:
    yield timing.walks(torch.device("cpu"), torch.float32)


def _training(rounds: int) -> Iterator[Table]:
    yield timing.training(torch.device("cpu"), torch.float32, rounds)


TABLES: dict[str, Callable[[int], Iterator[Table]]] = {
    "time": _time,
    "probes": _probes,
    "features": _features,
    "walks": _walks,
    "training": _training,
    "memory": lambda _: iter([memory.peaks()]),
    "context": lambda _: iter([memory.growth()]),
    "losses": lambda _: iter([memory.losses()]),
    "storage": lambda rounds: iter([storage.table(rounds)]),
    "serving": lambda rounds: iter([serving.table(rounds)]),
}


if __name__ == "__main__":
    main()
