"""The parts of a model that probes read: weights as the model now has them, and where to look.

Shapes: `head` query heads (the heads of grouped keys are repeated, once for each of their queries)
of `head_feature` numbers each; `neuron` units of an MLP; `feature` of the residual stream.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from monitor.anatomy import LanguageModel
from monitor.parts.flow import Tap
from monitor.parts.weights import Linear
from monitor.untouched import untouched


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Projection:
    """What makes queries, keys or values: `columns` of a linear map's output, in the order of head
    and head_feature; then, for some queries and keys, a `norm`; then times `scale`.
    """

    linear: Linear
    columns: Int[Tensor, "keyhead head_feature"]
    scale: float
    reads: Tap
    writes: Tap
    norm: str | None = None
    norm_columns: Int[Tensor, "keyhead head_feature"] | None = None

    def weights(self, heads: int) -> Float[Tensor, "head feature head_feature"]:
        """One matrix a query head."""
        weight, _ = self.linear.read()
        columns = self._repeated(heads).to(weight.device)
        return rearrange(weight[columns], "head head_feature feature -> head feature head_feature")

    def biases(self, heads: int) -> Float[Tensor, "head head_feature"]:
        """One vector a query head; zeros where the map has no bias."""
        weight, bias = self.linear.read()
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        return bias[self._repeated(heads).to(bias.device)]

    def normed(self, norm: str, columns: Int[Tensor, " column"]) -> Projection:
        """The same, with a norm after it."""
        norm_columns = columns.view_as(self.columns)
        return dataclasses.replace(self, norm=norm, norm_columns=norm_columns)

    def _repeated(self, heads: int) -> Int[Tensor, "head head_feature"]:
        return self.columns.repeat_interleave(heads // len(self.columns), dim=0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mixing:
    """What an attention makes of its mixed values: the `columns` of a linear map's input that are
    the heads' features.
    """

    linear: Linear
    columns: Int[Tensor, "head head_feature"]
    reads: Tap
    writes: Tap

    @property
    def weights(self) -> Float[Tensor, "head head_feature feature"]:
        """One matrix a head."""
        weight, _ = self.linear.read()
        return weight.T[self.columns.to(weight.device)]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Neurons:
    """An MLP: `out` reads the post-activations, `gate` (or `up`, where there is no gate) writes the
    pre-activations. A gate and what it gates may be columns of one map.
    """

    out: Linear
    up: Linear | None
    up_columns: Int[Tensor, " neuron"] | None
    gate: Linear | None
    gate_columns: Int[Tensor, " neuron"] | None
    reads: Tap | None
    pre: Tap | None
    post: Tap
    writes: Tap

    @property
    def pre_columns(self) -> Int[Tensor, " neuron"] | None:
        """Which of the numbers at `pre` are the pre-activations."""
        return self.up_columns if self.gate is None else self.gate_columns


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Write:
    """What is added to the residual stream: `scale` times the tensor at `tap`, which went through
    the module `norm` first where there is one.
    """

    tap: Tap
    scale: float
    norm: str | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Block:
    """One block. What was not found, or did not agree with the model's own pass, is None, and
    `reasons` says why.

    `attention_norm` and `mlp_norm` are the paths of the norms through which attention and MLP read
    the stream (None: they read it as it is); `parallel` says that the MLP does not read what the
    attention wrote; `stream_norms` are those of a block that norms the stream itself after each
    of the two writes.
    """

    layer: int
    path: str
    taps: Mapping[str, Tap]
    heads: int | None = None
    query: Projection | None = None
    key: Projection | None = None
    value: Projection | None = None
    mixing: Mixing | None = None
    neurons: Neurons | None = None
    attention_write: Write | None = None
    mlp_write: Write | None = None
    attention_norm: str | None = None
    mlp_norm: str | None = None
    stream_norms: tuple[str, str] | None = None
    parallel: bool = False
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def w_q(self) -> Float[Tensor, "head feature head_feature"] | None:
        """From what attention reads to queries, before their norm and rotation."""
        return _weights(self.query, self.heads)

    @property
    def w_k(self) -> Float[Tensor, "head feature head_feature"] | None:
        """From what attention reads to keys, before their norm and rotation."""
        return _weights(self.key, self.heads)

    @property
    def w_v(self) -> Float[Tensor, "head feature head_feature"] | None:
        """From what attention reads to values."""
        return _weights(self.value, self.heads)

    @property
    def b_q(self) -> Float[Tensor, "head head_feature"] | None:
        """Added to the queries."""
        return _biases(self.query, self.heads)

    @property
    def b_k(self) -> Float[Tensor, "head head_feature"] | None:
        """Added to the keys."""
        return _biases(self.key, self.heads)

    @property
    def b_v(self) -> Float[Tensor, "head head_feature"] | None:
        """Added to the values."""
        return _biases(self.value, self.heads)

    @property
    def w_o(self) -> Float[Tensor, "head head_feature feature"] | None:
        """From mixed values to what attention writes, before a norm on it."""
        return None if self.mixing is None else self.mixing.weights

    @property
    def b_o(self) -> Float[Tensor, " feature"] | None:
        """What attention writes whatever its heads do; zeros where the map has no bias."""
        return None if self.mixing is None else bias_of(self.mixing.linear)

    @property
    def w_in(self) -> Float[Tensor, "feature neuron"] | None:
        """Into the neurons; in a gated MLP that which is gated."""
        return None if self.neurons is None else into(self.neurons.up, self.neurons.up_columns)

    @property
    def w_gate(self) -> Float[Tensor, "feature neuron"] | None:
        """Into the pre-activations of a gated MLP; None also where an MLP has no gate."""
        return None if self.neurons is None else into(self.neurons.gate, self.neurons.gate_columns)

    @property
    def b_in(self) -> Float[Tensor, " neuron"] | None:
        """Added to what `w_in` makes; zeros where the map has no bias."""
        neurons = self.neurons
        return None if neurons is None else added(neurons.up, neurons.up_columns)

    @property
    def b_gate(self) -> Float[Tensor, " neuron"] | None:
        """Added to what `w_gate` makes; zeros where the map has no bias."""
        neurons = self.neurons
        return None if neurons is None else added(neurons.gate, neurons.gate_columns)

    @property
    def w_out(self) -> Float[Tensor, "neuron feature"] | None:
        """From post-activations to what the MLP writes, before a norm on it."""
        return None if self.neurons is None else self.neurons.out.read()[0].T

    @property
    def b_out(self) -> Float[Tensor, " feature"] | None:
        """What the MLP writes whatever its neurons do; zeros where the map has no bias."""
        return None if self.neurons is None else bias_of(self.neurons.out)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Parts:
    """The parts of a model. What was not found, or did not agree with the model's own pass, is
    None, and `reasons` (of the model, and of each block) say why.

    `final_norm` is the path of the norm on the stream before the unembedding, `embedding_norm` that
    of one between the embedding and the first block. The logits are the unembedding's output times
    `logit_scale`, capped by a tanh at `logit_cap`.
    """

    model: LanguageModel
    blocks: tuple[Block, ...]
    taps: Mapping[str, Tap]
    position_first: frozenset[Tap] = frozenset()
    embedding_map: Linear | None = None
    embedding_scale: float = 1.0
    embedding_norm: str | None = None
    unembedding_map: Linear | None = None
    final_norm: str | None = None
    logit_scale: float = 1.0
    logit_cap: float | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def none(cls, model: LanguageModel, why: str) -> Parts:
        """A model of which nothing could be found."""
        names = ("blocks", "embedding", "unembedding", "final_norm")
        return cls(model=model, blocks=(), taps={}, reasons=dict.fromkeys(names, why))

    @property
    def incomplete(self) -> bool:
        """Whether something was not found."""
        return bool(self.reasons) or any(block.reasons for block in self.blocks)

    @property
    def embedding(self) -> Float[Tensor, "vocabulary feature"] | None:
        """What a token puts into the residual stream (before `embedding_norm`, where there is)."""
        if self.embedding_map is None:
            return None
        return self.embedding_map.read()[0] * self.embedding_scale

    @property
    def unembedding(self) -> Float[Tensor, "vocabulary feature"] | None:
        """What makes logits of the final norm's output."""
        return None if self.unembedding_map is None else self.unembedding_map.read()[0]

    @property
    def unembedding_bias(self) -> Float[Tensor, " vocabulary"] | None:
        """Added to the logits; zeros where the unembedding has no bias."""
        return None if self.unembedding_map is None else bias_of(self.unembedding_map)

    def apply(
        self, path: str | None, given: Float[Tensor, "*shape feature"]
    ) -> Float[Tensor, "*shape feature"]:
        """What the module at `path` (a norm, say) makes of a tensor; for None, the tensor itself.

        Raises `AttributeError` where the model has no module there.
        """
        if path is None:
            return given
        module = self.model.module.get_submodule(path)
        with untouched(module):
            made: Tensor = module(given)
        return made

    def logits(self, stream: Float[Tensor, "*shape feature"]) -> Float[Tensor, "*shape vocabulary"]:
        """The logits to which a residual stream would lead if no block came after: those of the
        model for what its last block returns, and a logit lens for any other.

        Raises `ValueError` where final norm or unembedding was not found.
        """
        missing = [name for name in ("final_norm", "unembedding") if name in self.reasons]
        if missing or self.unembedding_map is None:
            why = "; ".join(f"{name}: {self.reasons[name]}" for name in missing)
            raise ValueError(f"no logits without final norm and unembedding: {why}")
        return self.unembed(self.apply(self.final_norm, stream))

    def unembed(
        self, normed: Float[Tensor, "*shape feature"]
    ) -> Float[Tensor, "*shape vocabulary"]:
        """The logits that the unembedding, its scale and its cap make of the final norm's output.

        Raises `ValueError` where the unembedding was not found.
        """
        if self.unembedding_map is None:
            raise ValueError(f"no unembedding: {self.reasons.get('unembedding')}")
        logits = self.logit_scale * F.linear(normed, *self.unembedding_map.read())
        if self.logit_cap is None:
            return logits
        return self.logit_cap * (logits / self.logit_cap).tanh()


def _weights(projection: Projection | None, heads: int | None) -> Tensor | None:
    return None if projection is None or heads is None else projection.weights(heads)


def _biases(projection: Projection | None, heads: int | None) -> Tensor | None:
    return None if projection is None or heads is None else projection.biases(heads)


def bias_of(linear: Linear) -> Float[Tensor, " output"]:
    """The bias of a linear map; zeros where it has none."""
    weight, bias = linear.read()
    return weight.new_zeros(len(weight)) if bias is None else bias


def into(
    linear: Linear | None, columns: Int[Tensor, " neuron"] | None
) -> Float[Tensor, "feature neuron"] | None:
    """What a linear map makes neurons with."""
    if linear is None or columns is None:
        return None
    weight, _ = linear.read()
    return weight[columns.to(weight.device)].T


def added(
    linear: Linear | None, columns: Int[Tensor, " neuron"] | None
) -> Float[Tensor, " neuron"] | None:
    """What a linear map adds to neurons."""
    return (
        None
        if linear is None or columns is None
        else bias_of(linear)[columns.to(linear.read()[0].device)]
    )
