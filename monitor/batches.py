"""What a model is measured on, as users say it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from monitor.analogies import analogies_stimulus
from monitor.anatomy import LanguageModel
from monitor.concepts import Analogies, Named, check_concepts, concept_stimulus
from monitor.stimuli import Stimulus, check_text, repeated, text_stimulus, text_tail, windows
from monitor.tasks import AnyTask, check_task, task_stimulus

# Longer contexts cost more and show little more: the scores are means over positions.
_DEFAULT_CONTEXT = 256


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StimulusOptions:
    """What a user may say about the stimuli; `monitor.measure.measure` says what each means."""

    text: Tensor | None = None
    concepts: Sequence[Named] | None = None
    task: AnyTask | None = None
    context: int | None = None
    sequences: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        check_concepts(self.concepts)
        check_task(self.task)
        if self.text is not None:
            check_text(self.text)
        for name, least in (("context", 1), ("sequences", 2), ("seed", 0)):
            value = getattr(self, name)
            if not (value is None and name == "context") and (
                type(value) is not int or value < least
            ):
                raise ValueError(f"{name}={value!r}: expected a whole number of at least {least}")


def contexts(model: LanguageModel, options: StimulusOptions) -> list[int]:
    """The contexts to try in turn: the user's, or the longest that is not unreasonable."""
    if options.context is not None:
        return [options.context]
    longest = min(model.max_context or _DEFAULT_CONTEXT, _DEFAULT_CONTEXT)
    if options.text is not None:
        longest = min(longest, options.text.shape[1])
    # Rows of training data often hold inputs and targets in one: a position more than is read.
    return [longest, longest - 1] if model.max_context is None else [longest]


def named_concepts(stimuli: Mapping[str, Stimulus]) -> list[str]:
    """The names of all concepts that stimuli are labelled with."""
    labels = [each.labels for name, each in stimuli.items() if name != "task"]
    return [name for of_stimulus in labels if of_stimulus is not None for name in of_stimulus.names]


def build_stimuli(
    model: LanguageModel, options: StimulusOptions, context: int, needed: Collection[str]
) -> dict[str, Stimulus]:
    """The stimuli of so many positions that the options say, by their names. Models of a task may
    be too small for repeated tokens: with one these are left out where they are not `needed`.

    Raises `ValueError` and `TypeError` where they cannot be built.
    """
    if model.max_context is not None and context > model.max_context:
        raise ValueError(
            f"context={context} is longer than the {model.max_context} positions that "
            f"{type(model.module).__name__} can read: pass at most context={model.max_context}"
        )
    stimuli: dict[str, Stimulus] = {}
    if options.task is None or "repeated" in needed:
        stimuli["repeated"] = _repeated(model, options, context)
    given, text = check_concepts(options.concepts), None
    relations = [each for each in given if isinstance(each, Analogies)]
    concepts = [each for each in given if not isinstance(each, Analogies)]
    if options.text is not None:
        text = check_text(options.text, vocab_size=model.vocab_size)
        tokens = windows(text, context=context, sequences=options.sequences)
        stimuli["text"] = text_stimulus(tokens)
        stimuli["text_tail"] = text_tail(stimuli["text"])
    if text is not None or concepts:
        stimuli["concepts"] = concept_stimulus(
            concepts,
            text=text,
            context=context,
            sequences=options.sequences,
            vocab_size=model.vocab_size,
            seed=options.seed,
        )
    if relations:
        stimuli["analogies"] = analogies_stimulus(
            relations, bos=model.bos, context=context, vocab_size=model.vocab_size
        )
    if options.task is not None:
        stimuli["task"] = task_stimulus(
            options.task, vocab_size=model.vocab_size, width=model.width
        )
    return stimuli


def _repeated(model: LanguageModel, options: StimulusOptions, context: int) -> Stimulus:
    try:
        return repeated(
            vocab_size=model.vocab_size,
            sequences=options.sequences,
            context=context,
            bos=model.bos,
            seed=options.seed,
        )
    except ValueError as error:
        if options.task is None:
            raise
        raise ValueError(f"{error}; for the task alone: probes=['grokking']") from error
