"""The learning coefficient: numbers as the oracle has them of the same walks; language models whose
coefficient has a closed form, and impostors with more weights and the same function; what is not
interpretable says so; within the time saved up, and beside a training that does not notice.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from monitor.anatomy import find_language_model
from monitor.batches import StimulusOptions
from monitor.capture import Observation
from monitor.evidence import Evidence
from monitor.intervening import Spending
from monitor.measure import Monitor, measure
from monitor.probes import select
from monitor.probes.learning_coefficient import SPEC, WALKS, compute
from monitor.stimuli import text_stimulus
from monitor.subject import Subject
from monitor.walks import Chain, Sampled, Setting
from tests.callbacks.tiny import TinyLM, text
from tests.models import PlantedCircuit
from tests.monitor.probes.test_ablation import NOW, text_of
from tests.monitor.test_untouched import trained
from tests.oracles import walks as oracle

LOSSES = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
SETTING = Setting(
    step_size=1e-3,
    localisation=4.0,
    inverse_temperature=50.0,
    losses=LOSSES,
    weights=100,
    null=8.0,
    null_sd=0.5,
)


def told(rises: torch.Tensor, distances: torch.Tensor | None = None) -> dict:
    """The row of given walks."""
    distances = torch.full_like(rises, 5.0) if distances is None else distances
    chains = tuple(
        Chain(rise=rise, distance=distance) for rise, distance in zip(rises, distances, strict=True)
    )
    seen = Observation(
        stimulus=text_stimulus(torch.zeros(3, 4, dtype=torch.long)), vocab_size=9, losses=None
    )
    sampled = Sampled(setting=SETTING, chains=chains)
    columns = compute(Evidence(observations={"text": seen}, sampled=sampled))
    return {name: value for name, (value,) in columns.items()}


def drawn(*, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(4, 80, generator=random, dtype=torch.float64)
    return 5 + noise + 0.5 * noise.roll(1, 1)


def test_numbers_are_those_of_all_draws_one_at_a_time():
    rises, distances = drawn(), drawn(seed=1)
    row = told(rises, distances)
    chains, flat = rises.tolist(), rises.flatten().numpy()
    assert row["validity"] == "ok"
    assert row["n"] == 3
    assert row["estimate"] == pytest.approx(flat.mean())
    alone = math.sqrt(flat.var(ddof=1) / oracle.effective_draws(chains))
    between = np.std([np.mean(chain) for chain in chains], ddof=1) / 2
    assert row["estimate_stderr"] == pytest.approx(max(alone, between))
    assert (row["estimate_null"], row["estimate_null_sd"]) == (8.0, 0.5)
    for name, number in (("rhat", oracle.split_rhat), ("effective_draws", oracle.effective_draws)):
        assert row[name] == pytest.approx(number(chains))
        left = [number([c for c in chains if c is not out]) for out in chains]
        assert row[f"{name}_stderr"] == pytest.approx(math.sqrt(3) * np.std(left))
    assert (row["rhat_null"], row["effective_draws_null"]) == (1, 320)
    drifts = [np.mean(chain[40:]) - np.mean(chain[:40]) for chain in chains]
    assert row["drift"] == pytest.approx(np.mean(drifts))
    assert row["drift_stderr"] == pytest.approx(np.std(drifts, ddof=1) / 2)
    assert row["distance"] == pytest.approx(math.sqrt((distances.numpy() ** 2).mean()))
    assert row["distance_null"] == 5
    assert (row["loss"], row["loss_null"]) == (LOSSES.mean(), math.log(9))
    assert row["loss_stderr"] == pytest.approx(np.std(LOSSES.numpy(), ddof=1) / math.sqrt(3))
    assert row["diverged"] == 0


def test_what_cannot_be_interpreted_has_no_estimate():
    apart = drawn() + torch.tensor([0.0, 0.0, 0.0, 4.0])[:, None]
    rising = drawn() + torch.linspace(0, 5, 80)
    broken = drawn()
    broken[2, 50:] = torch.nan
    away = torch.full((4, 80), 5.0, dtype=torch.float64)
    away[1] = 11.0
    rows = {
        "not mixed: R̂ is above 1.1": [told(apart), told(rising)],
        "negative: the weights are no minimum of the loss on this text": [told(drawn() - 9)],
        "1 of 4 walks diverged": [told(broken), told(drawn(), away)],
    }
    for why, of_them in rows.items():
        for row in of_them:
            assert row["validity"] == why
            assert all(row[column] is None for column in SPEC.field("estimate").columns)
            assert row["loss"] is not None
            assert row["distance_null"] == 5
    assert told(broken)["diverged"] == 0.25
    assert told(broken)["rhat"] is None
    assert told(drawn())["validity"] == "ok"


class Unigrams(nn.Module):
    """Says how often tokens occur, whatever came before: the logarithms of that. Beside each weight
    it has so many `idle` ones, as large, which nothing reads.
    """

    def __init__(self, tokens: torch.Tensor, idle: int = 0) -> None:
        super().__init__()
        often = tokens[:, 1:].flatten().bincount(minlength=VOCABULARY).double()
        # Around zero, so that their size says something.
        logits = often.log() - often.log().mean()
        self.logits = nn.Parameter(logits.float())
        self.idle = nn.Parameter(logits.float().repeat(idle))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*tokens.shape, -1) + 0.0

    def curvatures(self) -> torch.Tensor:
        """Those of all directions: the Hessian is the covariance of what is drawn."""
        p = self.logits.detach().softmax(0).double()
        known = torch.linalg.eigvalsh(p.diag() - torch.outer(p, p)).clamp_min(0)
        return torch.cat([known, torch.zeros(len(self.idle))])


VOCABULARY = 12


def unigrams(sequences: int = 64) -> torch.Tensor:
    odds = torch.linspace(1, 30, VOCABULARY)
    random = torch.Generator().manual_seed(0)
    return torch.multinomial(odds.expand(sequences, -1), 64, True, generator=random)


def measured(module: nn.Module, tokens: torch.Tensor) -> dict:
    frame = measure(
        module, probes=["learning_coefficient"], text=tokens, context=64, sequences=len(tokens)
    )["learning_coefficient"]
    (row,) = frame.to_dict("records")
    return row


def test_a_model_of_unigrams_has_the_closed_form_and_idle_weights_add_nothing():
    tokens = unigrams()
    n = 64 * 63
    of_models = []
    for idle in (0, 7):
        module = Unigrams(tokens, idle)
        row = measured(module, tokens)
        assert row["validity"] == "ok"
        curvatures = module.curvatures()
        hot = n / math.log(n)
        localisation = 100 / float(module.logits.detach().square().mean())
        a = hot * curvatures + localisation
        step = 0.4 / float(a.max())
        expected = float((hot * curvatures / (2 * a * (1 - step * a / 4))).sum())
        # Few directions make few independent draws.
        assert row["estimate_stderr"] < 0.2 * expected
        slack = 4 * row["estimate_stderr"] + 0.05 * expected
        assert row["estimate"] == pytest.approx(expected, abs=slack)
        mean = float(curvatures.mean())
        of_bowl = hot * mean + localisation
        null = len(a) * hot * mean / (2 * of_bowl * (1 - step * of_bowl / 4))
        assert row["estimate_null"] == pytest.approx(null, abs=4 * row["estimate_null_sd"] + 0.01)
        of_models.append(row)
    one, eight = of_models
    # Their number says eight times as much.
    assert eight["estimate"] < 1.3 * one["estimate"]
    assert eight["estimate"] < eight["estimate_null"] - 2 * eight["estimate_stderr"]
    assert eight["estimate_null"] > 1.1 * one["estimate_null"]


def test_weights_that_are_no_minimum_say_so():
    """As early in a training: what is sampled lies lower than the weights."""
    tokens = unigrams()
    module = Unigrams(tokens)
    with torch.no_grad():
        module.logits.mul_(1.6)
    row = measured(module, tokens)
    assert row["validity"].startswith("negative")
    assert math.isnan(row["estimate"])


def test_what_is_missing_says_why():
    torch.manual_seed(0)
    (row,) = measure(TinyLM(), probes=["learning_coefficient"])["learning_coefficient"].to_dict(
        "records"
    )
    assert row["validity"] == "no held-out text"
    module = TinyLM()
    with torch.no_grad():
        module.unembedding.weight.fill_(torch.inf)
    tokens = text(4)
    assert measured_of(module, tokens)["validity"] == "the loss or its gradient is not finite"
    subject = dataclasses.replace(subject_of(TinyLM(), tokens), sharded=True)
    (reading,) = subject.measure(select(["learning_coefficient"]), NOW).readings
    why = "every process holds only a part of its weights"
    assert reading.table["validity"].to_pylist() == [why]


def measured_of(module: nn.Module, tokens: torch.Tensor) -> dict:
    with Monitor(None, probes=["learning_coefficient"], text=tokens) as watch:
        measurement = watch.measure(module, 0, seconds=math.inf)
    assert measurement.failures == ()
    (row,) = measurement.frame("learning_coefficient").to_dict("records")
    return row


def subject_of(module: nn.Module, tokens: torch.Tensor, *names: str) -> Subject:
    options = StimulusOptions(text=tokens, context=tokens.shape[1], sequences=len(tokens))
    chosen = select(["learning_coefficient", *names])
    return Subject.new(module, find_language_model(module), chosen, options)


def test_time_is_saved_up():
    spending = Spending()
    spending.set_aside(8.0, 0.5)
    assert spending.aside == 4
    # What was set aside is granted again, since nobody spent it.
    spending.set_aside(10.0, 0.5)
    assert spending.aside == 7
    spending.spend_on_walks(6.0)
    assert (spending.aside, spending.seconds) == (1, 6)
    # Less is granted than was set aside: training turned out to be shorter.
    spending.set_aside(0.5, 0.5)
    assert spending.aside == 0.5
    spending.set_aside(-1.0, 0.5)
    assert spending.aside == 0


def test_walks_are_made_when_enough_was_saved_up():
    subject = subject_of(TinyLM(), text(6))
    chosen = select(["learning_coefficient"])
    nothing = subject.measure(chosen, NOW, seconds=0)
    assert (nothing.readings, nothing.failures, nothing.intervening) == ((), (), 0)
    assert subject.memory.spending.gradient is None
    # A little tells what a gradient takes, and no more is spent.
    assert subject.measure(chosen, NOW, seconds=1e-6).readings == ()
    each = subject.memory.spending.gradient
    assert each > 0
    needed = WALKS.passes(6, 4) * each
    made = [len(subject.measure(chosen, NOW, seconds=s * needed).readings) for s in (0.5, 0.9)]
    assert made == [0, 0]
    measurement = subject.measure(chosen, NOW, seconds=1.1 * needed)
    assert len(measurement.readings) == 1
    assert 0 < measurement.intervening <= measurement.seconds["learning_coefficient"]
    assert subject.memory.spending.aside < 1.1 * needed


@pytest.mark.parametrize("sequences", [16, 6])
def test_what_walks_cost(sequences):
    """In passes over the text, forward and backward: 185, and a little more or less where a fourth
    of the sequences is no whole number; the first time two more, to find out what they take.
    """
    forward, backward = [0], [0]

    class Counting(TinyLM):
        def forward(self, tokens):
            logits = super().forward(tokens)
            if logits.requires_grad and torch.is_grad_enabled():
                forward[0] += len(tokens)
                logits.register_hook(lambda _: backward.append(len(tokens)))
            return logits

    subject, passes = subject_of(Counting(), text(sequences)), []
    for _ in range(2):
        forward[0], backward[:] = 0, []
        subject.measure(select(["learning_coefficient"]), NOW, seconds=math.inf)
        assert forward[0] == sum(backward)
        passes.append(forward[0] / sequences)
    assert passes[1] == pytest.approx(WALKS.passes(sequences, 4))
    assert passes[0] == passes[1] + 2
    assert (passes[1] == 185) == (sequences % 4 == 0)


def test_ablations_leave_what_is_set_aside():
    module = PlantedCircuit()
    subject = subject_of(module, text_of(module, 24), "ablation")
    chosen = select(["ablation", "learning_coefficient"])
    subject.memory.spending.gradient = 1.0
    needed = WALKS.passes(len(subject.stimuli["text"].tokens), 4)
    measurement = subject.measure(chosen, NOW, seconds=needed)
    assert [reading.spec.name for reading in measurement.readings] == ["ablation"]
    assert subject.memory.spending.aside == needed / 2
    # Nobody spent it: it is granted again, with as much again.
    made = [
        len(subject.measure(chosen, NOW, seconds=share * needed).readings) for share in (1.4, 1.6)
    ]
    assert made == [1, 2]


def test_training_is_the_same_bit_for_bit():
    def check(made: Measurement) -> None:
        assert made.failures == ()
        assert made.frame("learning_coefficient")["rhat"].notna().all()

    with_it, without_it = (
        trained("learning_coefficient", text(4), steps=3, check=each) for each in (check, None)
    )
    assert with_it == without_it
