"""Weights from around transitions: that the ring holds the last few, that those of a transition
stay, and that the bound on disk holds.
"""

import logging

import pytest
import torch
from torch import nn

from monitor.keeping import RING, Keeper
from tests.monitor.detection.made_up import notice


def model(value=0.0):
    made = nn.Linear(4, 4, bias=False)
    nn.init.constant_(made.weight, value)
    return made


BYTES = 64


def there(root):
    return sorted(int(path.stem) for path in root.glob("_checkpoints/run=r/*.pt"))


@pytest.fixture
def keeper(tmp_path):
    return Keeper(tmp_path, "r", most_bytes=100 * BYTES)


def test_the_last_few_measurements_are_there(tmp_path, keeper):
    for step in range(0, 100, 10):
        keeper.keep(model(step), step, ())
    assert there(tmp_path) == [60, 70, 80, 90]
    weights = torch.load(tmp_path / "_checkpoints/run=r/000000000070.pt", weights_only=True)
    again = model()
    again.load_state_dict(weights)
    assert (again.weight == 70).all()


def test_what_a_transition_is_kept_with_stays(tmp_path, keeper):
    said = {50: notice("provisional", 50, 35), 80: notice("confirmed", 80, 35)}
    kept = {}
    for step in range(0, 200, 10):
        notices = (said[step],) if step in said else ()
        for told in keeper.keep(model(step), step, notices):
            kept[told.event.state] = told.checkpoints
    names = [f"_checkpoints/run=r/{step:012d}.pt" for step in (30, 50, 80)]
    assert kept == {"provisional": tuple(names[:2]), "confirmed": tuple(names)}
    assert there(tmp_path) == [30, 50, 80, 160, 170, 180, 190]


def test_what_is_retracted_is_let_go_but_for_what_others_need(tmp_path, keeper):
    said = {
        50: (notice("provisional", 50, 45), notice("provisional", 50, 45, "y")),
        60: (notice("provisional", 60, 55, "z"),),
        80: (notice("retracted", 80, 45), notice("retracted", 80, 55, "z")),
    }
    for step in range(0, 150, 10):
        keeper.keep(model(step), step, said.get(step, ()))
    assert there(tmp_path) == [40, 50, 110, 120, 130, 140]


def test_the_bound_holds(tmp_path, caplog):
    keeper, most = Keeper(tmp_path, "r", most_bytes=(RING + 3) * BYTES), 0
    with caplog.at_level(logging.INFO, logger="phasewatch"):
        for step in range(60):
            said = (
                (notice("provisional", step, step - 1, f"series {step}"),) if step % 5 == 4 else ()
            )
            keeper.keep(model(step), step, said)
            most = max(most, len(there(tmp_path)))
    assert most == RING + 3
    (record,) = [r for r in caplog.records if "no more weights are kept" in r.getMessage()]
    assert "said once" in record.getMessage()


def test_a_ring_that_does_not_fit_is_none(tmp_path, caplog):
    keeper = Keeper(tmp_path, "r", most_bytes=RING * BYTES - 1)
    with caplog.at_level(logging.INFO, logger="phasewatch"):
        for step in range(5):
            (told,) = keeper.keep(model(), step, (notice("provisional", step, step),))
            assert told.checkpoints == ()
    assert there(tmp_path) == []
    assert len(caplog.records) == 1


def test_tied_weights_are_counted_once(tmp_path):
    tied = nn.ModuleList([model(), model()])
    tied[1].weight = tied[0].weight
    keeper = Keeper(tmp_path, "r", most_bytes=RING * BYTES)
    keeper.keep(tied, 0, ())
    assert there(tmp_path) == [0]


def test_a_run_goes_on_from_an_earlier_step(tmp_path, keeper):
    for step in range(0, 60, 10):
        keeper.keep(model(step), step, (notice("provisional", 30, 30),) if step == 30 else ())
    assert there(tmp_path) == [20, 30, 40, 50]
    again = Keeper(tmp_path, "r", most_bytes=100 * BYTES)
    again.begin(after=35)
    assert there(tmp_path) == [20, 30]
    aside = tmp_path / "_superseded/_checkpoints/run=r"
    assert sorted(path.name for path in aside.iterdir()) == ["000000000040.pt", "000000000050.pt"]
    for step in range(40, 90, 10):
        again.keep(model(step), step, ())
    assert there(tmp_path) == [20, 30, 50, 60, 70, 80]
