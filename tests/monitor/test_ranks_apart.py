"""Processes that should measure together and do not: one of them holds another model, comes with
another step, or not at all. Whatever it is, all hear of it, and training goes on.
"""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import monitor
from monitor import ranks
from monitor.capture import NoAttentionError
from monitor.measure import Monitor, measure
from monitor.ranks import LostError, Ranks, _Likeness, portable
from tests.callbacks.tiny import OBSERVING
from tests.models import AttentionOnly, attend_causally
from tests.processes import came_through, meet, run
from tests.recorded import stimulus


def built(seed: int = 0, **more) -> AttentionOnly:
    torch.manual_seed(seed)
    return AttentionOnly(**more)


def train_together() -> None:
    """What fails, or hangs, where processes are out of step."""
    number = torch.ones(())
    dist.all_reduce(number)
    assert number == dist.get_world_size()


def another_model_later(root: Path) -> None:
    """What is no model on one process is recorded by the first, and forgotten."""
    model, last = built(), dist.get_world_size() - 1
    with Monitor(root, run="r", sequences=4, probes=OBSERVING) as watch:
        parts = []
        for step in range(4):
            wrong = step in {1, 2} and dist.get_rank() == (0 if step == 1 else last)
            given = watch.measure([nn.Linear(2, 2), None][step % 2] if wrong else model, step=step)
            parts.append([failure.part for failure in given.failures])
            train_together()
    assert parts == [[], ["measure"], ["measure"], []]
    if dist.get_rank() == 0:
        assert monitor.read(root, "in_context")["step"].tolist() == [0, 3]
        failures = monitor.read(root, "failures")
        assert failures["step"].tolist() == [1, 2]
        assert failures["error"].str.contains("expected a torch.nn.Module|no language model").all()


def other_steps(root: Path) -> None:
    model = built()
    with Monitor(root, run="r", sequences=4, probes=OBSERVING) as watch:
        watch.measure(model, step=0)
        given = watch.measure(model, step=1 + dist.get_rank())
        assert "at different steps, [1, 2" in given.failures[0].error
        assert watch.measure(model, step=3).failures == ()
    if dist.get_rank() == 0:
        assert monitor.read(root, "in_context")["step"].tolist() == [0, 3]


def stays_away(root: Path) -> None:
    """A process that misses a measurement is waited for once."""
    model = built()
    ranks.PATIENCE = timedelta(seconds=2)
    watch = Monitor(root, run="r", sequences=4, probes=OBSERVING)
    ranks.PATIENCE = timedelta(minutes=5)
    watch.measure(model, step=0)
    begun = time.monotonic()
    if dist.get_rank() == 0:
        (failure,) = watch.measure(model, step=1).failures
        assert "does not reach the others" in failure.error
        assert time.monotonic() - begun < 10
    train_together()
    begun = time.monotonic()
    for step in (2, 3):
        (failure,) = watch.measure(model, step=step).failures
        assert "LostError" in failure.error
        train_together()
    watch.close()
    assert time.monotonic() - begun < 2
    if dist.get_rank() == 0:
        assert monitor.read(root, "in_context")["step"].tolist() == [0]
        assert monitor.read(root, "failures")["step"].tolist() == [1, 2, 3]


def refused_by_one(root: Path) -> None:
    """Bad arguments of one process, any, are raised on all."""
    last = dist.get_rank() == dist.get_world_size() - 1
    with pytest.raises(ValueError, match="seed=-1"):
        Monitor(root, run="r", seed=-1 if last else 0)
    with pytest.raises(TypeError, match="interpreted as an integer"):
        Monitor(root, run="r").prepare(built(), "1" if last else 1)
    with pytest.raises(ValueError, match="larger than the model's own"):
        Monitor(root, run="r", vocab_size=100 if last else 64).prepare(built(), 0)
    seen = attend_causally if dist.get_rank() == 0 else (lambda query, key, value: value)
    with pytest.raises(NoAttentionError, match="showed no attention"):
        Monitor(root, run="r").prepare(built(attend=seen), 0)
    assert list(root.iterdir()) == []


def other_models(root: Path) -> None:
    """Stages of a pipeline, and replicas that nobody made equal."""
    rank = dist.get_rank()
    whole = built()
    stage = [nn.Sequential(whole.token, whole.blocks[0]), nn.Sequential(whole.unembedding)]
    with pytest.raises(ValueError, match=r"process 1 of \d holds a Sequential .* of a pipeline"):
        Monitor(root, run="r").prepare(stage[min(rank, 1)], 0)
    with pytest.raises(ValueError, match=r"process 1 of \d has other weights than the first"):
        Monitor(root, run="r").prepare(built(seed=rank), 0)
    wrapped = nn.parallel.DistributedDataParallel(built(seed=rank))
    with Monitor(root, run="r", probes=OBSERVING) as watch:
        assert watch.measure(wrapped, step=0).failures == ()


def goes_on(root: Path) -> None:
    """A run goes on with the stimuli that the first process stored; nobody else need have text."""
    model = built()
    for attempt in (1, 2):
        text = torch.full((4, 64), attempt) if dist.get_rank() == 0 else None
        with Monitor(root, run="r", text=text, sequences=4, probes=OBSERVING) as watch:
            watch.measure(model, step=attempt)
            assert watch.attempt == attempt
    if dist.get_rank() == 0:
        assert stimulus(root, "text") == [[1] * 64] * 4
        assert monitor.read(root, "in_context")["validity"].eq("ok").all()


def at_another_time(root: Path) -> None:
    """A monitor is for the processes that there were when it was made."""
    rank, count = dist.get_rank(), dist.get_world_size()
    early = Monitor(root, run="r")
    dist.barrier()
    dist.destroy_process_group()
    with pytest.raises(ValueError, match="initialised, or ended, after this Monitor was made"):
        early.prepare(built(), 0)
    early.close()
    alone = Monitor(root, run="r")
    meet(root / "again", rank, count)
    with pytest.raises(ValueError, match="initialised, or ended, after this Monitor was made"):
        alone.prepare(built(), 0)
    assert monitor.tables(root) == []


def each_for_itself(root: Path) -> None:
    """Every process trains a model of its own, and not all measure theirs."""
    rank = dist.get_rank()
    if rank > 0:
        with Monitor(root, run=f"r{rank}", ranks=Ranks(), sequences=4, probes=OBSERVING) as watch:
            expected = measure(built(seed=rank), sequences=4)["in_context"]
            found = watch.measure(built(seed=rank), step=rank).frame("in_context")
        assert found["repeat_later"].tolist() == expected["repeat_later"].tolist()
        assert monitor.read(root, "in_context", run=f"r{rank}")["step"].tolist() == [rank]


def made_by_one(root: Path) -> None:
    ranks.PATIENCE = timedelta(seconds=2)
    if dist.get_rank() == 0:
        with pytest.raises(LostError, match="not all of them made a Monitor within 2 s"):
            Monitor(root, run="r")
    train_together()


SCENARIOS = {
    "another model later": another_model_later,
    "other steps": other_steps,
    "stays away": stays_away,
    "refused by one": refused_by_one,
    "other models": other_models,
    "goes on": goes_on,
    "at another time": at_another_time,
    "each for itself": each_for_itself,
    # At last: processes number their groups, and out of step from here.
    "made by one": made_by_one,
}


@pytest.fixture(scope="module", params=[2, 3], ids=["2 processes", "3 processes"])
def several(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    run(SCENARIOS, request.param, folder)
    return folder


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_process_comes_through(several, name):
    assert came_through(several, name) == {"yes"}


class TwoArgumentsError(Exception):
    """It cannot be put together again from its message."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


@pytest.mark.parametrize("error", [KeyError("lost"), TwoArgumentsError("this", "that")])
def test_an_error_travels_with_its_traceback(error):
    try:
        raise error
    except Exception as raised:
        travelled = ranks._unpacked(ranks._packed(portable(raised)))
    assert str(error) in str(travelled)
    assert type(error).__name__ in repr(travelled)
    assert "raise error" in travelled.__notes__[0]


def test_what_is_sent_arrives_as_it_was():
    sent = {
        "scores": torch.rand(3, 4, 5),
        "half": torch.rand(2).bfloat16(),
        "number": torch.tensor(3),
        "part": torch.rand(4, 4)[:, 1:3],
        "learned": torch.rand(2, requires_grad=True),
    }
    arrived = ranks._unpacked(ranks._packed(sent))
    for name, value in sent.items():
        assert arrived[name].dtype == value.dtype
        assert torch.equal(arrived[name], value)
        arrived[name].detach().zero_()


def test_models_of_any_kind_are_compared():
    odd = nn.ParameterDict({"number": nn.Parameter(torch.tensor(1.0))})
    odd["none"], odd["meta"] = nn.Parameter(torch.ones(0)), nn.Parameter(torch.ones(2).to("meta"))
    for model in (odd, nn.Module(), None):
        assert _Likeness.of(model).difference(_Likeness.of(model)) is None
        assert _Likeness.of(model).difference(_Likeness.of(built()))
