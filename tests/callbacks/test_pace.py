"""The overhead budget, on simulated clocks: what it admits, that it holds, and what it says."""

import itertools
import math

import pytest

from callbacks.pace import Pace
from callbacks.schedule import Schedule


class Training:
    """A simulated training: `step_time(step)` and `cost(step)` in seconds of a clock of its own."""

    def __init__(self, *, schedule, steps, step_time, cost, overhead=0.02, known_end=True):
        self.now = 0.0
        self.spent = 0.0
        self.latest = None
        self.measured: list[int] = []
        self.cost = cost
        plan = Schedule.of(schedule)
        last = steps if known_end else math.inf
        self.pace = Pace(
            overhead=overhead, schedule=plan, first=0, last=last, clock=lambda: self.now
        )
        self.due = [s for s in range(steps + 1) if plan.due(s, since=s - 1)]
        for step in range(steps + 1):
            if step > 0:
                self.now += step_time(step)
            if step in self.due and self.pace.admits(step, spent=self.spent, cost=self.latest):
                self.measure(step)
        self.trained = self.now - self.spent

    def measure(self, step):
        self.latest = self.cost(step)
        self.now += self.latest
        self.spent += self.latest
        self.measured.append(step)

    @property
    def share(self) -> float:
        return self.spent / self.trained


def steady(step: int) -> float:
    return 0.03


def slow_start(step: int) -> float:
    return 2.0 if step == 1 else 0.05


@pytest.mark.parametrize(
    ("schedule", "steps", "step_time", "cost"),
    list(
        itertools.product(
            [None, 1, 20, 1000, list(range(0, 3001, 7))],
            [50, 1600, 5000],
            [steady, slow_start, lambda step: 0.01 + step / 50_000],
            [0.001, 0.05, 3.0],
        )
    ),
)
def test_the_budget_holds_to_the_end(schedule, steps, step_time, cost):
    training = Training(schedule=schedule, steps=steps, step_time=step_time, cost=lambda step: cost)
    assert training.measured[0] == 0
    # The first measurement is free, and while steps are still slow one more may be taken for cheap.
    assert training.spent <= 0.02 * training.trained + 2 * cost
    everything = len(training.due) * cost
    if everything <= 0.019 * training.trained and step_time is steady:
        assert training.measured == training.due


def test_a_budget_is_used_and_spread_over_the_whole_training():
    training = Training(schedule=1, steps=20_000, step_time=lambda step: 0.1, cost=lambda step: 0.5)
    assert 0.015 < training.share <= 0.0201
    quarters = [sum(5000 * q < s <= 5000 * (q + 1) for s in training.measured) for q in range(4)]
    assert min(quarters) > 0.8 * max(quarters)


def test_the_schedule_keeps_its_shape():
    """Of log-spaced steps some early ones are left as well as late ones."""
    training = Training(
        schedule=[0, *(2**k for k in range(15))],
        steps=2**14,
        step_time=lambda step: 0.01,
        cost=lambda step: 0.5,
    )
    assert len(training.measured) == pytest.approx(6, abs=1)
    assert training.measured[1] < 100
    assert training.measured[-1] > 2**11


@pytest.mark.parametrize("factor", [0.1, 10])
def test_a_cost_that_changes_midway(factor):
    def cost(step):
        return 0.5 if step < 5000 else 0.5 * factor

    training = Training(schedule=10, steps=10_000, step_time=lambda step: 0.1, cost=cost)
    assert training.spent <= 0.02 * training.trained + 3 * cost(10_000)
    assert training.measured[-1] > (9000 if factor < 1 else 5000)


def test_one_slow_measurement_does_not_end_it():
    training = Training(
        schedule=100,
        steps=20_000,
        step_time=lambda step: 0.1,
        cost=lambda step: 20.0 if step == 1000 else 0.1,
    )
    assert sum(step > 1000 for step in training.measured) > 100
    assert training.share <= 0.0201


def test_an_end_that_nobody_knows():
    training = Training(
        schedule=1,
        steps=30_000,
        step_time=lambda step: 0.1,
        cost=lambda step: 0.5,
        known_end=False,
    )
    # It plans for as long again as it has trained.
    assert training.spent <= 0.02 * 2 * training.trained
    assert training.share > 0.01
    assert training.measured[-1] > 29_000


def test_without_a_limit_all_is_measured():
    training = Training(
        schedule=1, steps=50, step_time=lambda step: 0.01, cost=lambda step: 9.0, overhead=None
    )
    assert training.measured == training.due


def test_it_is_said_once_with_figures(caplog):
    Training(schedule=20, steps=1600, step_time=lambda step: 0.03, cost=lambda step: 0.1)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "a measurement takes about 0.1 s" in said[0]
    assert "(every 20 steps) would take about 16" in said[0]
    assert "overhead=0.02" in said[0]
    caplog.clear()
    Training(schedule=1000, steps=1600, step_time=lambda step: 0.03, cost=lambda step: 0.1)
    assert not caplog.records


@pytest.mark.parametrize("overhead", [0, -0.1, 1.5, "2%", True, math.nan])
def test_what_is_no_share(overhead):
    with pytest.raises(ValueError, match=r"overhead=.*expected the share of training time"):
        Pace(overhead=overhead, schedule=Schedule.of(None), first=0, last=10)
