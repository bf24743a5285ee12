"""What a tokenizer says of its tokens: concepts that need no labels.

Shapes: `id` the tokens of a vocabulary; `batch` sequences of `position` token ids.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int, Int8
from torch import Tensor

from monitor.concepts.naming import Concept

# English words that say how others belong together: the commonest of any text.
_ENGLISH = """
a about after all an and any are as at be because been before but by can could did do does for from
had has have he her him his how i if in into is it its may me might must my no nor not of on or our
shall she should since so some than that the their them then there these they this those to us was
we were what when where which while who whom whose why will with would you your
"""
_FUNCTION_WORDS = frozenset(_ENGLISH.split())

# What decoding says of bytes that are no whole character.
_BROKEN = "\ufffd"


def from_tokenizer(tokenizer: Any, *, keywords: Collection[str] = ()) -> list[Concept]:
    """Concepts that the text of a token alone decides.

    - `leading_space`: it begins with a space
    - `capital`: its first character that is no white space is a capital letter
    - `digit`: it has a digit
    - `punctuation`: punctuation marks and symbols, and nothing else but white space
    - `newline`: it has a line break
    - `white_space`: nothing but white space
    - `function_word`: one of the commonest English words, such as "the", "of" and "not"
    - `keyword`: one of `keywords`, where some are given: `keyword.kwlist` for Python, say

    Tokens that are special, or bytes of a character that is not whole, do not count. What all
    tokens have, or none, is left out. Each is a function of the token id alone, which any model can
    read off its embedding from the start: what tells is its selectivity, not its accuracy.

    Args:
        tokenizer: a `tokenizers.Tokenizer` or a tokenizer of transformers.
        keywords: words of your own.

    Raises:
        TypeError: it does not decode token ids, or says of none what text it is.
    """
    texts = _texts(tokenizer)
    if isinstance(keywords, str):
        raise TypeError(f"keywords= is {keywords!r:.80}; expected a list of words")
    words = frozenset(keywords)
    found = []
    for name, (meaning, has) in (_CONCEPTS | _keyword(words)).items():
        sides = [0 if text is None else 1 if has(text) else -1 for text in texts]
        if {1, -1} <= set(sides):
            table = torch.tensor(sides, dtype=torch.int8)
            found.append(Concept(name, help=meaning, label=_Lookup(table=table)))
    if not found:
        raise TypeError(
            f"{type(tokenizer).__name__} says of none of its tokens what text it is: expected a "
            "tokenizers.Tokenizer or a tokenizer of transformers"
        )
    return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Lookup:
    """What is known of each token id; ids beyond the tokenizer's do not count."""

    table: Int8[Tensor, " id"]

    def __call__(self, ids: Int[Tensor, "batch position"]) -> Int8[Tensor, "batch position"]:
        known = ids < len(self.table)
        return self.table[torch.where(known, ids, 0)] * known


def _symbols(text: str) -> bool:
    marks = text.strip()
    return bool(marks) and all(unicodedata.category(mark)[0] in "PS" for mark in marks)


_CONCEPTS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "leading_space": ("The token begins with a space.", lambda text: text.startswith(" ")),
    "capital": (
        "The token's first letter is a capital.",
        lambda text: text.strip()[:1].isupper(),
    ),
    "digit": ("The token has a digit.", lambda text: any(map(str.isdecimal, text))),
    "punctuation": ("The token is punctuation marks and symbols.", _symbols),
    "newline": ("The token has a line break.", lambda text: "\n" in text),
    "white_space": ("The token is white space.", str.isspace),
    "function_word": (
        "The token is one of the commonest English words.",
        lambda text: text.strip().lower() in _FUNCTION_WORDS,
    ),
}


def _keyword(words: frozenset[str]) -> dict[str, tuple[str, Callable[[str], bool]]]:
    return {"keyword": ("The token is a keyword.", lambda text: text.strip() in words)}


def _texts(tokenizer: Any) -> list[str | None]:
    """By id, what a token adds to a text; None where that is no text.

    Some decoders take the space off the first token of a text: so each is decoded after another
    one, whose text is then taken away.
    """
    size = _size(tokenizer)
    # What is added may be marked as special here, or there.
    special = set(getattr(tokenizer, "all_special_ids", ()))
    decode = _decoder(tokenizer)
    alone = [None if i in special else decode([i]) for i in range(size)]
    plain = [
        i for i, text in enumerate(alone) if text and text.isascii() and text.strip().isalpha()
    ]
    if not plain:
        return [None if not text or _BROKEN in text else text for text in alone]
    before = min(plain, key=lambda i: (len(alone[i] or ""), i))
    start = decode([before])
    texts: list[str | None] = []
    for i, text in enumerate(alone):
        added = decode([before, i]) if text is not None else ""
        added = added[len(start) :] if added.startswith(start) else text or ""
        texts.append(None if not added or _BROKEN in added else added)
    return texts


def _size(tokenizer: Any) -> int:
    if hasattr(tokenizer, "get_vocab_size"):
        return int(tokenizer.get_vocab_size())
    try:
        return len(tokenizer)
    except TypeError as error:
        raise TypeError(
            f"{type(tokenizer).__name__} has no vocabulary: expected a tokenizers.Tokenizer or a "
            "tokenizer of transformers"
        ) from error


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """Decodes one text at a time: many at once start threads, of which every later fork warns."""
    # What is around the Rust code in transformers takes ten times as long.
    decode = getattr(getattr(tokenizer, "backend_tokenizer", tokenizer), "decode", None)
    if decode is None:
        raise TypeError(
            f"{type(tokenizer).__name__} cannot decode token ids: expected a tokenizers.Tokenizer "
            "or a tokenizer of transformers"
        )
    return lambda ids: str(decode(ids, skip_special_tokens=True))
