"""What a model answers to the questions of a task, and the weights that numbers go in and out by.

Shapes: `question` sequences of `position` token ids, of which a model reads all but the last;
`number` those that are added in modular addition; `feature` of an embedding, `neuron` what the
unembedding reads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.overrides import TorchFunctionMode

from monitor.anatomy import LanguageModel
from monitor.stimuli import Stimulus
from monitor.tasks import Sums, answer_length, sums_in
from monitor.untouched import is_fully_sharded, untouched

# So many questions go through the model at a time, or fewer where their logits are larger than so.
_QUESTIONS, _LOGIT_BYTES = 4096, 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answers:
    """Of each question the losses, in nats, summed over its answer's tokens, how many of these are
    the most likely ones, and in modular addition the `logits` of all numbers (else None).

    `weight_norm` is that of all weights; `embedding` and `unembedding` have the rows of the
    numbers. These are None where they are not seen, or divided between processes.
    """

    losses: Float[Tensor, " question"]
    right: Int[Tensor, " question"]
    logits: Float[Tensor, "question number"] | None
    weight_norm: float | None
    embedding: Float[Tensor, "number feature"] | None
    unembedding: Float[Tensor, "number neuron"] | None

    def sequences(self, start: int, stop: int) -> Answers:
        """The answers to questions `start` to `stop`."""
        return dataclasses.replace(
            self,
            losses=self.losses[start:stop],
            right=self.right[start:stop],
            logits=None if self.logits is None else self.logits[start:stop],
        )

    @staticmethod
    def join(parts: Sequence[Answers]) -> Answers:
        """The answers to all questions; what is not of questions is as the first part has it."""
        logits = [part.logits for part in parts if part.logits is not None]
        return dataclasses.replace(
            parts[0],
            losses=torch.cat([part.losses for part in parts]),
            right=torch.cat([part.right for part in parts]),
            logits=torch.cat(logits) if logits else None,
        )


def read_answers(model: LanguageModel, stimulus: Stimulus) -> Answers:
    """Has `model` answer all questions of a stimulus. Losses are computed in float64: as a model
    groks they go below what float32 tells from 0.

    Raises `ValueError` where the stimulus has no questions.
    """
    length, sums = answer_length(stimulus), sums_in(stimulus)
    batch, positions = stimulus.tokens.shape
    at_once = min(_QUESTIONS, max(1, _LOGIT_BYTES // (4 * positions * model.width)))
    parts = []
    with untouched(model.module):
        for start in range(0, batch, at_once):
            tokens = stimulus.tokens[start : start + at_once].to(model.device)
            parts.append(_answered(model, tokens, length, sums))
    answers = Answers.join(parts)
    if _divided(model):
        return answers
    return dataclasses.replace(answers, weight_norm=_weight_norm(model))


def _answered(
    model: LanguageModel,
    tokens: Int[Tensor, "question position"],
    length: int,
    sums: Sums | None,
) -> Answers:
    ends = _Ends(tokens[:, :-1], model.width)
    with ends:
        logits = model.logits(tokens[:, :-1])[:, -length:].double()
    targets = tokens[:, -length:]
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    numbers = None if sums is None else sums.numbers.to(logits.device)
    # What was gathered for the pass is let go of after it.
    seen = (None, None) if _divided(model) else (ends.embedding, ends.unembedding(logits))
    embedding, unembedding = (_rows(weight, numbers) for weight in seen)
    return Answers(
        losses=losses.view(targets.shape).sum(1).cpu(),
        right=(logits.argmax(-1) == targets).sum(1).cpu(),
        logits=None if numbers is None else logits[:, -1, numbers].cpu(),
        weight_norm=None,
        embedding=embedding,
        unembedding=unembedding,
    )


class _Ends(TorchFunctionMode):
    """Notes the embedding that the questions, or one position of them, are looked up in, and the
    linear layers as wide as the logits.
    """

    def __init__(self, read: Int[Tensor, "question position"], width: int) -> None:
        super().__init__()
        self._read, self._width = read, width
        self._linear: list[tuple[Tensor, Tensor]] = []
        self.embedding: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in (F.embedding, torch.embedding) and self.embedding is None:
            ids, weight = args[:2] if func is F.embedding else args[1::-1]
            columns = (self._read, *self._read.unbind(1))
            if any(torch.equal(ids, read) for read in columns):
                self.embedding = weight
        elif func is F.linear and output.shape[-1] == self._width:
            self._linear.append((args[1], output))
        return output

    def unembedding(self, logits: Float[Tensor, "question answer vocabulary"]) -> Tensor | None:
        """The weight of the linear layer that gave the logits, if one did."""
        for weight, output in reversed(self._linear):
            if output.numel() % (len(logits) * self._width) == 0:
                given = output.reshape(len(logits), -1, self._width)[:, -logits.shape[1] :]
                if torch.equal(given.double(), logits):
                    return weight
        return None


def _rows(
    weight: Tensor | None, numbers: Int[Tensor, " number"] | None
) -> Float[Tensor, "number column"] | None:
    if weight is None or numbers is None:
        return None
    return weight.detach()[numbers.to(weight.device)].double().cpu()


def _divided(model: LanguageModel) -> bool:
    return any(map(is_fully_sharded, model.module.modules()))


def _weight_norm(model: LanguageModel) -> float:
    """Root of the sum of the squares of all weights, each counted once."""
    weights = model.module.parameters()
    return math.hypot(
        *(float(torch.linalg.vector_norm(w.detach(), dtype=torch.float64)) for w in weights)
    )
