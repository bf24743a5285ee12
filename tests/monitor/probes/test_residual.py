"""`residual`: against dense definitions in float64, on data of a known spectrum, on noise that
seems low-dimensional, on streams that were turned or mixed up, and through a training.
"""

import math

import numpy as np
import pytest
import torch

from monitor.anatomy import find_language_model
from monitor.capture import Observation, observe
from monitor.evidence import Evidence
from monitor.measure import Monitor
from monitor.probes import residual
from monitor.stimuli import text_stimulus
from monitor.streams import StreamSample
from monitor.subject import Memory
from tests.models import HUGGING_FACE, AttentionOnly
from tests.oracles import residual as oracle

SPECTRAL = ("participation_ratio", "effective_rank", "top_share")


def observed(rows: torch.Tensor) -> dict[str, Observation]:
    """An observation on text in which the stream was `rows` [layer, batch, sampled, feature]."""
    _, batch, sampled, _ = rows.shape
    positions = torch.arange(1, sampled + 1)
    return {
        "text": Observation(
            stimulus=text_stimulus(torch.zeros(batch, sampled + 1, dtype=torch.long)),
            vocab_size=64,
            stream=StreamSample(rows=rows.float(), positions=positions),
        )
    }


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def remembered(rows: torch.Tensor, later: torch.Tensor | None = None) -> Memory:
    memory = Memory()
    memory.keep(observed(rows))
    if later is not None:
        memory.keep(observed(later))
    return memory


def table(rows: torch.Tensor, memory: Memory | None = None) -> dict:
    memory = memory or Memory()
    return residual.compute(
        Evidence(observations=observed(rows), previous=memory.previous, first=memory.first)
    )


def test_every_field_against_its_definition():
    # Sequences differ in more than their tokens do, and one dimension has a large mean.
    rows = noise(3, 4, 2, 5) + noise(3, 4, 1, 5, seed=1) + torch.tensor([3.0, 0, 0, 0, 0])
    earlier, first = noise(3, 4, 2, 11, seed=2) + 1, rows + noise(3, 4, 2, 5, seed=3)
    columns = table(rows, remembered(first, earlier))
    exact = {"now": rows, "cka_previous": earlier, "cka_first": first}
    exact = {name: values.double().numpy() for name, values in exact.items()}

    def flat(sequences):
        return sequences.reshape(-1, sequences.shape[-1])

    for layer in range(3):
        now = exact["now"]
        for field in SPECTRAL:

            def spectral(sequences, field=field):
                return getattr(oracle, field)(flat(sequences))

            expected = spectral(now[layer]), oracle.jackknife(spectral, now[layer])
            found = columns[field][layer].item(), columns[f"{field}_stderr"][layer].item()
            assert found == pytest.approx(expected, rel=1e-9), field
        for field in ("norm", "anisotropy", "final_share"):

            def per_layer(sequences, field=field, layer=layer):
                return getattr(oracle, field)(sequences.swapaxes(0, 1), layer)

            by_sequence = now.swapaxes(0, 1)
            expected = per_layer(by_sequence), oracle.jackknife(per_layer, by_sequence)
            found = columns[field][layer].item(), columns[f"{field}_stderr"][layer].item()
            assert found == pytest.approx(expected, rel=1e-6), field
        for field in ("cka_previous", "cka_first"):
            features = now.shape[-1]

            def similarity(both, features=features):
                return oracle.cka(flat(both[..., :features]), flat(both[..., features:]))

            both = np.concatenate([now[layer], exact[field][layer]], axis=-1)
            expected = similarity(both), oracle.jackknife(similarity, both)
            found = columns[field][layer].item(), columns[f"{field}_stderr"][layer].item()
            # What is kept of earlier measurements is turned, in float32.
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-6), field
    norms = [oracle.norm(exact["now"], 0)] * 3
    assert columns["norm_null"].tolist() == pytest.approx(norms)
    assert columns["final_share_null"].tolist() == pytest.approx([1 / 3] * 3)
    assert columns["layer"] == [-1, 0, 1]
    assert columns["n"] == [4] * 3
    assert columns["validity"] == ["ok"] * 3


def test_data_of_a_known_spectrum():
    """Tokens whose covariance has eigenvalues 8, 4, 2, 2 in 40 dimensions, and a mean."""
    wanted = torch.tensor([8.0, 4.0, 2.0, 2.0], dtype=torch.float64)
    centred = noise(64, 4).double()
    basis = torch.linalg.qr(centred - centred.mean(0)).Q
    directions = torch.linalg.qr(noise(40, 4, seed=1).double()).Q
    tokens = basis * wanted.sqrt() @ directions.T + 1
    columns = table(tokens.reshape(1, 8, 8, 40))
    shares = [p / 16 for p in (8, 4, 2, 2)]
    rank = math.exp(-sum(p * math.log(p) for p in shares))
    assert columns["participation_ratio"].item() == pytest.approx(256 / 88, rel=1e-4)
    assert columns["effective_rank"].item() == pytest.approx(rank, rel=1e-4)
    assert columns["top_share"].item() == pytest.approx(0.5, rel=1e-4)


def test_impostor_noise_in_few_tokens_looks_low_dimensional():
    """64 dimensions in 64 tokens have a participation ratio of 31: their null says the same."""
    columns = table(noise(8, 4, 16, 64))
    assert columns["participation_ratio"].mean().item() == pytest.approx(31.5, abs=0.5)
    for field in SPECTRAL:
        null = columns[f"{field}_null"]
        assert columns[field].mean().item() == pytest.approx(null[0].item(), rel=0.03), field
    # What truly has 12 dimensions lies far below it.
    few = table(noise(8, 4, 16, 12) @ noise(12, 64, seed=1))
    assert (few["participation_ratio"] < 0.4 * few["participation_ratio_null"]).all()


@pytest.mark.parametrize(
    ("tokens", "features"), [(30, 8), (64, 64), (16, 256), (256, 64), (90, 16)]
)
def test_the_null_is_the_mean_over_noise(tokens, features):
    draws = [residual.centred(noise(1, tokens, features, seed=seed)) for seed in range(150)]
    everyone = torch.ones(1, tokens, dtype=torch.bool)
    found = torch.cat([residual.spectral(draw, draw @ draw.T, everyone) for draw in draws])
    mean = found.mean(0).tolist()
    assert residual.isotropic(tokens, features) == pytest.approx(mean, rel=0.02)


def test_errors_are_the_spread_over_other_sequences():
    """Tokens of a sequence share a part, and a few dimensions most of the variance."""
    scale = torch.arange(1, 25) ** -0.5
    names = ("norm", *SPECTRAL, "anisotropy", "cka_first")
    found, errors = [], []
    for seed in range(120):
        rows = (noise(1, 12, 6, 24, seed=seed) + noise(1, 12, 1, 24, seed=1000 + seed)) * scale
        rows[..., 0] += 1.5
        other = rows + noise(1, 12, 6, 24, seed=2000 + seed)
        columns = table(rows, remembered(other))
        found.append([columns[name].item() for name in names])
        errors.append([columns[f"{name}_stderr"].item() for name in names])
    spread = torch.tensor(found).std(0)
    said = torch.tensor(errors).square().mean(0).sqrt()
    for name, ratio in zip(names, (said / spread).tolist(), strict=True):
        assert 0.8 < ratio < 1.35, (name, ratio)


def test_similarity_sees_through_rotation_scale_and_shift():
    rows = noise(2, 6, 8, 32) * torch.arange(1, 33) ** -0.5
    turn = torch.linalg.qr(noise(32, 32, seed=1)).Q
    columns = table(rows, remembered(3 * rows @ turn + 1))
    for field in ("cka_previous", "cka_first"):
        assert columns[field].tolist() == pytest.approx([1, 1], abs=1e-5)
        assert columns[f"{field}_stderr"].tolist() == pytest.approx([0, 0], abs=1e-5)


def test_impostor_the_same_tokens_in_another_order_are_not_similar():
    """The plain estimate says 0.7 of them, as of any streams with fewer tokens than dimensions."""
    rows = noise(40, 6, 8, 128)
    tokens = rows.flatten(1, 2)
    mixed = tokens[:, torch.randperm(48, generator=seeded(5))].view_as(rows)
    found = table(rows, remembered(mixed))["cka_first"]
    assert abs(found.mean().item()) < 4 * found.std().item() / math.sqrt(40)
    here, there = (tokens - tokens.mean(1, keepdim=True)).double(), mixed.flatten(1, 2).double()
    there = there - there.mean(1, keepdim=True)
    plain = (here.mT @ there).norm(dim=(1, 2)) ** 2
    plain /= (here.mT @ here).norm(dim=(1, 2)) * (there.mT @ there).norm(dim=(1, 2))
    assert plain.mean() > 0.6


def test_impostor_a_shared_direction_is_anisotropy_and_no_dimension():
    """Tokens far from the origin all look alike, and are spread over as many dimensions."""
    rows = noise(1, 8, 8, 32)
    away = table(rows + 10 * torch.eye(32)[0])
    assert away["anisotropy"].item() > 0.7
    assert abs(table(rows)["anisotropy"].item()) < 0.05
    for field in SPECTRAL:
        assert away[field].item() == pytest.approx(table(rows)[field].item(), rel=1e-5)


def test_shares_of_the_final_stream_sum_to_one_and_tell_who_wrote():
    start, wrote = noise(1, 5, 4, 16), 5 * noise(1, 5, 4, 16, seed=1)
    columns = table(torch.cat([start, start, start + wrote, start + wrote]))
    shares = columns["final_share"]
    assert shares.sum().item() == pytest.approx(1)
    assert shares[1] == shares[3] == 0
    assert shares[2] > 0.9


def test_many_tokens_are_thinned_evenly():
    rows = noise(1, 40, 16, 8)
    columns = table(rows)
    positions = torch.arange(1, 13) * 16 // 12 - 1
    kept = rows[:, :, positions]
    assert columns["n"] == [40]
    expected = oracle.participation_ratio(kept.reshape(-1, 8).double().numpy())
    assert columns["participation_ratio"].item() == pytest.approx(expected)
    many = table(noise(1, 600, 2, 8))
    assert many["n"] == [512]


def test_first_and_previous_are_those_of_the_measurements_before():
    one, two, three = (noise(2, 4, 4, 8, seed=seed) for seed in range(3))
    memory = Memory()
    assert table(one, memory)["cka_first"] is None
    memory.keep(observed(one))
    memory.keep(observed(two))
    assert table(two, memory)["cka_previous"].tolist() == pytest.approx([1, 1], abs=1e-5)
    assert table(one, memory)["cka_first"].tolist() == pytest.approx([1, 1], abs=1e-5)
    assert (table(three, memory)["cka_first"] < 0.9).all()


def test_memory_keeps_no_more_than_it_needs():
    memory = remembered(noise(3, 4, 4, 100))
    (kept,) = memory.previous.values()
    assert kept.stream.rows.shape == (3, 4, 4, 16)
    assert kept.attention is kept.losses is None
    assert not kept.stimulus.targets
    # A diverged model is nothing to compare with.
    memory.keep(observed(torch.full((3, 4, 4, 100), math.nan)))
    assert memory.previous["text"] is kept
    memory.keep({})
    assert memory.previous["text"] is kept


def test_in_training_it_tells_how_far_the_stream_has_moved():
    torch.manual_seed(0)
    model, text = AttentionOnly(), torch.randint(64, (6, 64))
    watch = Monitor(root=None, probes=["residual"], text=text, sequences=6)
    tables = []
    for step in range(4):
        given = watch.measure(model, step=step)
        assert given.failures == ()
        tables.append(given.frame("residual"))
        assert tables[-1]["final_share"].sum() == pytest.approx(1, abs=1e-5)
        if step < 2:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.7 * parameter.std() * torch.randn_like(parameter))
    assert tables[0][["cka_previous", "cka_first", "cka_first_stderr"]].isna().all(axis=None)
    assert tables[1]["cka_previous"].tolist() == tables[1]["cka_first"].tolist()
    assert (tables[1]["cka_first"] < 0.95).all()
    assert (tables[2]["cka_first"] < tables[2]["cka_previous"]).all()
    # Nothing was trained before the last one.
    assert tables[3]["cka_previous"].tolist() == pytest.approx([1] * len(tables[3]), abs=1e-5)
    assert tables[3]["cka_first"].tolist() == pytest.approx(tables[2]["cka_first"], abs=1e-5)
    assert {tuple(table["validity"]) for table in tables} == {("ok",) * len(tables[0])}


def test_it_says_of_gpt2_what_its_own_hidden_states_say():
    torch.manual_seed(0)
    module = HUGGING_FACE["gpt2"]()
    model = find_language_model(module)
    stimulus = text_stimulus(torch.randint(model.vocab_size, (5, 32)))
    seen = observe(model, stimulus, stream=True)
    columns = residual.compute(Evidence(observations={"text": seen}))
    with torch.no_grad():
        hidden = module.eval()(stimulus.tokens, output_hidden_states=True).hidden_states
    # The last of them comes after the final norm.
    for layer, states in enumerate(hidden[:-1]):
        tokens = states[:, seen.stream.positions].double().flatten(0, 1)
        assert columns["norm"][layer].item() == pytest.approx(tokens.norm(dim=1).mean().item())
        for field in SPECTRAL:
            expected = getattr(oracle, field)(tokens.numpy())
            assert columns[field][layer].item() == pytest.approx(expected, rel=1e-4), field


def test_models_of_other_shapes_are_not_compared():
    columns = table(noise(3, 4, 4, 8), remembered(noise(2, 4, 4, 8)))
    assert columns["cka_first"] is columns["cka_first_null"] is None
    wider = table(noise(3, 4, 4, 8), remembered(noise(3, 4, 4, 20)))
    assert wider["cka_first"].isfinite().all()


def test_what_cannot_be_measured_is_not_a_number():
    rows = noise(3, 4, 4, 8)
    rows[0], rows[1, 0, 0, 0] = 7.0, math.inf
    columns = table(rows)
    for field in SPECTRAL:
        assert columns[field].isfinite().tolist() == [False, False, True]
    single = table(noise(2, 1, 16, 8))
    assert single["anisotropy"] is None
    assert single["participation_ratio"].isfinite().all()
    assert single["participation_ratio_stderr"].isnan().all()


def test_without_the_stream_there_is_the_reason():
    unseen = Observation(
        stimulus=text_stimulus(torch.zeros(5, 8, dtype=torch.long)),
        vocab_size=64,
        reasons={"stream": "its blocks were not found"},
    )
    columns = residual.compute(Evidence(observations={"repeated": unseen}))
    assert columns["validity"] == ["its blocks were not found"]
    assert columns["n"] == [5]
    assert columns["layer"] == [-1]
    assert columns["norm"] is None
