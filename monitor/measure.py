"""Measuring a model: fixed stimuli through the model, what it shows through the probes.

`Monitor` is for a model in training: it records a run, and once it has begun it never raises.
`measure` is for one model at hand: it returns tables, writes nothing, and raises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import pandas as pd
from torch import Tensor, nn

from monitor.adapters import ModuleAdapter
from monitor.batches import StimulusOptions
from monitor.concepts import Named
from monitor.monitoring import Monitor
from monitor.probes import select
from monitor.record import MOMENT, Moment
from monitor.subject import Subject, find_model
from monitor.tasks import AnyTask

__all__ = ["Monitor", "measure"]


def measure(
    model: nn.Module,
    *,
    vocab_size: int | None = None,
    probes: Sequence[str] | None = None,
    text: Tensor | None = None,
    concepts: Sequence[Named] | None = None,
    task: AnyTask | None = None,
    context: int | None = None,
    sequences: int = 16,
    seed: int = 0,
    adapters: Mapping[type[nn.Module], ModuleAdapter] | None = None,
    seconds: float | None = None,
) -> dict[str, pd.DataFrame]:
    """Measures any language model once and returns a data frame for each probe's table.

    Args:
        model: a module that maps token ids [batch, position] to logits [batch, position,
            vocabulary], or one that holds exactly one such module. It is left as it was.
        vocab_size: number of token ids to draw from; default: the model's own.
        probes: names of probes, or `probe.field` for single fields; default: all but `dictionary`
            and `learning_coefficient`, and without concepts those of concepts. `default` stands for
            all of these, so that `["default", "dictionary"]` adds one.
        text: held-out token ids [sequence, position]; without it, what needs text is missing.
        concepts: what tokens may have or lack, a list of `monitor.concepts.Concept`,
            `labelled_texts`, `labelled_tokens`, `python_source` and what `from_tokenizer` returns:
            probes say where in the model these are found. Functions label `text`. `Analogies` in it
            are relations between words.
        task: a `monitor.tasks.Task`, questions that are trained on and others that are not, or
            `ModularAddition`: are answers remembered or computed? Without it no `grokking`.
        context: positions per stimulus; default: the model's maximum, at most 256.
        sequences: sequences per stimulus, and so the `n` of every estimate.
        seed: of what is drawn at random: the tokens of stimuli, and which of the text is for what.
        adapters: how to read the attention of modules that compute it in a way of their own: from
            their classes to functions `read(module, args, kwargs, output)`, called after each
            forward, that return a `monitor.attention.Pattern` or `SelfAttention`.
        seconds: how long heads may be ablated (some 50 forward passes) and walks be made around the
            weights; default: as long as it takes. Where that is too short that table is missing.

    With several processes each measures for itself; where `fully_shard` divided the model between
    them, all have to.

    Raises:
        ValueError, TypeError: an argument is of no use; the message says what was expected.
        NotALanguageModelError: none, or several, were found in `model`.
        NoAttentionError: attention was asked for and the model showed none.
    """
    chosen = select(probes)
    found = find_model(model, vocab_size=vocab_size, adapters=adapters, task=task)
    options = StimulusOptions(
        text=text, concepts=concepts, task=task, context=context, sequences=sequences, seed=seed
    )
    subject = Subject.new(model, found, chosen, options)
    if probes is None:
        chosen = subject.with_something_to_see(chosen)
    moment = Moment(run="", attempt=1, step=0, tokens=None, time=datetime.now(UTC))
    measurement = subject.measure(chosen, moment, seconds=seconds)
    for failure in measurement.failures:
        raise RuntimeError(f"probe {failure.part} failed: {failure.error}\n{failure.traceback}")
    return {
        reading.spec.name: reading.table.drop_columns(list(MOMENT)).to_pandas()
        for reading in measurement.readings
    }
