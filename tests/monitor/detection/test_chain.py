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
    "sgd, momentum, fast": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
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
    """By step, why the chain was broken there."""
    chain, broken = Chain(), {}
    for step, model in models.items():
        why = chain.take(step, digest(model), sketch(model).numpy())
        if why is not None:
            broken[step] = why
    return broken


@pytest.fixture(scope="module")
def run():
    return weights()


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_honest_trainings_break_nothing(optimiser, rate):
    assert followed(weights(optimiser, rate)) == {}


def test_weights_of_an_earlier_measurement(run):
    assert followed(run | {200: run[64]}) == {200: "its weights are those of step 64"}


def test_a_suite_that_serves_the_last_weights_for_early_checkpoints(run):
    served = {step: run[380] if step < 100 else model for step, model in run.items()}
    broken = followed(served)
    # From where they are honest: at first they are far away, at last they are there again.
    assert broken == {380: "its weights are those of step 64"} | {
        step: why for step, why in broken.items() if step == 100 or step == 120
    }


@pytest.mark.parametrize("at", [16, 64, 120])
def test_one_checkpoint_from_the_end_of_the_run(run, at):
    """It is far away, or is known to have been once the next one is back."""
    later = STEPS[STEPS.index(at) + 1]
    broken = followed(run | {at: run[380]})
    assert broken.keys() - {380} <= {at, later}
    assert broken.keys() & {at, later}


def test_weights_of_another_run(run):
    other = weights(seed=1)
    broken = followed({step: other[step] if step >= 200 else model for step, model in run.items()})
    assert broken == {200: "its weights are far from those of step 180"}


def test_training_that_rests_is_one_chain(run):
    rested = {step: run[min(step, 200)] for step in STEPS}
    assert followed(rested) == {}
    # And goes on.
    rested = {step: run[200] if 200 <= step < 300 else model for step, model in run.items()}
    assert followed(rested) == {}
