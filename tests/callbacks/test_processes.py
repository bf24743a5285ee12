"""Trainings of two processes, under Lightning and the Trainer of transformers: one writes, none
waits for another in vain, and the tables are those of one process with the same weights.
"""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

import monitor
from monitor.measure import measure
from tests.callbacks.tiny import TOKENS_A_BATCH, TinyLM
from tests.callbacks.together import HELD_OUT, STEPS
from tests.recorded import attempt, steps, tokens

WAYS = ("huggingface", "ddp", "bare", "pace", "fsdp", "raising")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trains in two processes, in each of the ways: a folder for each."""
    folder = tmp_path_factory.mktemp("together")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    as_torchrun_says_it = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GROUP_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "none",
        "OMP_NUM_THREADS": "1",
    }
    started = []
    for rank in "01":
        own = {"RANK": rank, "LOCAL_RANK": rank}
        command = [sys.executable, "-m", "tests.callbacks.together", str(folder), rank, *WAYS]
        process = subprocess.Popen(command, env={**os.environ, **as_torchrun_says_it, **own})
        started.append(process)
    try:
        for process in started:
            process.wait(timeout=240)
        yield folder
    finally:
        for process in started:
            process.kill()


def ends(folder) -> list[str]:
    """How the training ended in each process."""
    return [folder.joinpath(f"end-{rank}").read_text() for rank in (0, 1)]


def check_numbers(folder, step: int) -> None:
    """What is stored at a step is what one process measures on the weights kept there."""
    model = TinyLM()
    model.load_state_dict(torch.load(folder / f"{step}.pt"))
    expected = measure(model, text=HELD_OUT, sequences=5)
    for table in ("induction", "in_context"):
        stored = monitor.read(folder / "runs", table).query(f"step == {step}")
        for field in expected[table].select_dtypes("number"):
            difference = stored[field].to_numpy() - expected[table][field].to_numpy()
            assert np.nanmax(np.abs(difference)) < 1e-6, (step, table, field)


@pytest.mark.parametrize("how", ["huggingface", "ddp", "fsdp"])
def test_the_tables_are_those_of_one_process(trained, how):
    assert ends(trained / how) == ["trained"] * 2
    root = trained / how / "runs"
    # At 3 a checkpoint was saved.
    assert steps(root) == [0, 2, 3, 4, 6]
    assert tokens(root) == [2 * step * TOKENS_A_BATCH for step in (0, 2, 3, 4, 6)]
    tables = ["attempts", "in_context", "induction", "optimisation", "stimuli"]
    assert monitor.tables(root) == tables
    assert attempt(root)["config"]["world_size"] == 2
    assert len(monitor.read(root, "attempts")) == 1
    for step in (0, 2, 4, STEPS):
        check_numbers(trained / how, step)


@pytest.mark.parametrize(
    ("how", "said"), [("huggingface", "ok"), ("ddp", "ok"), ("fsdp", "every process holds only")]
)
def test_what_the_first_process_tells_of_its_optimiser(trained, how, said):
    read = monitor.read(trained / how / "runs", "optimisation")
    told = read[read["family"] == "all"].set_index("step")
    if how != "fsdp":
        assert told["update_norm"].notna().tolist() == [False, True, False, True, True]
    assert told.loc[[2, 4, 6], "validity"].str.startswith(said).all()


def test_the_first_process_decides_for_all_what_the_budget_admits(trained):
    assert ends(trained / "pace") == ["trained"] * 2
    assert steps(trained / "pace/runs") == [0, 2, 3, 6]


def test_training_is_bit_identical_with_and_without_it(trained):
    bare, watched = (torch.load(trained / how / f"{STEPS}.pt") for how in ("bare", "ddp"))
    assert bare.keys() == watched.keys()
    assert all(torch.equal(bare[name], watched[name]) for name in bare)
    assert not (trained / "bare/runs").exists()


def test_a_process_that_raises_alone_does_not_wait_for_the_others(trained):
    """The other one is told by what it trains with."""
    told, raised = ends(trained / "raising")
    assert "planted" in raised
    assert told != "trained"
    assert steps(trained / "raising/runs")[:3] == [0, 2, 3]
    # Each process has its own data: the first one's was taken.
    assert attempt(trained / "raising/runs")["config"]["text"] == "validation data"
