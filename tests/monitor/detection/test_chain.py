"""The chain of checkpoints: honest trainings of many kinds never break it; weights of another time,
of another run, or of an earlier measurement do.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

from monitor.detection.chain import Chain
from monitor.sketching import digest, sketch
from tests.callbacks.tiny import TinyLM, text

STEPS = [0, 1, 2, 4, 8, 16, 32, 64, *range(100, 400, 20)]

OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd, momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3),
    "adamw, fast": lambda p: torch.optim.AdamW(p, lr=5e-2),
    "adamw, decaying": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=1.0),
}
RATES = {
    "constant": lambda step: 1.0,
    "warm-up from nothing": lambda step: min(1.0, step / 100),
    "decay to nothing": lambda step: 1 - step / 400,
    "restarts": lambda step: 1 - (step % 100) / 100,
}


def weights(optimiser="adamw", rate="constant", seed=0):
    """Copies of a model at some steps of its training."""
    torch.manual_seed(seed)
    model, tokens = TinyLM(), text(16, seed=seed)
    chosen = OPTIMISERS[optimiser](model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(chosen, RATES[rate])
    kept = {}
    for step in range(STEPS[-1] + 1):
        if step in STEPS:
            kept[step] = copy.deepcopy(model)
        rows = tokens[torch.randint(16, (4,))]
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        chosen.zero_grad()
        loss.backward()
        chosen.step()
        schedule.step()
    return kept


def followed(models):
    """By the first step of weights that do not come from those before, why not."""
    chain, broken = Chain(), {}
    for step, model in models.items():
        for known in chain.take(step, digest(model), sketch(model).numpy()):
            broken[known.since] = known.why
    return broken


@pytest.fixture(scope="module")
def run():
    return weights()


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_honest_trainings_break_nothing(optimiser, rate):
    trained = weights(optimiser, rate)
    assert sketch(trained[STEPS[-1]]).isfinite().all()
    assert followed(trained) == {}


def test_weights_of_an_earlier_measurement(run):
    back = "were from elsewhere"
    assert followed(run | {200: run[64]}) == {
        200: "its weights are those of step 64",
        220: f"the weights of step 200 {back}",
    }
    for_long = followed(run | dict.fromkeys((200, 220, 240), run[64]))
    assert for_long == {
        200: "its weights are those of step 64",
        260: f"the weights of step 240 {back}",
    }


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_a_suite_that_serves_the_last_weights_for_early_checkpoints(optimiser):
    """However near these are: once they come at their own step, it is known which are honest."""
    run = weights(optimiser)
    served = {step: run[380] if step < 100 else model for step, model in run.items()}
    broken = followed(served)
    assert broken[100] == "the weights of step 64 were those of step 380"
    # Where the last steps went nearly as far, either could be misplaced.
    assert broken.keys() <= {100, 380}


def test_late_weights_that_differ_at_every_early_step(run):
    """The chain is broken where their own time comes, and everywhere before."""
    late = dict(zip(STEPS, STEPS[STEPS.index(200) :], strict=False))
    broken = followed({step: run[late[step]] if step < 100 else run[step] for step in STEPS})
    assert 100 in broken
    assert not {120, 140, 160, 180, 360, 380} & broken.keys()


@pytest.mark.parametrize("at", [16, 64, 120])
def test_one_checkpoint_from_the_end_of_the_run(run, at):
    """It is far away, or is known to have been once the next one is back."""
    later = STEPS[STEPS.index(at) + 1]
    broken = followed(run | {at: run[380]})
    assert later in broken
    assert broken.keys() <= {at, later, 380}


def test_weights_of_another_run(run):
    other = weights(seed=1)
    broken = followed({step: other[step] if step >= 200 else model for step, model in run.items()})
    assert broken == {200: "its weights are far from those of step 180"}


@pytest.mark.parametrize("measurements", range(1, 7))
def test_a_stretch_of_another_run(run, measurements):
    """It is broken where the stretch begins and where it ends, and nowhere else."""
    other = weights(seed=1)
    begin = STEPS.index(160)
    stretch = STEPS[begin : begin + measurements]
    broken = followed(run | {step: other[step] for step in stretch})
    assert broken.keys() == {160, STEPS[begin + measurements]}


def test_weights_that_are_not_finite(run):
    """They are far from nothing, and hide no other break."""
    lost = copy.deepcopy(run[200])
    with torch.no_grad():
        next(lost.parameters()).fill_(float("nan"))
    other = weights(seed=1)
    broken = followed(run | {step: lost if step == 200 else other[step] for step in (200, 320)})
    assert 200 not in broken
    assert 320 in broken


def test_training_that_rests_is_one_chain(run):
    rested = {step: run[min(step, 200)] for step in STEPS}
    assert followed(rested) == {}
    # And goes on.
    rested = {step: run[200] if 200 <= step < 300 else model for step, model in run.items()}
    assert followed(rested) == {}
