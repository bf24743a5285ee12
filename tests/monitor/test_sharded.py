"""Models that `fully_shard` divided between processes: training goes on bit for bit as without us,
whatever state they are measured in, and where one cannot be measured that is said before it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn, optim
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from monitor.anatomy import NotALanguageModelError, find_language_model
from monitor.measure import Monitor, measure
from monitor.ranks import is_sharded
from monitor.tasks import ModularAddition
from tests.callbacks.tiny import OBSERVING
from tests.models import AttentionOnly
from tests.models.sums import random_pairs
from tests.processes import came_through, run


class Fickle(AttentionOnly):
    """With dropout; breaks between its blocks when told to."""

    broken = False

    def forward(self, tokens):
        residual = self.token(tokens) + self.position(torch.arange(tokens.shape[1]))
        residual = residual + self.blocks[0](nn.functional.dropout(residual, 0.1, self.training))
        if self.broken:
            raise RuntimeError("planted in the model")
        return self.unembedding(self.norm(residual + self.blocks[1](residual)))


class Wrapped(nn.Module):
    """Gives a loss, and holds the language model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch):
        if not isinstance(batch, dict):
            raise TypeError("expected a dictionary")
        return self.model(batch["tokens"]).logsumexp(-1).mean()


def built() -> Fickle:
    torch.manual_seed(0)
    return Fickle()


def sharded(model: nn.Module, **options) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def is_gathered(model: nn.Module) -> bool:
    return not all(isinstance(parameter, DTensor) for parameter in model.parameters())


def weights(model: nn.Module) -> list[torch.Tensor]:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return [parameter.full_tensor().detach() for parameter in model.parameters()]


def tokens(seed: int) -> torch.Tensor:
    # Each process trains on data of its own.
    generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    return torch.randint(64, (4, 64), generator=generator)


def train(
    model: nn.Module, between: Callable[[int], None], *, micro: int = 1, evaluate: bool = False
) -> list[torch.Tensor]:
    """Three steps of `micro` batches each; `between` after every batch. What training leaves."""
    torch.manual_seed(dist.get_rank())
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    between(0)
    for batch in range(1, 3 * micro + 1):
        if micro > 1:
            model.set_requires_gradient_sync(batch % micro == 0)
            model.set_reshard_after_backward(batch % micro == 0)
        model(tokens(batch)).logsumexp(-1).mean().backward()
        if batch % micro == 0:
            optimizer.step()
            optimizer.zero_grad()
        if evaluate:
            with torch.no_grad():
                model(tokens(0))
        between(batch)
    return [*weights(model), torch.get_rng_state()]


def undisturbed(root: Path, wrap: Callable[[], nn.Module], **training) -> None:
    """Training is the same with a measurement after every batch as without any."""
    expected = train(wrap(), lambda batch: None, **training)
    model = wrap()
    with Monitor(root, run="r", sequences=4, probes=OBSERVING) as watch:

        def between(batch: int) -> None:
            assert watch.measure(model, step=batch).failures == ()
            assert not is_gathered(model)

        left = train(model, between, **training)
    assert len(left) == len(expected)
    assert all(map(torch.equal, left, expected))


def plain(root: Path) -> None:
    undisturbed(root, lambda: sharded(built()))


def accumulating(root: Path) -> None:
    """Measured between batches whose gradients nobody has reduced yet, and with all gathered."""
    undisturbed(root, lambda: sharded(built()), micro=2)


def evaluating(root: Path) -> None:
    """Whoever evaluates leaves the weights of the root gathered."""
    undisturbed(root, lambda: sharded(built()), evaluate=True)


def never_let_go(root: Path) -> None:
    undisturbed(root, lambda: sharded(built(), reshard_after_forward=False))


def in_half_precision(root: Path) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    undisturbed(root, lambda: sharded(built(), mp_policy=policy))


def replicated_too(root: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards"))
    undisturbed(root, lambda: sharded(built(), mesh=mesh))


def one_module(root: Path) -> None:
    undisturbed(root, lambda: fully_shard(built()))


def breaks(root: Path) -> None:
    """A pass that breaks off halfway leaves nothing behind."""
    expected = train(sharded(built()), lambda batch: None)
    model = sharded(built())
    with Monitor(root, run="r", sequences=4, probes=OBSERVING) as watch:
        found = []

        def between(batch: int) -> None:
            model.broken = batch in {1, 2}
            found.append([failure.part for failure in watch.measure(model, step=batch).failures])
            model.broken = False
            assert not is_gathered(model)

        left = train(model, between)
    assert all(map(torch.equal, left, expected))
    if dist.get_rank() == 0:
        assert found == [[], ["induction", "in_context"], ["induction", "in_context"], []]


def refused_before_training(root: Path) -> None:
    """Who tries again without us after an error trains as if we had not been."""
    expected = train(sharded(built()), lambda batch: None)
    model = sharded(built())
    with pytest.raises(ValueError, match="context=512"):
        Monitor(root, run="r", context=512).prepare(model, 0)
    assert not is_gathered(model)
    model.broken = True
    with pytest.raises(NotALanguageModelError, match="planted in the model"):
        Monitor(root, run="r").prepare(model, 0)
    model.broken = False
    assert not is_gathered(model)
    assert all(map(torch.equal, train(model, lambda batch: None), expected))


def inside_another(root: Path) -> None:
    """The root is no language model, and holds one that is sharded for itself."""

    def steps(watch: Monitor | None) -> list[torch.Tensor]:
        whole = fully_shard(Wrapped(sharded(built())))
        torch.manual_seed(0)
        optimizer = optim.AdamW(whole.parameters(), lr=1e-2)
        for step in range(3):
            if watch is not None:
                assert watch.measure(whole, step=step).failures == ()
            whole({"tokens": tokens(step)}).backward()
            optimizer.step()
            optimizer.zero_grad()
        return weights(whole)

    with Monitor(root, run="r", sequences=4, probes=OBSERVING) as watch:
        assert all(map(torch.equal, steps(watch), steps(None)))


def once(root: Path) -> None:
    """`measure` gives every process the tables of one that holds the whole model."""
    expected = measure(built(), sequences=4)
    model = sharded(built())
    found = measure(model, sequences=4)
    assert not is_gathered(model)
    for table, frame in expected.items():
        numbers = frame.select_dtypes("number").columns
        assert (frame[numbers] - found[table][numbers]).abs().max().max() <= 1e-6
    assert found["induction"]["validity"].eq("ok").all()


def answering(root: Path) -> None:
    """Each process answers a part of a task's questions; weights nobody holds are not told of."""
    task = ModularAddition(11, train=random_pairs(11))
    expected = measure(built(), probes=["grokking"], task=task)["grokking"].iloc[0]
    model = sharded(built())
    with Monitor(root, run="r", probes=["grokking"], task=task) as watch:
        told = watch.measure(model, step=0)
    assert told.failures == ()
    assert not is_gathered(model)
    if dist.get_rank() == 0:
        row = told.frame("grokking").iloc[0]
        of_weights = ["weight_norm", "gini_embedding", "gini_unembedding"]
        assert row[of_weights].isna().all()
        assert expected[of_weights].notna().all()
        for field in ("train_loss", "held_out_loss", "restricted_loss", "gini_logits"):
            assert row[field] == pytest.approx(expected[field], abs=1e-6)


def known_when_gathered(root: Path) -> None:
    model = sharded(built(), reshard_after_forward=False)
    with torch.no_grad():
        model(tokens(0))
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert is_sharded(model)
    assert (
        find_language_model(model).parameter_count == find_language_model(built()).parameter_count
    )


def divided_twice(root: Path) -> None:
    """Between the processes and within the layers."""
    for sizes in ((1, 2), (2, 1)):
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("data", "tensor"))
        model = built()
        plan = {"blocks.0.inputs": ColwiseParallel(), "blocks.0.output": RowwiseParallel()}
        parallelize_module(model, mesh["tensor"], plan)
        model = sharded(model, mesh=mesh["data"])
        with pytest.raises(ValueError, match=r"within its layers \(tensor parallelism\)"):
            Monitor(root, run="r").prepare(model, 0)
        with pytest.raises(ValueError, match=r"within its layers \(tensor parallelism\)"):
            measure(model)


SCENARIOS = {
    each.__name__: each
    for each in (
        plain,
        accumulating,
        evaluating,
        never_let_go,
        in_half_precision,
        replicated_too,
        one_module,
        breaks,
        refused_before_training,
        inside_another,
        once,
        answering,
        known_when_gathered,
        divided_twice,
    )
}


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    run(SCENARIOS, 2, folder)
    return folder


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_process_comes_through(several, name):
    assert came_through(several, name) == {"yes"}
