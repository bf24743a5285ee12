"""Direct logit attribution while a model runs: what every component writes towards the correct next
token's logit.

The stream that the final norm reads is the sum of what was written to it, and with the number by
which it divided in this very pass that norm is linear: the logit is a sum of one term a component.

Shapes: `question` and `way` as in `attribution`; `feature` of the stream, `column` of what a linear
map reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from monitor.parts import Block, Parts
from monitor.parts.blocks import Mixing, Write
from monitor.parts.flow import Tap
from monitor.parts.norms import LinearNorm, NotANormError, precise
from monitor.stimuli import Stimulus
from monitor.streams.attribution import AttributionSums, Component, Questions
from monitor.streams.reading import UnseenError, check_blocks, check_readable, rows_of

_Terms = dict[Component, Float[Tensor, "way question"]]


class Attributing:
    """Adds the terms up while a model runs.

    Raises `UnseenError` where the model's logits are no sum of terms that are known.
    """

    def __init__(self, parts: Parts, stimulus: Stimulus) -> None:
        check_blocks(parts)
        check_readable(parts)
        self._parts, self._tokens = parts, stimulus.tokens
        self._questions = Questions.of(stimulus)
        unembedding, bias = parts.unembedding, parts.unembedding_bias
        if unembedding is None or bias is None:
            raise UnseenError("no unembedding")
        self._norm = _norm_at(parts, parts.final_norm, unembedding[0])
        self._read = parts.logit_scale * precise(unembedding[self._questions.targets])
        self._added = parts.logit_scale * precise(bias[self._questions.targets])
        # Each term still lacks what the final norm divides by.
        self._towards = self._norm.read(self._read)
        self._terms: _Terms = {}
        self._writers: list[_Attention | _Plain] = []
        for block in parts.blocks:
            self._writers += _writers(parts, block)
        start = parts.blocks[0].taps["residual_before"]
        whole = Write(tap=start, scale=1.0, norm=None)
        self._writers.append(_Plain(component=Component(kind="embedding"), write=whole))
        self._given, self._made = parts.blocks[-1].taps["residual_after"], _unembedded_at(parts)
        self._ends: dict[Tap, Float[Tensor, "question feature"]] = {}
        self.left = {self._given, self._made}.union(*(writer.taps for writer in self._writers))

    def see(self, tap: Tap, tensor: Tensor) -> None:
        """Takes what passes."""
        if tap not in self.left:
            return
        self.left.discard(tap)
        seen = rows_of(self._parts, tap, tensor, self._tokens)
        seen = seen[self._questions.sequence, self._questions.query]
        if tap in {self._given, self._made}:
            self._ends[tap] = seen
        for writer in self._writers:
            if tap in writer.taps:
                self._terms |= writer.see(tap, seen, self._towards)

    def sums(self) -> AttributionSums:
        """The terms, which add up to the logit.

        Raises `UnseenError` where they do not.
        """
        given, made = self._ends[self._given], self._ends[self._made]
        inverse = self._norm.inverse_scale(given, made)
        terms = {component: term * inverse for component, term in sorted(self._terms.items())}
        terms[Component(kind="bias")] = self._added + self._read @ self._norm.bias
        logit = self._added + _products(made, self._read)
        every = torch.stack(list(terms.values()))
        apart = float((every.sum(0) - logit).abs().max())
        eps = torch.finfo(made.dtype).eps
        size = float(logit.abs().max())
        # What is added and taken off again is rounded too.
        if not apart <= eps**0.5 * size + 16 * eps * float(every.abs().sum(0).max()):
            raise UnseenError(
                f"what is known to write to the stream adds up to logits that are off by "
                f"{apart:.2g} of {size:.2g}"
            )
        every = torch.cat([every, logit[None]])
        totals = every.new_zeros(*every.shape[:2], len(self._tokens))
        totals.index_add_(2, self._questions.sequence, every)
        correct, shuffled = totals.cpu().unbind(1)
        return AttributionSums(
            components=(*terms, Component(kind="logit")),
            correct=correct,
            shuffled=shuffled,
            questions=self._questions.sequence.cpu().bincount(minlength=len(self._tokens)),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Plain:
    """What is written to the stream as one."""

    component: Component
    write: Write

    @property
    def taps(self) -> set[Tap]:
        return {self.write.tap}

    def see(self, _: Tap, seen: Tensor, towards: Float[Tensor, "way question feature"]) -> _Terms:
        return {self.component: self.write.scale * _products(seen, towards)}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Attention:
    """What the heads of one block write, and what is written whatever they do."""

    layer: int
    write: Write
    mixing: Mixing
    weight: Float[Tensor, "feature column"]
    bias: Float[Tensor, " feature"]
    norm: LinearNorm | None
    seen: dict[Tap, Float[Tensor, "question _"]] = field(default_factory=dict)

    @property
    def taps(self) -> set[Tap]:
        # What the map made is of interest only where it is normed.
        made = set() if self.norm is None else {self.mixing.writes}
        return {self.mixing.reads, self.write.tap} | made

    def see(self, tap: Tap, seen: Tensor, towards: Float[Tensor, "way question feature"]) -> _Terms:
        self.seen[tap] = seen
        if tap != self.write.tap:
            return {}
        mixed = self.seen.pop(self.mixing.reads)
        constant = towards.new_zeros(towards.shape[:2])
        if self.norm is not None:
            raw = self.seen.pop(self.mixing.writes)
            inverse = self.norm.inverse_scale(raw, seen)
            constant = towards @ self.norm.bias
            towards = self.norm.read(towards) * inverse[:, None]
        self.seen.clear()
        constant = constant + towards @ precise(self.bias)
        terms = precise(mixed) * (towards @ precise(self.weight))
        columns = self.mixing.columns.to(terms.device)
        heads = rearrange(terms[..., columns].sum(-1), "way question head -> head way question")
        found = {
            Component(kind="head", layer=self.layer, head=head): self.write.scale * term
            for head, term in enumerate(heads)
        }
        found[Component(kind="attention_bias", layer=self.layer)] = self.write.scale * constant
        return found


def _writers(parts: Parts, block: Block) -> list[_Attention | _Plain]:
    """What writes to the stream in a block.

    Raises `UnseenError` where that is not known, or no sum.
    """
    if block.stream_norms is not None:
        raise UnseenError(
            f"{block.path} norms the stream itself after every write: no logit is a sum of what "
            "was written"
        )
    writers: list[_Attention | _Plain] = []
    if (write := block.attention_write) is not None:
        if block.mixing is None:
            raise UnseenError(f"mixing of {block.path}: {block.reasons.get('mixing', 'not found')}")
        weight, bias = block.mixing.linear.read()
        writers.append(
            _Attention(
                layer=block.layer,
                write=write,
                mixing=block.mixing,
                weight=weight,
                bias=weight.new_zeros(len(weight)) if bias is None else bias,
                norm=None if write.norm is None else _norm_at(parts, write.norm, weight[:, 0]),
            )
        )
    if (write := block.mlp_write) is not None:
        writers.append(_Plain(component=Component(kind="mlp", layer=block.layer), write=write))
    return writers


def _norm_at(parts: Parts, path: str | None, like: Float[Tensor, " feature"]) -> LinearNorm:
    if path is None:
        return LinearNorm.none(like)
    try:
        return LinearNorm.of(lambda rows: parts.apply(path, rows[None])[0], like)
    except NotANormError as error:
        raise UnseenError(f"{path}: {error}") from None


def _unembedded_at(parts: Parts) -> Tap:
    tap = parts.taps.get("unembedding_input")
    if tap is None:
        raise UnseenError("what the unembedding reads was not found")
    return tap


def _products(
    seen: Float[Tensor, "question feature"], towards: Float[Tensor, "way question feature"]
) -> Float[Tensor, "way question"]:
    return torch.einsum("qf,wqf->wq", precise(seen), towards)
