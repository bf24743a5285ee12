"""What is reduced from queries and keys, against the whole softmax: every mask, bias and shape that
`scaled_dot_product_attention` takes, by the CPU's kernel and by blocks, in bounded memory.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from monitor.anatomy import find_language_model
from monitor.attention import (
    LayerAttention,
    Pattern,
    SelfAttention,
    kernels,
    projected,
    rows,
)
from monitor.capture import observe
from monitor.stimuli import Stimulus, repeated
from tests.models import AttentionOnly
from tests.oracles.attention import masked_scores, pattern

BATCH, HEADS, POSITIONS, FEATURES = 3, 4, 24, 8
NO_KEYS = -1e30
STIMULUS = repeated(vocab_size=40, sequences=BATCH, context=POSITIONS, bos=None, seed=0)

# Attention is read to this precision as a mean over queries.
MASS, ENTROPY = 1e-6, 1e-5


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def inputs(keyheads: int = HEADS, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    # Spread so that attention is far from uniform.
    return {
        "query": 2 * random(BATCH, HEADS, POSITIONS, FEATURES, seed=1, dtype=dtype),
        "key": random(BATCH, keyheads, POSITIONS, FEATURES, seed=2, dtype=dtype),
        "value": random(BATCH, keyheads, POSITIONS, FEATURES, seed=3, dtype=dtype),
    }


def causal_mask() -> Tensor:
    return torch.ones(POSITIONS, POSITIONS, dtype=torch.bool).tril()


def additive(mask: Tensor, low: float = float("-inf")) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, low)


def distance() -> Tensor:
    position = torch.arange(POSITIONS)
    return position[:, None] - position


def left_padding() -> Tensor:
    """Sequences that begin after 0, 3 and 7 positions of padding: earlier rows see no key."""
    present = torch.arange(POSITIONS) >= torch.tensor([0, 3, 7])[:, None]
    return causal_mask() & present[:, None, None, :] & present[:, None, :, None]


def alibi() -> Tensor:
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(HEADS, 1, 1)
    return additive(causal_mask()) - slopes * distance().clamp(min=0)


LOWEST = torch.finfo(torch.float32).min
CALLS = {
    "causal flag": inputs() | {"is_causal": True},
    "no mask": inputs(),
    "boolean mask": inputs() | {"attn_mask": random(POSITIONS, POSITIONS) > -0.5},
    "causal boolean mask": inputs() | {"attn_mask": causal_mask()},
    "causal additive mask": inputs() | {"attn_mask": additive(causal_mask())},
    "causal additive mask of finite numbers": inputs()
    | {"attn_mask": additive(causal_mask(), LOWEST)[None, None].expand(BATCH, 1, -1, -1)},
    "boolean mask for each sequence": inputs()
    | {"attn_mask": random(BATCH, 1, POSITIONS, POSITIONS) > 0},
    "boolean mask for each head": inputs()
    | {"attn_mask": random(1, HEADS, POSITIONS, POSITIONS) > 0},
    "left padding": inputs() | {"attn_mask": left_padding()},
    "left padding, additive": inputs() | {"attn_mask": additive(left_padding(), NO_KEYS)},
    "padding of keys, for all queries": inputs()
    | {"attn_mask": torch.arange(POSITIONS) < torch.tensor([24, 20, 9]).view(BATCH, 1, 1, 1)},
    "sliding window": inputs() | {"attn_mask": causal_mask() & (distance() < 6)},
    "biases by distance": inputs() | {"attn_mask": alibi()},
    "biases without a mask": inputs() | {"attn_mask": random(POSITIONS, POSITIONS)},
    "grouped queries": inputs(keyheads=2) | {"is_causal": True, "enable_gqa": True},
    "grouped queries, sliding window": inputs(keyheads=2)
    | {"attn_mask": causal_mask() & (distance() < 6), "enable_gqa": True},
    "one head of keys": inputs(keyheads=1) | {"is_causal": True, "enable_gqa": True},
    "own scale": inputs() | {"is_causal": True, "scale": 0.7},
    "dropout": inputs() | {"is_causal": True, "dropout_p": 0.5},
    "bfloat16": inputs(dtype=torch.bfloat16) | {"is_causal": True},
    "float16, sliding window": inputs(dtype=torch.float16)
    | {"attn_mask": causal_mask() & (distance() < 6)},
    "float64": inputs(dtype=torch.float64) | {"is_causal": True},
    "wider values": inputs()
    | {"value": random(BATCH, HEADS, POSITIONS, 3 * FEATURES), "is_causal": True},
}


def in_memory_order_of_projections(call: dict) -> dict:
    """Queries, keys and values as a projection leaves them: heads beside features, strided."""
    strided = {
        name: call[name].transpose(1, 2).contiguous().transpose(1, 2)
        for name in ("query", "key", "value")
    }
    assert not strided["query"].is_contiguous()
    return call | strided


def without_heads(call: dict) -> dict:
    """The same call with heads and sequences in one dimension."""
    flat = {name: call[name].flatten(0, 1) for name in ("query", "key", "value")}
    mask = call.get("attn_mask")
    if mask is not None and mask.ndim > 2:
        flat["attn_mask"] = mask.expand(BATCH, HEADS, -1, -1).flatten(0, 1)
    return call | flat


def reduce(call: dict, stimulus: Stimulus = STIMULUS) -> tuple[LayerAttention, Tensor | None]:
    attending = SelfAttention.of(stimulus.tokens.shape, **call)
    assert attending is not None
    return attending.reduce(stimulus)


# Of a call, what decides where it attends.
ARGUMENTS = ("query", "key", "attn_mask", "is_causal", "scale")


def check(found: LayerAttention, call: dict) -> None:
    """Compares with sums over the whole softmax, as means over queries."""
    asked = {name: call[name] for name in ARGUMENTS if name in call}
    weights, visible = pattern(**asked)
    visible = visible.expand(BATCH, HEADS, -1, -1)
    in_view = visible.sum(-1)
    for name, target in STIMULUS.targets.items():
        entries = list(zip(target.sequence, target.query, target.key, strict=True))
        on_target, uniform = torch.zeros(2, BATCH, HEADS, dtype=torch.float64)
        for sequence, query, key in entries:
            on_target[sequence] += weights[sequence, :, query, key]
            seen = visible[sequence, :, query, key]
            uniform[sequence] += seen / in_view[sequence, :, query].clamp(min=1)
        queries = target.queries[:, None]
        for what, sums in (("mass", on_target), ("uniform", uniform)):
            got = getattr(found, what)[name]
            torch.testing.assert_close(
                (got / queries).double(), sums / queries, atol=MASS, rtol=0, msg=f"{what} {name}"
            )
    surprise = -torch.special.xlogy(weights, weights).sum(-1)[..., 1:]
    largest = in_view.clamp(min=1).double().log()[..., 1:]
    normalized = (surprise / largest).where(largest > 0, 0.0)
    for what, values in (
        ("entropy", surprise),
        ("normalized_entropy", normalized),
        ("uniform_entropy", largest),
    ):
        got = getattr(found, what) / (POSITIONS - 1)
        torch.testing.assert_close(got.double(), values.mean(-1), atol=ENTROPY, rtol=0, msg=what)
    assert found.causal == (not visible.triu(1).any())
    scores, visible = masked_scores(**asked)
    top = scores.masked_fill(~visible, float("-inf")).amax((-1, -2))
    below = (top - found.largest_logit.double()).where(top.isfinite(), 0.0)
    assert below.min() > -ENTROPY
    assert (below <= in_view.amax(-1).double().log() + ENTROPY).all()


def hold(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets only so many bytes be held at a time."""
    for module in (projected, rows):
        monkeypatch.setattr(module, "BLOCK_BYTES", size)


@pytest.mark.parametrize("name", CALLS)
def test_against_the_whole_softmax(name):
    check(reduce(CALLS[name])[0], CALLS[name])


@pytest.mark.parametrize("name", CALLS)
def test_strided_inputs(name):
    check(reduce(in_memory_order_of_projections(CALLS[name]))[0], CALLS[name])


@pytest.mark.parametrize(
    "name",
    ["causal flag", "no mask", "sliding window", "left padding", "biases by distance", "bfloat16"],
)
def test_inputs_without_a_dimension_of_heads(name):
    check(reduce(without_heads(CALLS[name]))[0], CALLS[name])


@pytest.mark.parametrize("name", CALLS)
def test_a_few_queries_and_pairs_at_a_time(name, monkeypatch):
    hold(4 * BATCH * HEADS * POSITIONS * 5, monkeypatch)
    check(reduce(CALLS[name])[0], CALLS[name])
    hold(1, monkeypatch)
    check(reduce(CALLS[name])[0], CALLS[name])


@pytest.mark.parametrize("name", [name for name in CALLS if "bias" not in name])
def test_kernel_and_blocks_agree(name, monkeypatch):
    call = SelfAttention.of(STIMULUS.tokens.shape, **CALLS[name])
    assert call is not None
    used = []
    real = projected.log_sum_exp
    monkeypatch.setattr(projected, "log_sum_exp", lambda *a, **k: used.append(1) or real(*a, **k))
    by_kernel, _ = call.reduce(STIMULUS)
    assert used, "a kernel was expected to do this"
    monkeypatch.setattr(kernels, "_KERNELS", {})
    hold(4 * BATCH * HEADS * POSITIONS * 5, monkeypatch)
    by_blocks, _ = call.reduce(STIMULUS)
    check(by_blocks, CALLS[name])
    for target in STIMULUS.targets:
        torch.testing.assert_close(
            by_kernel.mass[target], by_blocks.mass[target], atol=1e-5, rtol=0
        )
    torch.testing.assert_close(by_kernel.entropy, by_blocks.entropy, atol=1e-4, rtol=0)


@pytest.mark.parametrize("wrong", ["raises", "is wrong"])
def test_a_kernel_that_does_not_do_what_it_should_is_not_used(wrong, monkeypatch):
    def kernel(query, key, value, *, bias, is_causal, scale):
        if wrong == "raises":
            raise RuntimeError("not on this machine")
        return query, query.sum(-1)

    monkeypatch.setattr(kernels, "_KERNELS", {"cpu": kernel})
    for name in ("causal flag", "sliding window"):
        check(reduce(CALLS[name])[0], CALLS[name])


@pytest.mark.parametrize("masked", [True, False])
def test_the_cuda_kernel_is_called_as_its_schema_says(masked):
    """Shapes only: nothing here can run it."""
    query = torch.empty(2, 3, 40, 16, device="meta")
    bias = torch.empty(1, 1, 40, 40, device="meta") if masked else None
    mixed, log_sum_exp = kernels._cuda_efficient(
        query, query, query, bias=bias, is_causal=not masked, scale=0.3
    )
    assert mixed.shape == query.shape
    assert log_sum_exp.shape == query.shape[:-1]


@pytest.mark.parametrize("name", CALLS)
def test_an_output_that_falls_out_is_the_callers_own(name):
    call = {k: v for k, v in CALLS[name].items() if k != "dropout_p"}
    _, output = reduce(call, replace(STIMULUS, entropy=False))
    if output is not None:
        expected = F.scaled_dot_product_attention(**call)
        torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_the_largest_logit_is_exact_where_scores_are_large(name, monkeypatch):
    """Whatever else the query with the largest score attends to weighs nothing beside it."""
    call = CALLS[name] | {"scale": 30.0}
    scores, visible = masked_scores(**{k: v for k, v in call.items() if k in ARGUMENTS})
    expected = scores.masked_fill(~visible, float("-inf")).amax((-1, -2))
    assert expected.min() > 50
    for kernel in (True, False):
        if not kernel:
            monkeypatch.setattr(kernels, "_KERNELS", {})
        found, _ = reduce(call)
        torch.testing.assert_close(found.largest_logit.double(), expected, rtol=1e-5, atol=0)


def test_patterns_alone_show_no_logits():
    weights = torch.full((BATCH, HEADS, POSITIONS, POSITIONS), 1 / POSITIONS)
    assert Pattern(weights=weights).reduce(STIMULUS)[0].largest_logit is None


def test_without_entropy_the_rest_is_the_same():
    plain, _ = reduce(CALLS["causal flag"], replace(STIMULUS, entropy=False))
    full, _ = reduce(CALLS["causal flag"])
    assert plain.entropy is plain.normalized_entropy is plain.largest_logit is None
    for target in STIMULUS.targets:
        torch.testing.assert_close(plain.mass[target], full.mass[target])
    torch.testing.assert_close(plain.uniform_entropy, full.uniform_entropy)


@pytest.mark.parametrize("low", [float("-inf"), LOWEST, torch.finfo(torch.float16).min, -1e4])
@pytest.mark.parametrize("shape", [(POSITIONS, POSITIONS), (1, 1, POSITIONS, POSITIONS)])
def test_explicit_causal_masks_are_recognised(low, shape):
    for mask in (causal_mask(), additive(causal_mask(), low)):
        call = SelfAttention.of(STIMULUS.tokens.shape, **inputs(), attn_mask=mask.view(shape))
        assert call is not None
        assert call.bias is None
        assert call.is_causal


@pytest.mark.parametrize(
    "mask",
    [
        causal_mask() & (distance() < POSITIONS - 1),
        causal_mask() | (distance() == -5),
        left_padding(),
        alibi(),
        additive(causal_mask(), -50.0),
        torch.ones(POSITIONS, POSITIONS, dtype=torch.bool),
    ],
    ids=["one key less", "later keys", "padding", "biases", "later keys dimmed", "everything"],
)
def test_other_masks_are_not_taken_for_causal(mask):
    call = SelfAttention.of(STIMULUS.tokens.shape, **inputs(), attn_mask=mask)
    assert call is not None
    assert not call.is_causal
    assert call.bias is not None


def test_rows_that_see_nothing_count_nothing():
    """Of a sequence that is all padding nothing is seen, and nothing is NaN."""
    mask = causal_mask() & torch.tensor([True, True, False]).view(BATCH, 1, 1, 1)
    found, _ = reduce(inputs() | {"attn_mask": mask})
    for values in (*found.mass.values(), *found.uniform.values(), found.entropy):
        assert values[2].eq(0).all()
        assert values[:2].gt(0).all()
    assert found.normalized_entropy[2].eq(0).all()
    assert found.largest_logit[2].eq(0).all()


@pytest.mark.parametrize("mask", [None, causal_mask() & (distance() < 6)], ids=["causal", "window"])
def test_not_a_number_is_never_taken_for_no_attention(mask):
    call = inputs() | ({"is_causal": True} if mask is None else {"attn_mask": mask})
    call["query"][:, 1] = float("nan")
    found, _ = reduce(call)
    told = (found.entropy, found.normalized_entropy, found.largest_logit)
    for values in (*found.mass.values(), *told):
        assert values[:, 1].isnan().all()
        assert values[:, [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize(
    "shape",
    [(BATCH, HEADS, 1, FEATURES), (2 * BATCH, HEADS, POSITIONS, FEATURES), (POSITIONS, FEATURES)],
    ids=["one query", "another batch", "two dimensions"],
)
def test_what_is_no_self_attention_over_the_stimulus_is_passed_over(shape):
    query = random(*shape)
    assert SelfAttention.of((BATCH, POSITIONS), query, query, query) is None


def test_attention_to_other_keys_is_passed_over():
    query, other = random(BATCH, HEADS, POSITIONS, FEATURES), random(BATCH, HEADS, 7, FEATURES)
    assert SelfAttention.of((BATCH, POSITIONS), query, other, other) is None


def test_joined_parts_are_the_whole():
    whole, _ = reduce(CALLS["causal flag"])
    parts = []
    for start, stop in ((0, 1), (1, BATCH)):
        cut = {k: v[start:stop] for k, v in inputs().items()} | {"is_causal": True}
        part, _ = reduce(cut, STIMULUS.rows(start, stop, torch.device("cpu")))
        parts.append(part.at(3, "h.3"))
    joined = LayerAttention.join(parts)
    assert (joined.layer, joined.module, joined.causal) == (3, "h.3", True)
    for target in STIMULUS.targets:
        torch.testing.assert_close(joined.mass[target], whole.mass[target])
        torch.testing.assert_close(joined.uniform[target], whole.uniform[target])
    torch.testing.assert_close(joined.entropy, whole.entropy)
    torch.testing.assert_close(joined.normalized_entropy, whole.normalized_entropy)
    torch.testing.assert_close(joined.largest_logit, whole.largest_logit)
    assert not LayerAttention.join([parts[0], replace(parts[1], causal=False)]).causal


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                # Views of fewer elements are no new memory.
                self.elements = max(self.elements, min(value.numel(), stored(value)))
        return out


def stored(value: Tensor) -> int:
    return value.untyped_storage().nbytes() // value.element_size()


def attend_in_a_window(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    position = torch.arange(query.shape[-2])
    back = position[:, None] - position
    return F.scaled_dot_product_attention(query, key, value, attn_mask=(back >= 0) & (back < 100))


@pytest.mark.parametrize("attend", [None, attend_in_a_window], ids=["causal", "window"])
def test_no_pattern_is_ever_held(attend, monkeypatch):
    context, heads, batch = 1024, 4, 2
    hold(2**20, monkeypatch)
    model = find_language_model(
        AttentionOnly(context=context, layers=1, width=32, heads=heads, attend=attend)
    )
    stimulus = repeated(vocab_size=1024, sequences=batch, context=context, bos=None, seed=0)
    stimulus = replace(stimulus, tokens=stimulus.tokens % 64)
    with Largest() as largest:
        observation = observe(model, stimulus, attention=True)
    assert observation.attention is not None
    # One mask of positions by positions is the caller's own.
    pattern_of_one_head = context * context
    assert largest.elements <= pattern_of_one_head
    assert largest.elements < batch * heads * pattern_of_one_head / 4
    if attend is None:
        assert largest.elements < pattern_of_one_head / 2
