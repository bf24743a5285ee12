"""Norms as matrices: gains of norms of every kind against C diag(γ) written out, what is no norm is
refused, and for models of many families the folded matrices against what the model itself computes
(in direction, since a norm's divisor is left out).
"""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

from monitor.anatomy import find_language_model
from monitor.parts import Parts, activations, find_parts
from monitor.parts.folding import (
    NotFoldedError,
    embedded,
    final_norm,
    reading,
    unembedded,
    writing,
)
from monitor.parts.norms import LinearNorm, NotANormError
from tests.models import AttentionBlock, AttentionOnly, attend_causally
from tests.monitor.test_parts import ALL, OWN, TOKENS, build, randomised

pytestmark = [
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning"),
]
POST_NORM = {name for name in OWN if "norms last" in name}


class OnePlus(nn.Module):
    """As Gemma has its gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class Saturating(nn.Module):
    """As "dynamic tanh" stands in for a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * torch.tanh(0.01 * x)


def shaken(module: nn.Module) -> nn.Module:
    """Far from how it is initialised; a gain may be negative."""
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            random = torch.Generator().manual_seed(number)
            parameter.add_(torch.randn(parameter.shape, generator=random))
    return module


@pytest.mark.parametrize("width", [32, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm, OnePlus])
def test_the_gain_of_a_norm(kind, dtype, width):
    norm = shaken(kind(width)).to(dtype)
    weight = norm.weight.double() + (1 if kind is OnePlus else 0)
    with torch.no_grad():
        linear = LinearNorm.of(norm, torch.zeros(width, dtype=dtype))
    within = max(1e-6, 4 * torch.finfo(dtype).eps)
    assert linear.centred == (kind is nn.LayerNorm)
    torch.testing.assert_close(linear.gain.double(), weight, rtol=within, atol=within)
    centring = torch.eye(width, dtype=torch.float64)
    if linear.centred:
        centring -= torch.full((width, width), 1 / width, dtype=torch.float64)
    whole = centring @ weight.diag()
    random = torch.Generator().manual_seed(9)
    rows = torch.randn(5, width, dtype=torch.float64, generator=random)
    torch.testing.assert_close(
        linear.written(rows), rows @ whole, rtol=10 * within, atol=10 * within
    )
    read = linear.read(rows)
    torch.testing.assert_close(read, rows @ whole.T, rtol=10 * within, atol=10 * within)


@pytest.mark.parametrize(
    "imposter",
    [
        nn.Linear(32, 32),
        nn.Identity(),
        nn.Tanh(),
        Saturating(32),
        nn.BatchNorm1d(32).eval(),
        nn.GroupNorm(2, 32),
        nn.Softmax(dim=-1),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_is_no_norm_is_refused(imposter):
    with torch.no_grad(), pytest.raises(NotANormError, match="no norm"):
        LinearNorm.of(imposter, torch.zeros(32))


def unbiased(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    return model


def aligned(ours: Tensor, own: Tensor) -> bool:
    """Whether all rows have the direction of the model's own, and not the opposite one."""
    cosines = torch.cosine_similarity(ours.double(), own.double(), dim=-1)
    return bool((cosines > 1 - 1e-6).all())


def mixed_writes(parts: Parts, layer: int, mixed: Tensor) -> Tensor:
    return torch.einsum(
        "bhpd,hdf->bpf", mixed.double(), writing(parts, parts.blocks[layer]).double()
    )


@pytest.mark.parametrize(
    ("name", "how"),
    [case for case in ALL if case[0] not in POST_NORM and case[1] != "flex_attention"],
)
@torch.no_grad()
def test_the_matrices_are_those_by_which_the_model_reads_and_writes(name, how):
    parts = find_parts(find_language_model(unbiased(build(name, how))))
    seen = activations(parts, TOKENS)
    for block in parts.blocks:
        stream = seen["residual_before", block.layer]
        for kind in ("query", "key", "value"):
            own = seen[kind, block.layer]
            own = own.repeat_interleave(block.heads // own.shape[1], dim=1)
            # A rotation by position leaves the first position as it is.
            until = None if kind == "value" else 1
            made = torch.einsum("bpf,hfd->bhpd", stream, reading(parts, block, kind))
            assert aligned(made[:, :, :until], own[:, :, :until])
        written = block.attention_write.scale * seen["attention_write", block.layer]
        assert aligned(mixed_writes(parts, block.layer, seen["mixed", block.layer]), written)
    last = seen["residual_after", parts.blocks[-1].layer]
    norm, every = final_norm(parts), torch.arange(len(parts.unembedding))
    columns = unembedded(parts, every).T
    logits = last @ (columns if norm is None else norm.read(columns.mT).mT)
    assert aligned(logits, parts.logit_scale * seen["unembedding_output", -1])
    if parts.embedding_norm is None:
        tokens = parts.embedding[TOKENS]
        assert torch.allclose(embedded(parts, TOKENS.flatten()).view_as(tokens), tokens)


@pytest.mark.parametrize("name", sorted(POST_NORM))
def test_a_stream_that_is_normed_after_every_write_is_not_read(name):
    parts = find_parts(find_language_model(build(name, "own")))
    for kind in ("query", "key", "value"):
        with pytest.raises(NotFoldedError, match="norms its stream"):
            reading(parts, parts.blocks[0], kind)
    with pytest.raises(NotFoldedError, match="norms its stream"):
        writing(parts, parts.blocks[0])


def test_what_is_not_known_says_why():
    model = find_language_model(randomised(AttentionOnly))
    parts = Parts.none(model, "it is hidden")
    for function in (
        final_norm,
        lambda p: embedded(p, TOKENS[0]),
        lambda p: unembedded(p, TOKENS[0]),
    ):
        with pytest.raises(NotFoldedError, match="it is hidden"):
            function(parts)


def test_a_stream_read_through_no_norm_is_refused():
    model = randomised(AttentionOnly)
    model.blocks[1].norm = Saturating(64)
    model.norm = Saturating(64)
    parts = find_parts(find_language_model(model))
    assert parts.blocks[1].attention_norm == "blocks.1.norm"
    reading(parts, parts.blocks[0], "value")
    with pytest.raises(NotFoldedError, match=r"blocks\.1\.norm: .* no norm"):
        reading(parts, parts.blocks[1], "value")
    with pytest.raises(NotFoldedError, match=r"norm: .* no norm"):
        final_norm(parts)


class NormedTogether(AttentionBlock):
    """One norm over the queries of all heads."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__(width=64, heads=4, attend=attend_causally)
        self.together = norm(64)

    def projected(self, residual: Tensor) -> Tensor:
        query, key, value = super().projected(residual)
        whole = self.together(rearrange(query, "b h p d -> b p (h d)"))
        return torch.stack([rearrange(whole, "b p (h d) -> b h p d", h=4), key, value])


def test_a_mean_over_all_heads_is_not_folded_into_one():
    for norm in (nn.RMSNorm, nn.LayerNorm):
        model = AttentionOnly(layers=1)
        model.blocks[0] = NormedTogether(norm)
        parts = find_parts(find_language_model(shaken(model)))
        assert parts.blocks[0].query.norm == "blocks.0.together"
        if norm is nn.RMSNorm:
            reading(parts, parts.blocks[0], "query")
            continue
        with pytest.raises(NotFoldedError, match="a mean over all heads"):
            reading(parts, parts.blocks[0], "query")
