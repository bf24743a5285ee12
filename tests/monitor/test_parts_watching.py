"""What passes through a model is seen by its name, in passing order, and no longer than needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monitor.parts import SITES, Parts, activations, watch
from tests.monitor.test_parts import (
    ALL,
    LAYERS,
    TOKENS,
    Nano,
    build,
    found,
    hugging_face,
    randomised,
)
from tests.monitor.test_parts import pytestmark as deprecated
from tests.monitor.test_untouched import state

pytestmark = deprecated


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return hugging_face("llama", "sdpa")


def sites_of(parts: Parts) -> list[tuple[str, int]]:
    seen: list[tuple[str, int]] = []
    watch(parts, TOKENS, lambda site, layer, tensor: seen.append((site, layer)))
    return seen


def test_what_passes_is_seen_in_order(llama):
    in_block = ["residual_before", "attention_input", "query", "key", "value", "mixed"]
    in_block += ["attention_write", "mlp_input", "mlp_pre", "mlp_post", "mlp_write"]
    in_block += ["residual_after"]
    ends = [("unembedding_input", -1), ("unembedding_output", -1)]
    seen = sites_of(found(llama))
    assert sorted(seen) == sorted([(s, i) for i in range(LAYERS) for s in in_block] + ends)
    assert [layer for _, layer in seen] == [0] * len(in_block) + [1] * len(in_block) + [-1, -1]
    assert {site for site, _ in seen} < set(SITES)


def test_what_is_seen_is_what_the_models_own_hooks_see(llama):
    parts = found(llama)
    seen = activations(parts, TOKENS)
    own: dict[str, Tensor] = {}
    hooks = [
        llama.model.layers[1].mlp.down_proj.register_forward_pre_hook(
            lambda _, given: own.update(mlp_post=given[0])
        ),
        llama.model.layers[1].mlp.act_fn.register_forward_pre_hook(
            lambda _, given: own.update(mlp_pre=given[0])
        ),
        llama.model.layers[1].mlp.register_forward_hook(
            lambda _, __, made: own.update(mlp_write=made)
        ),
        llama.model.layers[1].self_attn.register_forward_hook(
            lambda _, __, made: own.update(attention_write=made[0])
        ),
        llama.model.layers[1].register_forward_hook(
            lambda _, __, made: own.update(residual_after=made)
        ),
    ]
    with torch.no_grad():
        llama(TOKENS)
    for hook in hooks:
        hook.remove()
    assert len(own) == len(hooks)
    for site, tensor in own.items():
        assert torch.equal(seen[site, 1], tensor)


def test_the_pass_ends_when_everything_was_seen():
    model = randomised(lambda: Nano(flash=True))
    parts = found(model)
    ran: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    kept = activations(parts, TOKENS, sites=["mlp_pre"], layers=[0])
    assert list(kept) == [("mlp_pre", 0)]
    assert "h.0.up" in ran or "h.0.ln_2" in ran
    assert not any(name.startswith("h.1") for name in ran)
    assert activations(parts, TOKENS, sites=["embedding_norm_input"]) == {}


def test_an_error_of_who_sees_is_theirs(llama):
    parts = found(llama)

    def see(*_: Any) -> None:
        raise ZeroDivisionError

    before = state(llama)
    with pytest.raises(ZeroDivisionError):
        watch(parts, TOKENS, see)
    assert state(llama) == before
    assert len(sites_of(parts)) > 0


def test_sites_and_layers_that_do_not_exist(llama):
    parts = found(llama)
    with pytest.raises(ValueError, match=r"sites=\['neurons'\]: expected some of residual_before"):
        activations(parts, TOKENS, sites=["residual_before", "neurons"])
    with pytest.raises(ValueError, match=r"layers=\[7\]: expected layers of a model with 2 blocks"):
        activations(parts, TOKENS, layers=[0, 7])


def logits(parts: Parts, see: Any, *, layers: list[int]) -> Tensor:
    """The unembedding's output in a pass in which tensors are exchanged."""
    outputs: list[Tensor] = []

    def exchange(site: str, layer: int, tensor: Tensor) -> Tensor | None:
        if site == "unembedding_output":
            outputs.append(tensor.clone())
            return None
        return see(site, tensor) if layer in layers else None

    watch(parts, TOKENS, exchange)
    return outputs[-1]


@pytest.mark.parametrize(("name", "how"), ALL)
def test_a_tensor_may_be_exchanged_and_the_model_goes_on_with_it(name, how):
    """For a copy nothing changes; for another one all that comes later does, at every site."""
    parts = found(build(name, how))
    if parts.unembedding is None:
        pytest.fail("a model without an unembedding shows nothing here")
    intact = logits(parts, lambda *_: None, layers=[])
    assert torch.equal(logits(parts, lambda _, tensor: tensor.clone(), layers=[0, 1]), intact)
    written_out = "pattern" in parts.blocks[0].taps
    for site in parts.blocks[0].taps:
        changed = logits(
            parts, lambda at, t, site=site: t * 1.5 if at == site else None, layers=[0]
        )
        # Where no one function makes attention of them, these are seen too late.
        if site in {"query", "key", "value"} and written_out:
            assert torch.equal(changed, intact), site
        else:
            assert not torch.equal(changed, intact), site


def test_what_takes_a_tensors_place_has_its_shape(llama):
    parts = found(llama)
    expected = r"has shape \[3, 11, 2\]; expected \[3, 11, 32\], that of what passed"
    with pytest.raises(ValueError, match=expected):
        watch(parts, TOKENS, lambda site, *_: TOKENS.new_zeros(3, 11, 2), sites=["attention_write"])
