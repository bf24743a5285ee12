"""When to measure: what a user may ask for, and that a schedule that never fires is refused."""

import pytest

from callbacks.schedule import Schedule


def due(schedule: Schedule, last: int) -> list[int]:
    return [step for step in range(last + 1) if schedule.due(step, since=step - 1)]


def test_the_default_is_the_checkpoints_of_pythia():
    steps = due(Schedule.of(None), 5_000)
    assert steps == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000, 3000, 4000, 5000]


def test_every_so_many_steps_from_0_on():
    assert due(Schedule.of(3), 10) == [0, 3, 6, 9]
    assert due(Schedule.of(1), 3) == [0, 1, 2, 3]


@pytest.mark.parametrize("wanted", [[4, 2, 2], (2, 4), {2, 4}, range(2, 5, 2), iter([2, 4])])
def test_exactly_these_steps(wanted):
    assert due(Schedule.of(wanted), 100) == [2, 4]


@pytest.mark.parametrize(
    "wanted",
    [0, -1, -1000, 1.0, 2.5, True, False, "10", b"10", "", [], [-1], [1, -1], [1.0], ["1"], [True],
     [None], {}, object()],
)  # fmt: skip
def test_what_can_never_fire_is_refused(wanted):
    with pytest.raises(ValueError, match=r"schedule=.* never fires: expected a number of steps"):
        Schedule.of(wanted)


INFINITE = float("inf")


@pytest.mark.parametrize(
    ("wanted", "last"),
    [
        (None, 1),
        (None, INFINITE),
        (1, 1),
        (10, 10),
        (10, INFINITE),
        ([7], 7),
        ([0, 7], 7),
        ([7, 100], 8),
        ([7], INFINITE),
    ],
)
def test_trainings_in_which_it_fires(wanted, last):
    schedule = Schedule.of(wanted)
    schedule.check_fires(last)
    assert any(schedule.due(step, since=step - 1) for step in range(1, int(min(last, 100)) + 1))


@pytest.mark.parametrize(("wanted", "last"), [(10, 9), ([7], 6), ([7, 8], 1), (1000, 8)])
def test_trainings_in_which_it_does_not(wanted, last):
    schedule = Schedule.of(wanted)
    assert not any(schedule.due(step, since=step - 1) for step in range(1, last + 1))
    with pytest.raises(ValueError, match=rf"never fires .*step {last}: .*smaller schedule="):
        schedule.check_fires(last)


@pytest.mark.parametrize("wanted", [3, [3, 6, 9]])
def test_steps_that_are_passed_over_are_made_up_for(wanted):
    """Several optimizers take several steps at a time."""
    schedule = Schedule.of(wanted)
    assert [step for step in range(2, 12, 2) if schedule.due(step, since=step - 2)] == [4, 6, 10]
    assert not schedule.due(3, since=3)


def test_it_reads_as_a_user_would_say_it():
    assert str(Schedule.of(50)) == "every 50 steps"
    assert str(Schedule.of([5, 2])) == "at 2, 5"
    assert str(Schedule.of(None)).endswith("256, 512 and every 1000 steps beyond 512")


@pytest.mark.parametrize("wanted", [None, 1, 7, [0, 3, 90], [5]])
@pytest.mark.parametrize(("first", "last"), [(0, 0), (0, 100), (7, 7), (8, 13), (3, 4096), (9, 5)])
def test_counting_points(wanted, first, last):
    schedule = Schedule.of(wanted)
    points = [step for step in range(first, last + 1) if schedule.due(step, since=step - 1)]
    assert schedule.count(first, last) == len(points)
