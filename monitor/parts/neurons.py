"""Finding an MLP's matrices from what it writes, backwards."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from monitor.anatomy import LanguageModel
from monitor.parts.blocks import Neurons
from monitor.parts.linears import as_linear
from monitor.parts.recording import NotFoundError, Recording, Seen


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Wide:
    """As many columns of a linear map's output as there are neurons."""

    given: Seen
    output: Seen
    columns: Tensor

    @property
    def values(self) -> Tensor:
        return self.output.rows[..., self.columns.to(self.output.rows.device)]


def find_neurons(model: LanguageModel, recording: Recording, written: Seen) -> Neurons:
    """The MLP that writes `written`: its last matrix, and where its pre-activations come from.

    Raises `NotFoundError` where what writes it is no one matrix (a mixture of experts, say).
    """
    post = recording.before(written)
    try:
        out = as_linear(model, post, written)
    except NotFoundError as missing:
        raise NotFoundError(f"{missing}: the MLP's output is not that of one matrix") from missing
    gate, up = _pre(_wide(recording, post), post)
    source = gate or up
    return Neurons(
        out=out,
        up=None if up is None else as_linear(model, up.given, up.output),
        up_columns=None if up is None else up.columns,
        gate=None if gate is None else as_linear(model, gate.given, gate.output),
        gate_columns=None if gate is None else gate.columns,
        reads=None if source is None else source.given.tap,
        pre=None if source is None else source.output.tap,
        post=post.tap,
        writes=written.tap,
    )


def _pre(candidates: list[_Wide], post: Seen) -> tuple[_Wide | None, _Wide | None]:
    """The gate, where there is one, and what it gates (or what becomes the post-activations)."""
    found: list[tuple[float, _Wide | None, _Wide]] = [
        (roughness(up.values, post.rows), None, up) for up in candidates
    ]
    if not any(rough < 1 for rough, _, _ in found):
        found = [
            (gated_roughness(gate.values, up.values, post.rows), gate, up)
            for gate, up in itertools.permutations(candidates, 2)
        ]
    rough, gate, up = min(found, key=lambda one: one[0], default=(math.inf, None, None))
    return (gate, up) if rough < 1 else (None, None)


def _wide(recording: Recording, post: Seen) -> list[_Wide]:
    neurons = post.rows.shape[-1]
    found: list[_Wide] = []
    for given, output in recording.linears():
        times, rest = divmod(output.rows.shape[-1], neurons)
        # A gate and what it gates may be the two halves of one map's output.
        if rest == 0 and times in {1, 2}:
            halves = torch.arange(times * neurons).split(neurons)
            found += [_Wide(given=given, output=output, columns=half) for half in halves]
    return found


def gated_roughness(gate: Tensor, up: Tensor, post: Tensor) -> float:
    """Whether post is some smooth function of the gate, times up: below one."""
    # Where what is gated is small, the quotient is mostly rounding.
    usable = up.abs() > 1e-2 * up.abs().max()
    return roughness(gate[usable], post[usable].double() / up[usable].double(), post.dtype)


def roughness(pre: Tensor, post: Tensor, dtype: torch.dtype | None = None) -> float:
    """Below one where post, of numbers rounded as in `dtype`, is some smooth function of pre,
    number by number: sorted by pre, it goes up and down no more than a few times.
    """
    some = slice(None, None, max(1, pre.numel() // 4096))
    values, order = post.flatten()[some].double(), pre.flatten()[some].argsort()
    if not len(values) or float(values.max() - values.min()) == 0:
        return math.inf
    eps = torch.finfo(dtype or post.dtype).eps
    allowed = 4 * float(values.max() - values.min()) + 8 * eps * float(values.abs().sum())
    return float(values[order].diff().abs().sum()) / allowed
