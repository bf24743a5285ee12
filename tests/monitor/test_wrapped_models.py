"""Models that something is wrapped around: compiled, distributed, checkpointed, adapted, autocast
or in half precision. Their tables are those of the model inside, and their training is the same
bit for bit with and without measurements, with nothing compiled again.
"""

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

from monitor.measure import measure
from monitor.probes import induction
from tests.models import FAMILIES, VOCABULARY, NanoGPT, gpt2, llama
from tests.models.codebases import NanoBlock

# Warnings of others about themselves, in training as in measuring.
pytestmark = [
    # dynamo's, where a graph takes in what another one has computed.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a:UserWarning"),
    # torch's, of reentrant checkpoints that are called without gradients.
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
    # transformers', of names that peft calls it by.
    pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning"),
]

CONTEXT, SEQUENCES = 32, 3
TEXT = torch.randint(VOCABULARY, (SEQUENCES, CONTEXT), generator=torch.Generator().manual_seed(1))


def table(model: nn.Module) -> pd.DataFrame:
    tables = measure(model, text=TEXT, probes=["induction"], context=CONTEXT, sequences=SEQUENCES)
    assert (tables["induction"]["validity"] == "ok").all()
    return tables["induction"]


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    inputs = {"input_ids": tokens, "labels": tokens}
    if any(isinstance(module, NanoGPT) for module in model.modules()):
        inputs = {"idx": tokens, "targets": tokens}
    output = model(**inputs)
    return output[1] if isinstance(output, tuple) else output.loss


def compiled(model: nn.Module, **options: bool) -> nn.Module:
    # The backend is as fast to compile with as one can be that has a backward pass of its own.
    return torch.compile(model, backend="aot_eager", **options)


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="aot_eager")
    return model


def compiled_by_blocks(model: nn.Module) -> nn.Module:
    blocks = model.transformer["h"]
    for layer, block in enumerate(blocks):
        blocks[layer] = compiled(block)
    return model


def distributed(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def checkpointed_by_hugging_face(model: nn.Module, *, reentrant: bool) -> nn.Module:
    options = {"use_reentrant": reentrant}
    # Its name in recent versions; the older one warns there.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(options)
    return model


class Checkpointed(nn.Module):
    """A block whose activations are computed again for the backward pass, at every call."""

    def __init__(self, block: nn.Module, *, reentrant: bool) -> None:
        super().__init__()
        self.block = block
        self.reentrant = reentrant

    def forward(self, residual: Tensor) -> Tensor:
        return checkpoint(self.block, residual, use_reentrant=self.reentrant)


def checkpointed(model: nn.Module, *, reentrant: bool) -> nn.Module:
    blocks = model.transformer["h"]
    for layer, block in enumerate(blocks):
        blocks[layer] = Checkpointed(block, reentrant=reentrant)
    return model


def checkpointed_by_torch(model: nn.Module, implementation: CheckpointImpl) -> nn.Module:
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=partial(checkpoint_wrapper, checkpoint_impl=implementation),
        check_fn=lambda module: isinstance(module, NanoBlock),
    )
    return model


def adapted(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = ["c_attn"] if hasattr(model, "transformer") else ["q_proj", "v_proj"]
    # By default they begin as nothing.
    config = LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=targets,
        lora_dropout=0.1,
        init_lora_weights=False,
        fan_in_fan_out=hasattr(model, "transformer"),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(model, config)


by_hand = partial(NanoGPT, flash=False)
by_kernel = partial(NanoGPT, flash=True)


@dataclass(frozen=True, kw_only=True)
class Wrapped:
    """A model of which there is a plain one, and what is wrapped around it."""

    build: Callable[[], nn.Module]
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model
    autocast: bool = False
    # Whether what is wrapped around changes what is computed.
    changes: bool = False


WRAPPED = {
    "compiled": Wrapped(build=by_kernel, wrap=compiled),
    "compiled as one graph": Wrapped(build=by_hand, wrap=partial(compiled, fullgraph=True)),
    "compiled in place": Wrapped(build=by_hand, wrap=compiled_in_place),
    "compiled block by block": Wrapped(build=by_kernel, wrap=compiled_by_blocks),
    "compiled, of Hugging Face": Wrapped(build=llama, wrap=partial(compiled, fullgraph=True)),
    "distributed": Wrapped(build=gpt2, wrap=distributed),
    "distributed and compiled": Wrapped(
        build=by_kernel, wrap=lambda model: compiled(distributed(model))
    ),
    "checkpointed by Hugging Face": Wrapped(
        build=llama, wrap=partial(checkpointed_by_hugging_face, reentrant=False)
    ),
    "checkpointed by Hugging Face, reentrant": Wrapped(
        build=gpt2, wrap=partial(checkpointed_by_hugging_face, reentrant=True)
    ),
    "checkpointed": Wrapped(build=by_hand, wrap=partial(checkpointed, reentrant=False)),
    "checkpointed, reentrant": Wrapped(build=by_kernel, wrap=partial(checkpointed, reentrant=True)),
    "checkpointed by torch": Wrapped(
        build=by_kernel,
        wrap=partial(checkpointed_by_torch, implementation=CheckpointImpl.NO_REENTRANT),
    ),
    "checkpointed by torch, reentrant": Wrapped(
        build=by_hand,
        wrap=partial(checkpointed_by_torch, implementation=CheckpointImpl.REENTRANT),
    ),
    "in an autocast region": Wrapped(build=gpt2, autocast=True),
    "compiled, in an autocast region": Wrapped(build=by_kernel, wrap=compiled, autocast=True),
    "with adapters of low rank": Wrapped(build=gpt2, wrap=adapted, changes=True),
    "with adapters of low rank, checkpointed": Wrapped(
        build=llama,
        wrap=lambda model: adapted(checkpointed_by_hugging_face(model, reentrant=False)),
        changes=True,
    ),
    "checkpointed and compiled": Wrapped(
        build=by_hand, wrap=lambda model: compiled(checkpointed(model, reentrant=False))
    ),
}


@pytest.fixture(autouse=True, scope="module")
def one_process(tmp_path_factory) -> Iterator[None]:
    rendezvous = tmp_path_factory.mktemp("distributed") / "rendezvous"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def trained(name: str, *, watched: bool) -> dict:
    """Three steps with dropout. What is watched is measured between forward and backward pass, and
    before the first and after the last step, where its table is compared with the plain model's.
    """
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    one = WRAPPED[name]
    plain = one.build().train()
    # The same parameters, in a module that nothing is wrapped around.
    inside = copy.deepcopy(plain)
    for mine, other in zip(inside.parameters(), plain.parameters(), strict=True):
        mine.data = other.data
    model = one.wrap(plain)

    def compare() -> None:
        if watched and not one.changes:
            pd.testing.assert_frame_equal(table(model), table(inside), check_exact=True)

    optimizer = torch.optim.AdamW(model.parameters())
    losses = []
    compare()
    for _ in range(3):
        tokens = torch.randint(VOCABULARY, (4, CONTEXT))
        with torch.autocast("cpu", torch.bfloat16, enabled=one.autocast):
            # The weights that were cast for the first pass are kept for the second.
            loss = (loss_of(model, tokens) + loss_of(model, tokens)) / 2
            if watched:
                table(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    compare()
    return {
        "losses": losses,
        "weights": {key: value.tolist() for key, value in model.state_dict().items()},
        "streams": (random.random(), np.random.random(), torch.rand(1).item()),
        "compiled": {what: dict(counted) for what, counted in counters.items()},
    }


@pytest.mark.parametrize("name", WRAPPED)
def test_tables_are_those_of_the_model_inside_and_training_is_untouched(name):
    alone = trained(name, watched=False)
    torch._dynamo.reset()
    counters.clear()
    watched = trained(name, watched=True)
    assert alone["losses"][0] != alone["losses"][-1]
    assert ("compiled" in name) == ("stats" in alone["compiled"])
    for what, expected in alone.items():
        assert watched[what] == expected, what


def test_in_an_autocast_region_the_attention_without_it_is_measured():
    model = gpt2()
    expected = table(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = table(model)
        assert model(TEXT).logits.dtype == torch.bfloat16
    pd.testing.assert_frame_equal(found, expected, check_exact=True)


@pytest.mark.parametrize("build", [gpt2, llama])
def test_adapters_of_low_rank_count(build):
    """As in the model into whose weights they are merged."""
    model = adapted(build()).train()
    found = table(model)
    with model.disable_adapter():
        without = table(model)
    expected = table(copy.deepcopy(model).eval().merge_and_unload())
    assert list(found.columns) == list(expected.columns)
    for column in expected.select_dtypes("number"):
        assert found[column].tolist() == pytest.approx(expected[column].tolist(), abs=2e-5), column
    pd.testing.assert_frame_equal(without, table(build()), check_exact=True)
    assert (found["entropy"] - without["entropy"]).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox", "bloom", "gemma3"])
@pytest.mark.parametrize(
    ("dtype", "scores", "entropies"), [(torch.bfloat16, 3e-3, 1e-2), (torch.float16, 5e-4, 2e-3)]
)
def test_weights_in_half_precision(kind, dtype, scores, entropies):
    """As in the same model in single precision, to what half precision leaves of its scores."""
    model = FAMILIES[kind].build(initializer_range=0.25).to(dtype)
    found, expected = table(model), table(copy.deepcopy(model).float())
    for field in induction.SPEC.fields:
        precision = entropies if "entropy" in field.name else scores
        if field.name == "largest_logit":
            # Numbers of half precision have as many digits however large they are.
            precision = entropies * float(expected[field.name].abs().max())
        for column in (field.name, f"{field.name}_stderr"):
            wanted = expected[column].tolist()
            assert found[column].tolist() == pytest.approx(wanted, abs=precision, rel=0), column
        pd.testing.assert_series_equal(found[f"{field.name}_null"], expected[f"{field.name}_null"])
    assert not found["entropy"].equals(expected["entropy"]), "the passes were in half precision"
    assert expected["normalized_entropy"].mean() < 0.9
