"""The dictionary probe: numbers as summed up one sequence at a time, a model with a sparse stream,
and one of random weights, which looks as good and must not beat its twins.
"""

import math

import numpy as np
import pytest
import torch

from monitor.capture import Observation
from monitor.dictionary import Evaluated, LayerDictionary
from monitor.evidence import Evidence
from monitor.measure import Monitor, measure
from monitor.probes import OPTIONAL, PROBES, select
from monitor.probes.dictionary import SPEC, compute
from monitor.stimuli import text_stimulus
from tests.models import AttentionOnly
from tests.models.sparse_stream import VOCABULARY, SparseStream, counting
from tests.oracles import dictionary as oracle

OF_DICTIONARIES = [field.name for field in SPEC.fields if field.null_sd]


def measured(module, text, times=1, **options):
    frames = []
    with Monitor(root=None, probes=["dictionary"], text=text, sequences=48, **options) as watch:
        for step in range(times):
            measurement = watch.measure(module, step)
            assert measurement.failures == ()
            frames.append(measurement.frame("dictionary").iloc[0])
    return frames


def evaluated(rows, made, fires, *, seed, losses=None, earlier=True):
    """As a pass would have summed it up, seen from a point of no meaning."""
    random = torch.Generator().manual_seed(seed)
    away = rows.double() - 1.5
    return Evaluated(
        tokens=torch.full((len(rows),), rows.shape[1]),
        squares=away.square().sum((1, 2)),
        sums=away.sum(1),
        residual=(rows - made).double().square().sum((1, 2)),
        fires=fires,
        losses=losses,
        steps=7,
        cosine=torch.rand(fires.shape[1], generator=random) if earlier else None,
        fired=torch.rand(fires.shape[1], generator=random) > 0.3 if earlier else None,
    )


def row_of(model, twins):
    told = (LayerDictionary(layer=2, model=model, twins=twins),)
    tokens = torch.zeros(len(model.tokens), 4, dtype=torch.long)
    seen = Observation(stimulus=text_stimulus(tokens), vocab_size=9, features={"dictionary": told})
    columns = compute(Evidence(observations={"concepts": seen}))
    return {name: values[0] for name, values in columns.items()}


def drawn(seed, **options):
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(6, 5, 3, generator=random) + 4
    made = rows + 0.3 * torch.randn(6, 5, 3, generator=random)
    fires = (5 * torch.rand(6, 8, generator=random) - 3).clamp_min(0).ceil().long()
    return rows, made, evaluated(rows, made, fires, seed=seed, **options)


def losses_of(model, dictionary, zero, mean):
    named = {"model": model, "dictionary": dictionary, "zero": zero, "mean": mean}
    told = {name: torch.as_tensor(values, dtype=torch.float64) for name, values in named.items()}
    return told | {"predictions": torch.full((6,), 4.0, dtype=torch.float64)}


def test_numbers_are_those_of_all_sequences_one_at_a_time():
    random = np.random.default_rng(0)
    model, made, zero, mean = (4 + base + 0.1 * random.random(6) for base in (0, 1, 8, 6))
    rows, back, seen = drawn(0, losses=losses_of(model, made, zero, mean))
    row = row_of(seen, tuple(drawn(seed)[-1] for seed in (1, 2, 3)))

    def told(kept):
        fires = seen.fires[kept].sum(0).tolist()
        alive = [latent for latent in range(8) if fires[latent]]
        cosines = [float(seen.cosine[latent]) for latent in alive]
        born = [latent for latent in alive if not seen.fired[latent]]
        died = [latent for latent in range(8) if seen.fired[latent] and not fires[latent]]
        flat = (t[kept].double().flatten(0, 1).numpy() for t in (rows, back))
        return {
            "variance_explained": oracle.explained(*flat),
            "loss_recovered": (zero[kept].sum() - made[kept].sum())
            / (zero[kept].sum() - model[kept].sum()),
            "l0": sum(fires) / (5 * len(kept)),
            "dead_share": 1 - len(alive) / 8,
            "decoder_cosine": sum(cosines) / len(cosines),
            "births": len(born) / 8,
            "deaths": len(died) / 8,
            "steps": 7,
        }

    everything = told([*range(6)])
    without = [told([kept for kept in range(6) if kept != out]) for out in range(6)]
    assert everything.keys() == {field.name for field in SPEC.fields}
    for name, value in everything.items():
        assert row[name] == pytest.approx(value, rel=1e-5), name
        spread = np.array([left[name] for left in without])
        stderr = math.sqrt(5 / 6 * ((spread - spread.mean()) ** 2).sum())
        assert row[f"{name}_stderr"] == pytest.approx(stderr, rel=1e-4, abs=1e-9), name
    assert row["loss_recovered_null"] == pytest.approx(
        (zero - mean).sum() / (zero - model).sum(), rel=1e-5
    )
    nulls = [row_of(drawn(seed)[-1], (drawn(9)[-1],)) for seed in (1, 2, 3)]
    for name in OF_DICTIONARIES:
        values = [null[name] for null in nulls]
        assert row[f"{name}_null"] == pytest.approx(np.mean(values)), name
        assert row[f"{name}_null_sd"] == pytest.approx(np.std(values, ddof=1)), name
    assert (row["layer"], row["n"], row["validity"]) == (2, 6, "ok")


def test_what_cannot_be_told_is_missing():
    flat = np.full(6, 4.0)
    noise = np.random.default_rng(0).normal(0, 1, 6)
    twins = (drawn(1, earlier=False)[-1],)
    for losses in (
        None,
        losses_of(flat, flat, flat, flat),
        losses_of(flat, flat, flat + noise, flat),
    ):
        row = row_of(drawn(0, losses=losses, earlier=False)[-1], twins)
        for name in ("loss_recovered", "decoder_cosine", "births", "deaths"):
            for column in SPEC.field(name).columns:
                assert row[column] is None, column
        assert row["variance_explained"] is not None


def test_a_sparse_stream_is_told_from_its_twins():
    torch.manual_seed(0)
    module = SparseStream()
    first, second, third = measured(module, counting(96), times=3)
    for row in (first, second, third):
        assert row["validity"] == "ok"
        above = row["variance_explained"] - row["variance_explained_null"]
        error = math.hypot(row["variance_explained_stderr"], row["variance_explained_null_sd"])
        assert above > 0.1
        assert above > 5 * error
        assert row["steps"] == row["steps_null"] == 256
    assert third["loss_recovered"] > 0.9
    assert (
        third["loss_recovered"] > third["loss_recovered_null"] + 10 * third["loss_recovered_stderr"]
    )
    assert np.isnan(first["decoder_cosine"])
    # The model does not change: training settles.
    assert first["variance_explained"] < second["variance_explained"]
    assert 0.5 < second["decoder_cosine"] < third["decoder_cosine"] <= 1


def test_random_weights_do_not_beat_their_twins():
    """However well they are explained, and however often that is measured."""
    for seed in range(2):
        torch.manual_seed(seed)
        module = AttentionOnly(vocab_size=VOCABULARY, context=32, width=32)
        text = torch.randint(VOCABULARY, (96, 32))
        for row in measured(module, text, times=2):
            assert row["variance_explained"] > 0.4
            for name in ("variance_explained", "dead_share", "decoder_cosine"):
                above = row[name] - row[f"{name}_null"]
                error = math.hypot(row[f"{name}_stderr"], row[f"{name}_null_sd"])
                # The mean and the standard deviation of three are not known well.
                assert np.isnan(above) or abs(above) <= 6 * error + 0.01, (seed, name, row)
            assert np.isnan(row["loss_recovered"])


def test_it_is_measured_only_where_it_is_named():
    assert [probe.spec.name for probe in OPTIONAL] == ["dictionary", "learning_coefficient"]
    assert not set(OPTIONAL) & set(select(None))
    assert select(["default"]) == PROBES
    assert select(["default", "dictionary"]) == (*PROBES, OPTIONAL[0])
    (one,) = select(["dictionary.l0"])
    assert [field.name for field in one.spec.fields] == ["l0"]


def test_what_is_missing_says_why():
    torch.manual_seed(0)
    module = AttentionOnly()
    (row,) = measure(module, probes=["dictionary"])["dictionary"].to_dict("records")
    assert row["validity"] == "there is nothing to look at: pass text= or concepts="


def test_a_stream_that_is_not_finite_says_so_and_what_came_before_is_kept():
    torch.manual_seed(0)
    module = AttentionOnly()
    intact = module.token.weight.detach().clone()
    with Monitor(root=None, probes=["dictionary"], text=torch.randint(64, (12, 64))) as watch:
        watch.measure(module, 0)
        with torch.no_grad():
            module.token.weight.fill_(torch.inf)
        (broken,) = watch.measure(module, 1).frame("dictionary").to_dict("records")
        with torch.no_grad():
            module.token.weight.copy_(intact)
        (mended,) = watch.measure(module, 2).frame("dictionary").to_dict("records")
    assert broken["validity"] != "ok"
    assert mended["validity"] == "ok"
    assert mended["decoder_cosine"] > 0.5


def test_its_time_is_its_own():
    torch.manual_seed(0)
    module, text = AttentionOnly(), torch.randint(64, (12, 64))
    with Monitor(root=None, probes=["concepts", "dictionary"], text=text) as watch:
        seconds = watch.measure(module, 0).seconds
    assert seconds["dictionary"] > 3 * seconds["concepts"]
