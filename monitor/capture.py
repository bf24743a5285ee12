"""One forward pass on one stimulus, reduced while it runs.

Shapes: `batch` sequences of `position` token ids; `prediction` one position less.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from monitor.adapters import AdapterError
from monitor.anatomy import LanguageModel, layer_numbers, mixing_module
from monitor.answers import Answers, read_answers
from monitor.attention import LayerAttention
from monitor.features import COLLECTORS, collect
from monitor.parts import Parts
from monitor.parts.flow import Map, Tap, run
from monitor.stimuli import Stimulus
from monitor.streams import AttributionSums, Kind, LensSums, Streams, StreamSample
from monitor.untouched import untouched
from monitor.watch import SeenEnough, Wanted, Watch

# Logits of this size are held at a time, where the model gives no less than a whole sequence's.
_LOGIT_BYTES = 64 * 2**20


class NoAttentionError(RuntimeError):
    """The model computed no attention that could be seen; the message says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observation:
    """What one forward pass on one stimulus showed, on the CPU.

    `attention` has one entry a layer; `losses[b, i]` is the cross-entropy in nats of token i + 1
    given tokens 0 … i. `stream`, `lens` and `attribution` say what happened in the residual stream,
    where the parts of the model are known; `answers` what was answered to the questions of a task;
    `features` what was collected of labelled tokens, by its kind. What was not asked for is None or
    missing; so is what could not be seen, of which `reasons` say why.
    """

    stimulus: Stimulus
    vocab_size: int
    attention: tuple[LayerAttention, ...] | None = None
    losses: Float[Tensor, "batch prediction"] | None = None
    stream: StreamSample | None = None
    lens: LensSums | None = None
    attribution: AttributionSums | None = None
    answers: Answers | None = None
    features: Mapping[str, Any] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def join(stimulus: Stimulus, parts: Sequence[tuple[int, Observation]]) -> Observation:
        """The observation of a whole stimulus from those of its parts, each with the number of its
        first sequence. Parts may overlap: every sequence is taken once.
        """
        taken, cut = 0, []
        for first, part in sorted(parts, key=lambda numbered: numbered[0]):
            start, stop = taken - first, len(part.stimulus.tokens)
            if start < 0:
                raise ValueError(f"sequences {taken} to {first - 1} are in none of the parts")
            cut.append((part, start, stop))
            taken = max(taken, first + stop)
        attention = [
            tuple(layer.rows(start, stop) for layer in part.attention)
            for part, start, stop in cut
            if part.attention is not None
        ]
        losses = [part.losses[start:stop] for part, start, stop in cut if part.losses is not None]
        cuts = [(start, stop) for _, start, stop in cut]
        return Observation(
            stimulus=stimulus,
            vocab_size=parts[0][1].vocab_size,
            attention=tuple(LayerAttention.join(layers) for layers in zip(*attention, strict=True))
            if attention
            else None,
            losses=torch.cat(losses) if losses else None,
            stream=_joined(StreamSample, [part.stream for part, _, _ in cut], cuts),
            lens=_joined(LensSums, [part.lens for part, _, _ in cut], cuts),
            attribution=_joined(AttributionSums, [part.attribution for part, _, _ in cut], cuts),
            answers=_joined(Answers, [part.answers for part, _, _ in cut], cuts),
            reasons=dict(item for part, _, _ in cut for item in part.reasons.items()),
        )


_Sums = TypeVar("_Sums", StreamSample, LensSums, AttributionSums, Answers)


def _joined(
    kind: type[_Sums], seen: Sequence[_Sums | None], cuts: Sequence[tuple[int, int]]
) -> _Sums | None:
    """What was seen of the parts, of each the sequences from one number to another; None where it
    was not seen in all of them.
    """
    pairs = zip(seen, cuts, strict=True)
    cut = [part.sequences(*start_stop) for part, start_stop in pairs if part is not None]
    return kind.join(cut) if len(cut) == len(seen) else None


def observe(
    model: LanguageModel,
    stimulus: Stimulus,
    *,
    attention: bool = False,
    losses: bool = False,
    stream: bool = False,
    lens: bool = False,
    attribution: bool = False,
    answers: bool = False,
    parts: Parts | None = None,
    attention_calls: int | None = None,
    together: bool = False,
) -> Observation:
    """Runs `model` on `stimulus` and returns what was asked for. For `answers` that is a pass over
    questions without their answers, which shows nothing else.

    Only a chunk of the logits is held at a time: of one pass, where they are the plain output of
    the unembedding, else of a pass for every few sequences. Where `attention_calls` says how many
    attention calls one pass makes and no losses are wanted, the pass ends at the last of them.
    `together` says that other processes, each with a part of the weights, run the same pass at the
    same time: then no pass ends early, and an error in what is seen is raised after it.
    `stream`, `lens` and `attribution` are read off `parts`; what these do not allow is None in the
    observation, with its reason.

    Raises `NoAttentionError` where attention was asked for and none was seen, and `ValueError`
    where `parts` are missing.
    """
    if answers:
        return Observation(
            stimulus=stimulus,
            vocab_size=model.vocab_size,
            answers=read_answers(model, stimulus),
        )
    asked: dict[Kind, bool] = {"stream": stream, "lens": lens, "attribution": attribution}
    kinds = [kind for kind, on in asked.items() if on]
    if parts is None and kinds:
        raise ValueError(
            f"parts=None: expected what find_parts(model) gives, to see {', '.join(kinds)}"
        )
    batch, positions = stimulus.tokens.shape
    at_once = batch
    if losses and model.unembedding_call is None:
        at_once = max(1, _LOGIT_BYTES // (4 * positions * model.width))
    seen = []
    with untouched(model.module):
        for start in range(0, batch, at_once):
            part = stimulus.rows(start, start + at_once, model.device)
            streams = Streams(parts, part, kinds) if parts is not None and kinds else None
            wanted = Wanted(
                attention=attention,
                losses=losses,
                stop_after=None
                if losses or (streams is not None and streams.waiting)
                else attention_calls,
                together=together,
            )
            seen.append((start, _pass(model, part, wanted, streams, attention_calls)))
    return Observation.join(stimulus, seen)


def observe_features(parts: Parts, stimulus: Stimulus, kinds: Collection[str]) -> Observation:
    """What the `kinds` of collectors make of a stimulus with labels, in one pass over it.

    Raises `ValueError` where it has none, and what the model raises.
    """
    features, reasons = collect(parts, stimulus, {kind: COLLECTORS[kind] for kind in kinds})
    return Observation(
        stimulus=stimulus,
        vocab_size=parts.model.vocab_size,
        features=features,
        reasons=reasons,
    )


def _pass(
    model: LanguageModel,
    stimulus: Stimulus,
    wanted: Wanted,
    streams: Streams | None,
    attention_calls: int | None,
) -> Observation:
    watch, logits = Watch(model, stimulus, wanted), None

    def see(tap: Tap, tensor: Tensor, _: Map | None) -> None:
        if streams is None:
            return
        streams.see(tap, tensor)
        attended = not wanted.attention or len(watch.seen) == attention_calls
        if attended and not (wanted.losses or wanted.together or streams.waiting):
            raise SeenEnough

    try:
        with watch.watching():
            if streams is not None and streams.waiting:
                # The innermost sees a call first, and the outer one what it makes of it.
                logits = run(model, stimulus.tokens, see)
            else:
                logits = model.logits(stimulus.tokens)
        if watch.error is not None:
            raise watch.error
    except SeenEnough:
        pass
    except AdapterError as error:
        raise NoAttentionError(str(error)) from error
    if wanted.attention and not watch.seen:
        raise NoAttentionError(_no_attention(model, stimulus))
    losses = watch.losses
    if wanted.losses and losses is None and logits is not None:
        losses = _losses(logits, stimulus.tokens)
    numbers = layer_numbers([path for path, _ in watch.seen])
    named = zip(numbers, watch.seen, strict=True)
    layers = tuple(layer.at(number, path) for number, (path, layer) in named)
    return Observation(
        stimulus=stimulus,
        vocab_size=model.vocab_size,
        attention=layers if wanted.attention else None,
        losses=losses,
        stream=None if streams is None else streams.stream(),
        lens=None if streams is None else streams.lens(),
        attribution=None if streams is None else streams.attribution(),
        reasons={} if streams is None else streams.reasons,
    )


def _losses(
    logits: Float[Tensor, "batch position vocabulary"], tokens: Int[Tensor, "batch position"]
) -> Float[Tensor, "batch prediction"]:
    # One sequence at a time: the float32 copy and the log-softmax are as large as the logits.
    pairs = zip(logits, tokens, strict=True)
    rows = [F.cross_entropy(row[:-1].float(), ids[1:], reduction="none") for row, ids in pairs]
    return torch.stack(rows).cpu()


def _no_attention(model: LanguageModel, stimulus: Stimulus) -> str:
    name, positions = type(model.module).__name__, stimulus.tokens.shape[1]
    unseen = (
        "scaled_dot_product_attention, flex_attention or softmax over the scores of "
        f"{positions} positions"
    )
    where = mixing_module(model, stimulus.tokens)
    if where is None:
        return (
            f"{name} showed no attention: in one forward pass no {unseen} was called. "
            "To go on without: probes=['in_context']."
        )
    path, kind = where
    return (
        f"{name} showed no attention: its module {path} ({kind}) mixes positions, but called no "
        f"{unseen}. Compute its attention with one of these; or, if it is attention, say how to "
        "read it:\n\n"
        "    from monitor.attention import Pattern  # or SelfAttention, from queries and keys\n"
        f"    def read(module, args, kwargs, output):  # after every call of {kind}\n"
        "        weights = ...  # its attention [batch, head, query, key]; rows sum to 1\n"
        "        return Pattern(weights=weights)\n"
        f"    TrainingDynamics(adapters={{{kind}: read}})  # or measure(model, adapters=...)\n\n"
        "To go on without: probes=['in_context']."
    )
