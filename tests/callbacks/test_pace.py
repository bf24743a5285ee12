"""What an overhead budget admits of a schedule, in simulated trainings: the share that measuring
takes at the end, which measurements are made, and what is said of it.
"""

import itertools
import math
import random

import pytest

from callbacks.pace import Pace, check_overhead
from callbacks.schedule import Schedule
from tests.recorded import said


class Training:
    """A training that only tells the time: steps and measurements take as long as they are said to.

    `step_seconds` and `cost` are functions of the step; measurements are also made at checkpoints.
    """

    def __init__(self, *, step_seconds, cost, schedule, steps, overhead=0.02, known_end=True,
                 first=0, checkpoints=(), stage=None):  # fmt: skip
        self.now = 0.0
        self.intervened: dict[int, float] = {}
        self.costs: dict[int, float] = {}
        self.admitted: list[int] = []
        self.trained = 0.0
        schedule = Schedule.of(schedule)
        last = steps if known_end else math.inf
        pace = Pace(
            overhead=overhead,
            schedule=schedule,
            first=first,
            last=last,
            reserve=0.0 if stage is None else 0.25,
            clock=lambda: self.now,
        )
        for step in range(first, steps + 1):
            if step > first:
                self.now += step_seconds(step)
                self.trained += step_seconds(step)
                pace.reach(step)
            if schedule.due(step, since=step - 1) and pace.admits(step):
                self.admitted.append(step)
            if step in checkpoints or step in self.admitted[-1:]:
                granted = pace.grant(step) if stage else 0.0
                stages = int(min(3, granted / stage)) if stage else 0
                self.intervened[step] = stages * (stage or 0.0)
                self.costs[step] = cost(step) + self.intervened[step]
                self.now += self.costs[step]
                pace.spend(self.costs[step], self.intervened[step])
        pace.finish(steps)

    @property
    def share(self) -> float:
        return sum(self.costs.values()) / self.trained


def always(seconds):
    return lambda step: seconds


SCHEDULES = [None, 1, 20, [*range(0, 400, 3), 1000], [0, 1, 2, 3, 4, 5]]


def within(training, overhead) -> bool:
    """Whether the share is kept, the first measurement aside, which is always made."""
    return training.share <= overhead * (1 + 1e-9) or len(training.costs) == 1


@pytest.mark.parametrize("known_end", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=["default", "all", "20", "early", "first"])
def test_the_share_is_kept_at_the_end(schedule, known_end):
    # Who does not know the end counts on 10,000 steps.
    ends = (2, 11, 300, 1_600, 6_000) if known_end else (10_000, 12_500)
    for steps, cost, overhead in itertools.product(
        ends, (1e-4, 0.03, 1.0, 20.0, 1e5), (0.001, 0.02, 0.5)
    ):
        training = Training(
            step_seconds=always(0.1), cost=always(cost), schedule=schedule, steps=steps,
            overhead=overhead, known_end=known_end,
        )  # fmt: skip
        assert 0 in training.admitted
        assert within(training, overhead), (steps, cost, overhead, training.share)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["default", "all", "20", "early", "first"])
def test_what_the_budget_pays_for_is_made(schedule):
    """Half of what a schedule takes buys half of its measurements, and all of it buys all."""
    due = Schedule.of(schedule).count(0, 4_000)
    for part in (1.1, 0.5, 0.25):
        training = Training(
            step_seconds=always(0.1), cost=always(0.02 * 400 * part**-1 / due),
            schedule=schedule, steps=4_000,
        )  # fmt: skip
        expected = min(1, part) * due
        # Steps 1 and 2 are made where they are sure to fit.
        assert expected - 3 <= len(training.admitted) <= expected


def test_a_schedule_that_fits_is_kept_whole(caplog):
    training = Training(step_seconds=always(0.1), cost=always(0.15), schedule=None, steps=100_000)
    assert len(training.admitted) == Schedule.of(None).count(0, 100_000) == 111
    assert said(caplog) == []


def test_the_schedule_keeps_its_shape_and_is_spread_over_the_training():
    """Every fourth of what is due: early steps and late ones alike."""
    due = [0, *(2**k for k in range(10)), *range(1_000, 101_000, 1_000)]
    training = Training(
        step_seconds=always(0.1), cost=always(0.02 * 10_000 / len(due) * 4), schedule=None,
        steps=100_000,
    )  # fmt: skip
    places = [due.index(step) for step in training.admitted]
    gaps = [b - a for a, b in itertools.pairwise(places)]
    # While only the slow first steps are known it is more careful, and no more than that.
    assert gaps[0] <= 6
    assert set(gaps[1:]) <= {4, 5}
    assert places[-1] >= len(due) - 5


def test_every_step_is_thinned_evenly():
    training = Training(step_seconds=always(0.1), cost=always(0.1), schedule=1, steps=5_000)
    gaps = [b - a for a, b in itertools.pairwise(training.admitted)]
    assert 90 <= len(training.admitted) <= 100
    assert all(40 <= gap <= 60 for gap in gaps[1:])


def test_everything_is_admitted_without_a_limit(caplog):
    training = Training(
        step_seconds=always(0.001), cost=always(10.0), schedule=3, steps=30, overhead=None
    )
    assert training.admitted == list(range(0, 31, 3))
    assert said(caplog) == []


def test_where_the_first_steps_are_slow():
    """As where they compile: nothing is spent that only they would have paid for."""
    for slow, cost in itertools.product((1.0, 60.0), (0.01, 0.3, 5.0)):
        training = Training(
            step_seconds=lambda step, slow=slow: slow if step <= 3 else 0.01,
            cost=always(cost), schedule=None, steps=2_000,
        )  # fmt: skip
        # Those at steps 1 and 2 may be made on the word of the first steps.
        assert training.share <= 0.02 + 3 * cost / training.trained
        assert training.admitted[0] == 0
        if cost == 5.0:
            assert max(training.admitted) <= 2


def test_a_pause_now_and_then_does_not_make_steps_long():
    """As where a model is evaluated or compiled again."""
    for pause in (7, 130, 1_000):
        training = Training(
            step_seconds=lambda step, pause=pause: 5.0 if step == pause else 0.01,
            cost=always(0.05), schedule=1, steps=5_000,
        )  # fmt: skip
        assert training.share <= 0.02 * 1.02


def test_measurements_that_get_ten_times_as_long_midway():
    for schedule, cost, when in itertools.product((None, 1, 20), (0.001, 0.02, 0.5), (300, 2_000)):
        training = Training(
            step_seconds=always(0.05),
            cost=lambda step, cost=cost, when=when: cost * (10 if step >= when else 1),
            schedule=schedule, steps=4_000,
        )  # fmt: skip
        # Nobody knows before the first of the long ones.
        surprise = 9 * cost if any(step >= when for step in training.costs) else 0.0
        allowed = 0.02 * training.trained + surprise
        assert sum(training.costs.values()) <= allowed * (1 + 1e-9) or len(training.costs) == 1


@pytest.mark.parametrize("seed", range(60))
def test_it_is_never_over_by_more_than_one_measurement(seed):
    """Whatever steps and measurements take: one that comes out longer is one too many."""
    draw = random.Random(seed)
    steps, each = draw.choice([40, 300, 1_600]), 10 ** draw.uniform(-3, 0)
    overhead = draw.choice([0.005, 0.02, 0.1])
    usual = each * 10 ** draw.uniform(-2, 3)
    lasts = [each * draw.uniform(0.5, 1.5) * draw.choice([1] * 40 + [20]) for _ in range(steps + 1)]
    takes = [
        usual * draw.uniform(0.5, 1.5) * (10 if step > steps / 2 and seed % 2 else 1)
        for step in range(steps + 1)
    ]
    training = Training(
        step_seconds=lasts.__getitem__, cost=takes.__getitem__, steps=steps,
        schedule=draw.choice([None, 1, 7, sorted(draw.sample(range(steps), 20))]),
        overhead=overhead,
    )  # fmt: skip
    assert training.admitted
    assert len(training.costs) == 1 or (
        sum(training.costs.values()) <= overhead * training.trained + max(training.costs.values())
    )


def test_measurements_that_get_shorter_are_made_more_often():
    training = Training(
        step_seconds=always(0.05), cost=lambda step: 1.0 if step == 0 else 0.02,
        schedule=10, steps=4_000,
    )  # fmt: skip
    assert 130 <= len(training.admitted) <= 151
    assert within(training, 0.02)


def test_steps_that_get_ten_times_as_short_midway():
    """What was spent by then stays spent, so that the share may exceed: by little."""
    training = Training(
        step_seconds=lambda step: 0.1 if step <= 2_000 else 0.01, cost=always(0.1),
        schedule=1, steps=4_000,
    )  # fmt: skip
    assert training.share <= 0.02 * 1.15


def test_checkpoints_are_paid_for_by_the_schedule():
    training = Training(
        step_seconds=always(0.1), cost=always(0.5), schedule=10, steps=4_000,
        checkpoints=range(400, 4_001, 400),
    )  # fmt: skip
    assert set(range(400, 4_001, 400)) <= set(training.costs)
    # A checkpoint to come is not known of, so that the last ones may be on top.
    assert training.share <= 0.02 + 0.5 / training.trained
    much = Training(
        step_seconds=always(0.1), cost=always(0.5), schedule=10, steps=4_000,
        checkpoints=range(3, 4_000),
    )  # fmt: skip
    assert len(much.costs) == 3_998
    assert max(much.admitted) < 40


def test_an_unknown_end_is_taken_to_be_10_000_steps_away_and_then_now():
    training = Training(
        step_seconds=always(0.1), cost=always(3.99), schedule=None, steps=60_000,
        known_end=False,
    )  # fmt: skip
    # 20 s by 10,000 steps, and 4 s more every 2,000 after that.
    before = [step for step in training.admitted if step <= 10_000]
    after = [step for step in training.admitted if step > 10_000]
    assert 4 <= len(before) <= 5
    assert all(b - a == 2_000 for a, b in itertools.pairwise(after))
    assert after[-1] >= 58_000


def test_a_training_that_goes_on_has_a_budget_of_its_own():
    training = Training(
        step_seconds=always(0.1), cost=always(0.5), schedule=100, steps=12_000, first=9_050
    )
    assert training.admitted[0] == 9_100
    assert 10 <= len(training.costs) <= 11
    assert within(training, 0.02)


def test_it_says_once_what_is_done_and_why(caplog):
    Training(step_seconds=always(0.02), cost=always(0.04), schedule=20, steps=1_600)
    (once,) = said(caplog)
    assert once == (
        "measuring takes 40 ms and a training step 20 ms: all 81 points of the schedule (every 20 "
        "steps) would take 10.1% of the training time. To keep within overhead=0.02 some are "
        "passed over, and no checkpoint (said once; overhead=None measures them all, a sparser "
        "schedule= chooses among them)"
    )


def test_it_says_what_else_the_budget_is_for(caplog):
    now, extra = [0.0], 0
    pace = Pace(
        overhead=0.5,
        schedule=Schedule.of(10),
        first=0,
        last=400,
        reserve=0.25,
        clock=lambda: now[0],
    )
    for step in range(1, 401):
        now[0] += 0.1
        pace.reach(step)
        planned = step % 10 == 0 and pace.admits(step)
        asked_for = step % 10 > 0 and step < 30 and pace.admits_extra(step)
        extra += asked_for and not said(caplog)
        if planned or asked_for:
            now[0] += 0.3
            pace.spend(0.3)
    (once,) = said(caplog)
    assert extra > 10
    assert f"would take 30.8% of the training time, besides {extra} around transitions. " in once
    assert "To keep within overhead=0.5, 25% of it for interventions, some are passed" in once


def test_figures_wait_until_steps_are_as_long_as_they_will_be(caplog):
    """And are given at the end where it comes before."""
    slow_start = {1: 3.0, 2: 1.0, 3: 0.5}
    for steps, expected in ((2, "a training step 2 s"), (1_000, "a training step 104 ms")):
        caplog.clear()
        Training(
            step_seconds=lambda step: slow_start.get(step, 0.1), cost=always(5.0), schedule=1,
            steps=steps,
        )  # fmt: skip
        (once,) = said(caplog)
        assert expected in once


def test_one_slow_measurement_does_not_end_it():
    """As on a disk that is busy."""
    training = Training(
        step_seconds=always(0.1), cost=lambda step: 20.0 if step == 1_000 else 0.1, schedule=100,
        steps=20_000,
    )  # fmt: skip
    assert sum(step > 1_000 for step in training.admitted) >= 189
    assert within(training, 0.02)


@pytest.mark.parametrize("overhead", [0, 0.0, -0.1, 1.1, 2, True, "2%", math.nan, math.inf, [0.1]])
def test_shares_that_are_refused(overhead):
    with pytest.raises(
        ValueError, match=r"overhead=.*expected the share .*\(0.02 is 2%\), or None"
    ):
        check_overhead(overhead)


@pytest.mark.parametrize("overhead", [None, 1, 1.0, 0.02, 1e-9])
def test_shares_that_are_taken(overhead):
    assert check_overhead(overhead) is overhead


@pytest.mark.parametrize("known_end", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=["default", "all", "20", "early", "first"])
def test_the_share_is_kept_with_interventions(schedule, known_end):
    """They come in stages, of which as many are made at a time as are granted."""
    made = 0
    ends = (11, 300, 6_000) if known_end else (10_000, 12_500)
    for steps, cost, stage in itertools.product(ends, (1e-4, 0.03, 1.0), (0.01, 0.3, 8.0)):
        for overhead in (0.001, 0.02, 0.5):
            training = Training(
                step_seconds=always(0.1), cost=always(cost), schedule=schedule, steps=steps,
                overhead=overhead, known_end=known_end, stage=stage, checkpoints=(steps // 2,),
            )  # fmt: skip
            # The first measurement and those for checkpoints are made whatever they cost.
            unasked = sum(
                training.costs[s] - training.intervened[s] for s in (0, steps // 2)
                if s in training.costs
            )  # fmt: skip
            spent = sum(training.costs.values())
            # That there would be a checkpoint was not known before.
            allowed = overhead * training.trained * (1 + 1e-9) + cost
            assert spent <= max(allowed, unasked), (steps, cost, stage, overhead)
            made += any(training.intervened.values())
    assert made > 0


def test_interventions_have_a_part_of_a_budget_that_a_schedule_would_use_up():
    training = Training(
        step_seconds=always(0.1), cost=always(0.05), schedule=1, steps=10_000, stage=0.4
    )
    for_interventions = sum(training.intervened.values()) / training.trained
    assert 0.2 * 0.02 <= for_interventions <= 0.26 * 0.02
    assert 0.9 * 0.02 <= training.share <= 0.02


def test_what_a_sparse_schedule_leaves_is_spread_evenly_over_it():
    training = Training(
        step_seconds=always(0.1), cost=always(0.4), schedule=1_000, steps=100_000, stage=0.5
    )
    made = [step for step, spent in training.intervened.items() if spent]
    # 200 s are the budget, 40 of them for measuring and up to 1.5 for each of 100 interventions.
    assert len(made) >= 98
    assert training.share < 0.02


def test_without_a_budget_everything_is_granted():
    training = Training(
        step_seconds=always(0.1), cost=always(0.4), schedule=10, steps=100, stage=0.5, overhead=None
    )
    assert set(training.intervened.values()) == {1.5}


def test_what_is_admitted_was_foreseen_a_step_before():
    """A step takes 1 s and a measurement 10: of 4,000 steps 2% pay for eight."""
    now = [0.0]
    schedule = Schedule.of(20)
    pace = Pace(
        overhead=0.02, schedule=schedule, first=0, last=4_000, reserve=0.0, clock=lambda: now[0]
    )
    pace.spend(10.0)
    foreseen, admitted = set(), set()
    for step in range(1, 4_001):
        if schedule.due(step, since=step - 1) and pace.foresees(step):
            foreseen.add(step)
        now[0] += 1.0
        pace.reach(step)
        if schedule.due(step, since=step - 1) and pace.admits(step):
            admitted.add(step)
            now[0] += 10.0
            pace.spend(10.0)
    assert 5 <= len(admitted) <= 8
    assert admitted <= foreseen
    # Of the 200 that are due.
    assert len(foreseen) <= 2 * len(admitted)
