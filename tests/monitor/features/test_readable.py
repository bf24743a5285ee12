"""What can be read before and after a nonlinearity: against discriminants on all activations at
once, in models in which the answer was planted, and where nothing is computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from monitor.anatomy import find_language_model
from monitor.features import COLLECTORS, collect
from monitor.features.readable import (
    AFTER,
    BEFORE,
    LABELLED,
    SHUFFLED,
    Readable,
    ReadableCollector,
    _Labelled,
    _Reader,
    candidates,
)
from monitor.labels import EVALUATION, FIRST_HALF, SECOND_HALF, Labels
from monitor.parts import Parts, activations, find_parts
from monitor.stimuli import Stimulus, labelled_stimulus
from monitor.streams import UnseenError
from tests.models import AttentionOnly, llama
from tests.models.toy_superposition import VOCABULARY, PlantedXor, bits
from tests.monitor.test_parts import hugging_face
from tests.monitor.test_parts import pytestmark as deprecated

pytestmark = deprecated

SEQUENCES, POSITIONS = 64, 32


def labelled(
    *,
    sequences: int = SEQUENCES,
    vocabulary: int = VOCABULARY,
    of: Callable[[Tensor], Tensor] = bits,
    unlike: bool = False,
) -> Stimulus:
    """Random tokens with what `of` says of them, and one label that says nothing. `unlike`: the
    first half has only some of the tokens, so that its mean is not that of all.
    """
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (sequences, POSITIONS), generator=random)
    if unlike:
        tokens[::4] = tokens[::4] // 16 * 16 + tokens[::4] % 4
    nothing = torch.randint(2, (1, *tokens.shape), generator=random) * 2 - 1
    values = torch.cat([of(tokens), nothing.to(torch.int8)])
    labels = Labels(
        names=("a", "b", "nothing")[-len(values) :],
        values=values,
        split=torch.tensor([FIRST_HALF, SECOND_HALF, EVALUATION, EVALUATION] * (sequences // 4)),
        length=torch.full((sequences,), POSITIONS),
        source=torch.arange(sequences),
    )
    return labelled_stimulus("concepts", tokens, labels)


def parity(tokens: Tensor) -> Tensor:
    return torch.stack([2 * (tokens % 2) - 1, 2 * (tokens // 2 % 2) - 1]).to(torch.int8)


def parts_of(model: nn.Module) -> Parts:
    return find_parts(find_language_model(model))


def read(model: nn.Module, stimulus: Stimulus) -> Readable:
    collected, reasons = collect(parts_of(model), stimulus, {"readable": COLLECTORS["readable"]})
    assert reasons == {}
    return collected["readable"]


def at(readable: Readable, name: str) -> Tensor:
    """Areas [layer stage] of a candidate with its own labels."""
    return readable.areas[:, LABELLED, readable.candidates.index(name)]


def test_an_xor_that_an_mlp_computes_is_readable_after_and_not_before():
    readable = read(PlantedXor(), labelled())
    planted, other = at(readable, "a xor b")
    assert abs(planted[BEFORE] - 0.5) < 0.05
    assert planted[AFTER] > 0.999
    # Nobody passes it on.
    assert (other - 0.5).abs().max() < 0.05
    used = readable.used[0, LABELLED, readable.candidates.index("a xor b")]
    assert used == pytest.approx(2.0, abs=0.1)


def test_concepts_that_the_stream_has_are_readable_before():
    readable = read(PlantedXor(), labelled())
    for name in ("a", "b"):
        # The neurons see only the bits' difference.
        assert at(readable, name)[0].min() > 0.8
    for name in ("nothing", "a xor nothing", "b xor nothing"):
        assert (at(readable, name) - 0.5).abs().max() < 0.06


def test_an_xor_that_the_embedding_wrote_is_not_computed():
    """The impostor: it is readable after the nonlinearity, and was before."""
    planted = at(read(PlantedXor(written=True), labelled()), "a xor b")[0]
    assert planted.min() > 0.999


@pytest.mark.parametrize(
    "activation", [lambda x: x, lambda x: 3.0 - 2.0 * x], ids=["identity", "affine"]
)
def test_nothing_is_computed_where_the_nonlinearity_is_linear(activation):
    readable = read(PlantedXor(activation), labelled())
    gain = readable.areas[..., AFTER] - readable.areas[..., BEFORE]
    # Where rounding moves a score into another bin.
    assert gain.abs().max() < 2e-3
    assert (at(readable, "a xor b") - 0.5).abs().max() < 0.05


def test_shuffled_labels_are_not_readable():
    readable = read(PlantedXor(), labelled())
    assert (readable.areas[:, SHUFFLED] - 0.5).abs().max() < 0.06


class Written:
    """Slow and obvious: all activations at once, in float64."""

    def __init__(self, parts: Parts, stimulus: Stimulus, collector: ReadableCollector) -> None:
        self.labels = candidates(stimulus)
        self.used, self.parts = stimulus.labels.used, parts
        self.seen = activations(parts, stimulus.tokens, sites=collector.sites)
        self.collector = collector

    def area(self, layer: int, stage: int, candidate: int) -> float:
        dims = self.dims(layer, stage)
        fitting = self.labels.split != EVALUATION
        values = self.labels.values[candidate].numpy()
        used = self.used.numpy()
        fit = (used & fitting.numpy()[:, None]).nonzero()
        rows, labels = dims[fit], values[fit]
        sd = rows.std(0)
        alive = sd > 0
        rows, dims = rows[:, alive] / sd[alive], dims[..., alive] / sd[alive]
        covariance = np.cov(rows.T, bias=True) + 1e-3 * np.eye(rows.shape[1])
        difference = rows[labels > 0].mean(0) - rows[labels < 0].mean(0)
        scores = dims @ np.linalg.inv(covariance) @ difference
        tested = used & ~fitting.numpy()[:, None] & (values != 0)
        return roc_auc_score(values[tested] > 0, scores[tested])

    def dims(self, layer: int, stage: int) -> np.ndarray:
        block = self.parts.blocks[layer]
        chosen = self.collector._layers[layer].chosen
        if stage == AFTER:
            return self.seen["mlp_post", layer][..., chosen].double().numpy()
        pre = [self.seen["mlp_pre", layer][..., chosen]]
        if block.w_gate is not None:
            with torch.no_grad():
                up = self.seen["mlp_input", layer] @ block.w_in + block.b_in
            pre.append(up[..., chosen])
        return torch.cat(pre, dim=-1).double().numpy()


@pytest.mark.parametrize("kind", ["planted", "llama"])
def test_areas_are_those_of_all_activations_at_once(kind):
    torch.manual_seed(0)
    # So few gates are not all that the MLP reads.
    gated = llama(intermediate_size=12)
    model, of = (PlantedXor(F.gelu), bits) if kind == "planted" else (gated, parity)
    parts = parts_of(model)
    assert (parts.blocks[0].w_gate is not None) == (kind == "llama")
    stimulus = labelled(vocabulary=find_language_model(model).vocab_size, of=of, unlike=True)
    written = Written(parts, stimulus, ReadableCollector(parts, stimulus))
    readable = read(model, stimulus)
    for layer in range(len(parts.blocks)):
        for candidate in range(len(readable.candidates)):
            for stage in (BEFORE, AFTER):
                expected = written.area(layer, stage, candidate)
                told = readable.areas[layer, LABELLED, candidate, stage]
                assert told == pytest.approx(expected, abs=3e-3)


def test_the_discriminant_is_fishers():
    """Where every token counts, the covariance of all of them leads to the same direction as that
    within the two classes.
    """
    model, stimulus = PlantedXor(), labelled(unlike=True)
    collector = ReadableCollector(parts_of(model), stimulus)
    collect(parts_of(model), stimulus, {"readable": lambda *_: collector})
    written = Written(parts_of(model), stimulus, collector)
    fitting = (written.used & (written.labels.split != EVALUATION)[:, None]).numpy()
    dims, labels = written.dims(0, AFTER)[fitting], written.labels.values[0].numpy()[fitting]
    assert (labels != 0).all()
    fisher = LinearDiscriminantAnalysis(solver="lsqr").fit(dims, labels).coef_[0]
    ours = collector._layers[0]._readers[AFTER]._weights[0].double().numpy()
    assert np.corrcoef(dims @ fisher, dims @ ours)[0, 1] > 0.9999


def test_sums_of_unlike_chunks_make_the_weights_of_all():
    """The first chunk, whose mean everything is counted from, is far from the others."""
    random = torch.Generator().manual_seed(0)
    dims = torch.randn(900, 5, generator=random) + 50.0
    labels = (torch.randint(2, (1, 900), generator=random) * 2 - 1).to(torch.int8)
    dims[:, 0] += labels[0]
    dims[:300] -= torch.tensor([4.0, 2.0, 0.0, 0.0, 0.0])
    reader = _Reader()
    for part in torch.arange(900).split(300):
        group = torch.zeros(300, dtype=torch.long)
        reader.see(dims[part], _Labelled.of(labels[:, part], group, fitting=True))
    reader.fit()
    rows = dims.double().numpy()
    correlation = np.corrcoef(rows.T) + 1e-3 * np.eye(5)
    has = labels[0].numpy() > 0
    difference = (rows[has].mean(0) - rows[~has].mean(0)) / rows.std(0)
    weights = np.linalg.inv(correlation) @ difference / rows.std(0)
    np.testing.assert_allclose(reader._weights[0].numpy(), weights, rtol=1e-3, atol=1e-4)


def test_leaving_out_groups_is_counting_without_them():
    stimulus = labelled(sequences=16)
    readable = read(PlantedXor(), stimulus)
    # There are fewer sequences for evaluation than groups.
    assert readable.without.shape[-1] == 8
    evaluated = (stimulus.labels.split == EVALUATION).nonzero().flatten()
    chosen = candidates(stimulus)
    values = chosen.values.clone()
    values[:, evaluated[3]] = 0
    again = read_with(PlantedXor(), stimulus, dataclasses.replace(chosen, values=values))
    torch.testing.assert_close(
        again[: len(chosen.names)], readable.without[0, LABELLED, :, AFTER, 3], atol=1e-6, rtol=0
    )


def read_with(model: nn.Module, stimulus: Stimulus, chosen: Labels) -> Tensor:
    """Areas after, in layer 0, with other labels for scoring; fitting is unchanged by them."""
    collector = ReadableCollector(parts_of(model), stimulus)
    collector._tasks = torch.cat([chosen.values, chosen.values])
    collected, _ = collect(parts_of(model), stimulus, {"readable": lambda *_: collector})
    return collected["readable"].areas[0, LABELLED, :, AFTER]


def test_all_four_cases_of_a_pair_are_as_frequent_in_every_split():
    # One concept is rare, and mostly where the other is.
    def unequal(tokens: Tensor) -> Tensor:
        return torch.stack([tokens < 40, (tokens < 20) | (tokens > 60)]).to(torch.int8) * 2 - 1

    stimulus = labelled(of=unequal)
    chosen = candidates(stimulus)
    xor = chosen.values[chosen.names.index("a xor b")]
    a, b = stimulus.labels.values[:2]
    assert not xor[:, 0].any()
    for split in (FIRST_HALF, SECOND_HALF, EVALUATION):
        inside = (chosen.split == split)[:, None] & (xor != 0)
        counts = [int(((a == x) & (b == y) & inside).sum()) for x in (1, -1) for y in (1, -1)]
        assert len(set(counts)) == 1
        assert counts[0] > 0
        assert torch.equal(xor[inside], -(a * b)[inside])
    assert torch.equal(candidates(stimulus).values, chosen.values)


def test_pairs_of_concepts_that_exclude_each_other_are_left_out():
    def exclusive(tokens: Tensor) -> Tensor:
        return torch.stack([tokens < 20, tokens > 40]).to(torch.int8) * 2 - 1

    assert set(candidates(labelled(of=exclusive)).names) == {
        "a",
        "b",
        "nothing",
        "a xor nothing",
        "b xor nothing",
    }


def test_at_most_16_concepts_and_10_pairs_are_looked_at():
    stimulus = labelled()
    random = torch.Generator().manual_seed(1)
    values = torch.randint(2, (40, SEQUENCES, POSITIONS), generator=random) * 2 - 1
    # The last concept alone has few tokens.
    values[-1, :, 4:] = 0
    many = dataclasses.replace(
        stimulus.labels, names=tuple(f"c{i}" for i in range(40)), values=values.to(torch.int8)
    )
    names = candidates(dataclasses.replace(stimulus, labels=many)).names
    assert len([name for name in names if " xor " not in name]) == 16
    assert len(names) == 26
    assert not any("c39" in name for name in names)


def test_without_concepts_or_enough_tokens_it_says_so():
    stimulus = labelled()
    none = dataclasses.replace(stimulus.labels, names=(), values=stimulus.labels.values[:0])
    with pytest.raises(UnseenError, match="no concepts were given: pass concepts="):
        candidates(dataclasses.replace(stimulus, labels=none))
    few = stimulus.labels.values.clone()
    few[:, :, 2:] = 0
    with pytest.raises(UnseenError, match="no concept has and lacks 8 tokens in each split"):
        candidates(
            dataclasses.replace(
                labelled(sequences=16),
                labels=dataclasses.replace(labelled(sequences=16).labels, values=few[:, :16]),
            )
        )


@pytest.mark.parametrize(
    ("build", "why"),
    [(AttentionOnly, "MLP: "), (lambda: hugging_face("mixtral", "sdpa"), "no linear map")],
    ids=["attention_only", "experts"],
)
def test_without_an_mlp_it_says_so(build, why):
    model = build()
    stimulus = labelled(vocabulary=find_language_model(model).vocab_size, of=parity)
    collected, reasons = collect(parts_of(model), stimulus, {"readable": ReadableCollector})
    assert collected == {}
    assert why in reasons["readable"]


def test_activations_that_are_not_finite_are_no_area_of_one_half():
    model = PlantedXor()
    with torch.no_grad():
        model.blocks[1].into.bias[3] = torch.inf
    parts = parts_of(PlantedXor())
    broken = dataclasses.replace(parts, model=find_language_model(model))
    collected, _ = collect(broken, labelled(), {"readable": ReadableCollector})
    assert collected["readable"].layers == (0,)
    assert "not finite" in collected["readable"].reasons[1]


def test_activations_that_are_not_finite_later_are_none_either():
    model, stimulus = PlantedXor(), labelled()
    parts = parts_of(model)
    evaluated = (stimulus.labels.split == EVALUATION).nonzero().flatten()
    stimulus.tokens[stimulus.tokens == VOCABULARY - 1] = 0
    stimulus.tokens[evaluated[0], 5] = VOCABULARY - 1
    with torch.no_grad():
        model.token.weight[-1] = torch.nan
    collected, reasons = collect(parts, stimulus, {"readable": ReadableCollector})
    assert collected == {}
    assert "not finite" in reasons["readable"]


def test_memory_does_not_grow_with_the_number_of_tokens():
    def held(sequences: int) -> int:
        collector = ReadableCollector(parts_of(PlantedXor()), labelled(sequences=sequences))
        collect(parts_of(PlantedXor()), labelled(sequences=sequences), {"r": lambda *_: collector})
        readers = [r for layer in collector._layers.values() for r in layer._readers]
        tensors = [t for r in readers for t in vars(r).values() if isinstance(t, Tensor)]
        tensors += [t for r in readers for t in r._sums.values()]
        return sum(t.numel() for t in tensors)

    assert held(32) == held(128)
