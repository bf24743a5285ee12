"""What each character of Python source is, by walking over the characters one at a time."""

from __future__ import annotations

import keyword

_OPERATORS = "+-*/%@&|^~<>()[]{},:.;=!"


def of_characters(text: str) -> list[str]:
    """Of every character: comment, string, identifier, keyword, operator or other.

    For files that are whole, and numbers in digits.
    """
    kinds: list[str] = []
    while len(kinds) < len(text):
        start = len(kinds)
        kind, length = _next(text, start)
        kinds += [kind] * length
    return kinds


def _next(text: str, start: int) -> tuple[str, int]:
    if text[start] == "#":
        end = text.find("\n", start)
        return "comment", (len(text) if end < 0 else end) - start
    stop = start
    while stop < len(text) and (text[stop].isalnum() or text[stop] == "_"):
        stop += 1
    word = text[start:stop]
    if stop < len(text) and text[stop] in "'\"" and word.lower() in _prefixes():
        return "string", _string_end(text, stop) - start
    if word:
        if word[0].isdigit():
            rest = text[stop:]
            return "other", len(word) + len(rest) - len(rest.lstrip(".0123456789"))
        return "keyword" if keyword.iskeyword(word) else "identifier", len(word)
    return "operator" if text[start] in _OPERATORS else "other", 1


def _prefixes() -> set[str]:
    return {"", "r", "u", "b", "f", "br", "rb", "fr", "rf"}


def _string_end(text: str, start: int) -> int:
    quote = text[start : start + 3] if text[start : start + 3] == text[start] * 3 else text[start]
    place = start + len(quote)
    while text[place : place + len(quote)] != quote:
        # Even in raw strings what follows a backslash ends nothing.
        place += 2 if text[place] == "\\" else 1
    return place + len(quote)


def depth_of_lines(text: str) -> list[int]:
    """By line its indentation, in steps of four spaces: for files without brackets or strings that
    go over several lines.
    """
    return [(len(line) - len(line.lstrip(" "))) // 4 for line in text.split("\n")]
