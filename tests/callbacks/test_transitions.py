"""What a trainer's callback does about transitions: it measures more often while one is
provisional, and tells the trainer's loggers; and the budget holds.
"""

import csv

import pytest

import monitor
from callbacks.pace import Pace
from callbacks.schedule import Denser, Schedule
from monitor.detection import Series
from tests.callbacks.tiny import LIGHTNING_WARNINGS, hook, of, text
from tests.recorded import steps

pytestmark = pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)

LOSS = Series.best("loss", "in_context", "loss_early", stderr=False)
JUMP = 240


def spoil(trainer, module, *_):
    """From some step on the model is sure of a token that is hardly ever right."""
    if trainer.global_step >= JUMP:
        module.net.unembedding.bias.data[0] = 6.0


@pytest.fixture
def jumped(package, fit, dynamics, tmp_path):
    def jumped(**more):
        options = {
            "run": "r",
            "schedule": 8,
            "probes": ["in_context"],
            "series": [LOSS],
            "text": text(seed=5),
        }
        logger = of(package, "loggers.CSVLogger")(tmp_path, name="log", version="")
        fit(
            hook(package, on_train_batch_end=spoil),
            dynamics(**(options | more)),
            max_steps=320,
            logger=logger,
        )

    return jumped


def test_it_measures_more_often_until_a_transition_is_confirmed(jumped, root, tmp_path):
    jumped()
    rows = monitor.read(root, "transitions")
    rows = rows[rows.series == "loss"]
    assert rows["state"].tolist() == ["provisional", "confirmed"]
    begun, held = rows["step"]
    assert JUMP <= begun <= JUMP + 16
    measured = steps(root, "in_context")
    planned = list(range(0, 321, 8))
    more = [step for step in measured if step not in planned]
    assert [step - begun for step in more][:2] == [2, 4]
    assert more[-1] <= held + 8
    assert measured == sorted({*planned, *more})
    with (tmp_path / "log" / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row.get("phasewatch/loss/confirmed")]
    assert [int(row["step"]) for row in logged] == [held]
    assert float(logged[0]["phasewatch/loss/confirmed"]) == rows["began"].iloc[1]


def test_without_detection_the_schedule_is_all(jumped, root):
    jumped(false_alarms=None)
    assert steps(root, "in_context") == list(range(0, 321, 8))
    assert "transitions" not in monitor.tables(root)


def due(denser, steps):
    return [step for step in steps if denser.due(step)]


def test_four_times_for_each_gap():
    denser = Denser(first=0)
    denser.measured(100, pending=False)
    assert due(denser, range(100, 200)) == []
    denser.measured(140, pending=True)
    assert due(denser, range(141, 152)) == [150, 151]
    denser.measured(150, pending=True)
    assert due(denser, range(151, 162)) == [160, 161]
    denser.measured(160, pending=False)
    assert due(denser, range(160, 200)) == []


def test_no_longer_than_it_may_help():
    denser, taken = Denser(first=0), []
    denser.measured(40, pending=True)
    for step in range(41, 1000):
        if denser.due(step):
            taken.append(step)
            denser.measured(step, pending=True)
    assert taken == list(range(50, 170, 10))


def test_where_each_step_is_measured_there_are_no_more():
    denser = Denser(first=0)
    denser.measured(1, pending=True)
    assert denser.due(2)


def test_the_budget_pays_for_more_or_they_are_not_made():
    """A step takes 1 s and a measurement 2: of 1,000 steps 2% pay for ten."""
    now = [0.0]
    pace = Pace(
        overhead=0.02,
        schedule=Schedule.of(200),
        first=0,
        last=1_000,
        reserve=0.0,
        clock=lambda: now[0],
    )
    made = 0
    for step in range(1, 1_001):
        now[0] += 1.0
        pace.reach(step)
        scheduled = step % 200 == 0 and pace.admits(step)
        if scheduled or (step > 300 and pace.admits_extra(step)):
            now[0] += 2.0
            pace.spend(2.0)
            made += 1
    assert 8 <= made <= 11
