"""The loss of a language model on text, as a function of a copy of its weights.

Shapes: `batch` sequences of `position` token ids, `item` some of them; `weight` all weights that
are sampled, in one row.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from monitor.anatomy import LanguageModel
from monitor.streams import UnseenError
from monitor.untouched import untouched

# Logits of this size are held at a time, and as much again for their gradient, or one sequence's.
_LOGIT_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TextLoss:
    """The mean loss of `tokens`, a sequence an item; every token that is predicted is a data point.

    `start` are the weights that are trained (all, where none are), each once, in float32 at least.
    What else the model has is in `fixed`, as exact.
    """

    model: LanguageModel
    tokens: Int[Tensor, "batch position"]
    start: Float[Tensor, " weight"]
    shapes: Mapping[str, torch.Size]
    fixed: Mapping[str, Tensor]

    @classmethod
    @contextmanager
    def of(cls, model: LanguageModel, tokens: Int[Tensor, "batch position"]) -> Iterator[TextLoss]:
        """Inside, the loss can be asked for; the model itself is never changed, and left as it was.

        Raises `UnseenError` where its weights are not plain numbers.
        """
        # What is made in inference mode has no gradients.
        with torch.inference_mode(mode=False), untouched(model.module):
            for module in model.module.modules():
                # Users' hooks on gradients are for those of training; `untouched` puts them back.
                module._backward_hooks = OrderedDict()
                module._backward_pre_hooks = OrderedDict()
            named = {
                name: p for name, p in model.module.named_parameters() if p.is_floating_point()
            }
            sampled = {name: p for name, p in named.items() if p.requires_grad} or named
            for name, p in sampled.items():
                if type(p.data) is not Tensor:
                    kind = f"{type(p.data).__name__} of {p.dtype}"
                    raise UnseenError(f"{name} is a {kind}: no copy of it can be changed")
            if not sampled:
                raise UnseenError("the model has no weights")
            dtype = functools.reduce(
                torch.promote_types, (p.dtype for p in sampled.values()), torch.float32
            )
            others = {
                **{name: p for name, p in named.items() if name not in sampled},
                **dict(model.module.named_buffers()),
            }
            yield cls(
                model=model,
                tokens=tokens.to(model.device),
                start=torch.cat([p.detach().to(dtype).flatten() for p in sampled.values()]),
                shapes={name: p.shape for name, p in sampled.items()},
                fixed={
                    name: value.detach().to(dtype if value.is_floating_point() else value.dtype)
                    for name, value in others.items()
                },
            )

    @property
    def items(self) -> int:
        """The number of sequences."""
        return len(self.tokens)

    @property
    def size(self) -> int:
        """The number of tokens that are predicted."""
        return self.tokens[:, 1:].numel()

    def gradient(
        self, weights: Float[Tensor, " weight"], items: Int[Tensor, " item"]
    ) -> tuple[Float[Tensor, " item"], Float[Tensor, " weight"]]:
        """The mean loss of each of some sequences, and the gradient of their mean."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        parts = zip(self.shapes.items(), weights.detach().split(sizes), strict=True)
        leaves = {name: part.view(shape).requires_grad_() for (name, shape), part in parts}
        own = {f"module.{name}": value for name, value in {**self.fixed, **leaves}.items()}
        summed, losses = torch.zeros_like(weights), []
        positions = self.tokens.shape[1]
        at_once = max(1, _LOGIT_BYTES // (4 * positions * self.model.width))
        for some in items.to(self.tokens.device).split(at_once):
            inputs = (self.tokens[some], tuple(leaves.values()))
            each, slopes = functional_call(_Losses(self.model), own, inputs)
            for part, slope in zip(summed.split(sizes), slopes, strict=True):
                part.add_(slope.flatten(), alpha=1 / len(items))
            losses.append(each)
        return torch.cat(losses), summed


class _Losses(nn.Module):
    """The losses of sequences, and the gradient of their sum with respect to `leaves`.

    Both in one call: what is computed again in a backward pass (activation checkpoints) sees the
    same weights as the forward pass.
    """

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.module = model.module
        self._logits = model.logits

    def forward(
        self, tokens: Int[Tensor, "item position"], leaves: Sequence[Tensor]
    ) -> tuple[Float[Tensor, " item"], Sequence[Tensor]]:
        with torch.enable_grad():
            logits = self._logits(tokens)[:, :-1].flatten(0, 1)
            if logits.dtype in {torch.float16, torch.bfloat16}:
                logits = logits.float()
            each = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
            losses = each.view(len(tokens), -1).mean(1)
            slopes = torch.autograd.grad(
                losses.sum(), leaves, allow_unused=True, materialize_grads=True
            )
        return losses.detach(), slopes
