"""Concepts: what tokens may have or lack, as users name it, and the text that shows it.

By a function on token ids (`Concept`), by texts that have it and texts that lack it
(`labelled_texts`), by labelled tokens (`labelled_tokens`), or built in: what a tokenizer says of
its tokens (`from_tokenizer`) and Python of its source (`python_source`). `Analogies` name relations
between words.
"""

from __future__ import annotations

from monitor.analogies import Analogies
from monitor.concepts.building import concept_stimulus, text_rows
from monitor.concepts.naming import (
    Concept,
    LabelledTokens,
    Named,
    check_concepts,
    labelled_texts,
    labelled_tokens,
    meanings,
)
from monitor.concepts.source import python_source
from monitor.concepts.vocabulary import from_tokenizer

__all__ = [
    "Analogies",
    "Concept",
    "LabelledTokens",
    "Named",
    "check_concepts",
    "concept_stimulus",
    "from_tokenizer",
    "labelled_texts",
    "labelled_tokens",
    "meanings",
    "python_source",
    "text_rows",
]
