"""What Python says of its source: concepts that need no labels.

Shapes: `character` of a file; `token` of a file; `batch` windows of `position` token ids.
"""

from __future__ import annotations

import ast
import io
import keyword
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from monitor.concepts.naming import LabelledTokens, labelled_tokens
from monitor.labels import FEWEST_SOURCES

_HELP = {
    "comment": "Inside a comment.",
    "string": "Inside a string, its quotes included.",
    "identifier": "A name that is no keyword.",
    "keyword": "A keyword of the language.",
    "operator": "An operator, a bracket or another delimiter.",
    "indented_1": "Code that is indented; among code.",
    "indented_2": "Code at two levels of indentation or more; among code.",
    "indented_3": "Code at three levels of indentation or more; among code.",
    "function_name": "The name of a function where it is defined; among names.",
    "argument": "A name that is a parameter of the function around it; among names.",
}

# Of a file that was cut off, how many statements may be left out so that the rest can be parsed.
_LEFT_OUT = 4

# How deep code is, is told of as concepts: so deep, or deeper.
_DEPTHS = (1, 2, 3)

# In newer Pythons such strings are several tokens, with code between them.
_STRING_BEGINS = {getattr(tokenize, name, None) for name in ("FSTRING_START", "TSTRING_START")} - {
    None
}
_STRING_ENDS = {getattr(tokenize, name, None) for name in ("FSTRING_END", "TSTRING_END")} - {None}

_NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.ENCODING,
}


def python_source(
    texts: Sequence[str], tokenizer: Any, *, context: int = 256, sequences: int = 64
) -> LabelledTokens:
    """Windows of Python source with what the language itself says of each token: the concepts
    `comment`, `string`, `identifier`, `keyword`, `operator`, `function_name`, `argument`, and
    `indented_1`, `indented_2` and `indented_3` for how deep it is.

    Whole files are read, so that a window in the middle of a docstring is known to be there. A
    token is what its first character that is no white space is. Of a file that is cut off the
    beginning counts, as far as it can be read.

    Args:
        texts: whole files.
        tokenizer: a `tokenizers.Tokenizer` or a fast tokenizer of transformers.
        context: tokens of a window.
        sequences: at most so many windows, spread over all files. The windows of a file serve the
            same purpose where there are enough files.

    Raises:
        TypeError: a text or the tokenizer is something else.
        ValueError: there is no text, or `context` or `sequences` is no number of use.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise TypeError("texts: expected a list of files, each as one string")
    for name, value, least in (("context", context, 2), ("sequences", sequences, 1)):
        if type(value) is not int or value < least:
            raise ValueError(f"{name}={value!r}: expected a whole number of at least {least}")
    # A byte order mark is no source, and would keep all of its file from being read.
    plain = [text.removeprefix("\ufeff") for text in texts]
    files = [text.replace("\r\n", "\n").replace("\r", "\n") for text in plain]
    encoded = _Encoder(tokenizer)
    tokens = [encoded(text) for text in files]
    cuts = [
        (number, start)
        for number, (ids, _) in enumerate(tokens)
        # What is left over is less than a window, and none of it where the file is more.
        for start in range(0, max(1, len(ids) - context + 1), context)
        if len(ids) > 1
    ]
    if not cuts:
        raise ValueError(f"texts: {len(files)} files without any text; expected Python source")
    spread = np.linspace(0, len(cuts) - 1, min(sequences, len(cuts))).round().astype(int)
    chosen = [cuts[place] for place in spread]
    per_file = {
        number: _on_tokens(_of_characters(files[number]), files[number], tokens[number][1])
        for number in sorted({number for number, _ in chosen})
    }
    ids = np.zeros((len(chosen), context), dtype=np.int64)
    labels = {name: np.zeros((len(chosen), context), dtype=np.int8) for name in _HELP}
    length = np.zeros(len(chosen), dtype=np.int64)
    for row, (number, start) in enumerate(chosen):
        part = tokens[number][0][start : start + context]
        length[row] = len(part)
        ids[row, : len(part)] = part
        for name, values in labels.items():
            values[row, : len(part)] = per_file[number][name][start : start + context]
    files_there = len(per_file)
    return labelled_tokens(
        labels,
        tokens=torch.from_numpy(ids),
        length=torch.from_numpy(length),
        source=[number for number, _ in chosen] if files_there >= FEWEST_SOURCES else None,
        help=_HELP,
    )


class _Encoder:
    """The token ids of a text, and which of its characters each is."""

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not (hasattr(backend, "encode") and hasattr(backend, "truncation")):
            raise TypeError(
                f"{type(tokenizer).__name__} does not say which characters its tokens are: "
                "expected a tokenizers.Tokenizer or a fast tokenizer of transformers"
            )
        if backend.truncation is not None or backend.padding is not None:
            backend = type(backend).from_str(backend.to_str())
            backend.no_truncation()
            backend.no_padding()
        self._backend = backend

    def __call__(self, text: str) -> tuple[list[int], np.ndarray]:
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)


def _on_tokens(
    of_characters: dict[str, np.ndarray], text: str, offsets: np.ndarray
) -> dict[str, np.ndarray]:
    """What each token is: what its first character that is no white space is."""
    if not text:
        return {name: np.zeros(len(offsets), dtype=np.int8) for name in of_characters}
    start, stop = offsets.T
    blank = np.fromiter(map(str.isspace, text), dtype=bool, count=len(text))
    here = np.where(blank, len(text), np.arange(len(text)))
    visible = np.append(np.minimum.accumulate(here[::-1])[::-1], len(text))[start]
    place = np.where(visible < stop, visible, start).clip(max=len(text) - 1)
    return {name: values[place] * (start < stop) for name, values in of_characters.items()}


@dataclass(slots=True, eq=False)
class _Reading:
    """A file as far as it was read: by kind, where it has what, and by depth, up to the last of
    `_DEPTHS`, where it has code; `end` is how far that is.
    """

    spans: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    code: tuple[list[tuple[int, int]], ...] = field(
        default_factory=lambda: tuple([] for _ in range(max(_DEPTHS) + 1))
    )
    # Where statements begin that are in no other one.
    statements: list[int] = field(default_factory=list)
    end: int = 0

    def add(self, kind: str, start: int, stop: int) -> None:
        self.spans.setdefault(kind, []).append((start, stop))


def _of_characters(text: str) -> dict[str, np.ndarray]:
    """By concept, of every character 1 where it has it, -1 where it lacks it, 0 where it does not
    count.
    """
    lines = text.split("\n")
    begins = np.cumsum([0, *(len(line) + 1 for line in lines)])
    read = _read(text, begins)
    values = {name: np.zeros(len(text), dtype=np.int8) for name in _HELP}
    for name in ("comment", "string", "identifier", "keyword", "operator"):
        values[name][: read.end] = -1
        _mark(values[name], read.spans.get(name, ()), 1)
    for least in _DEPTHS:
        for depth in range(max(_DEPTHS) + 1):
            _mark(values[f"indented_{least}"], read.code[depth], 1 if depth >= least else -1)
    names = read.spans.get("identifier", [])
    _mark(values["function_name"], names, -1)
    _mark(values["function_name"], read.spans.get("function_name", ()), 1)
    parsed, arguments = _parsed(text, read)
    if arguments is not None:
        places = {
            int(begins[line - 1]) + len(lines[line - 1].encode()[:column].decode())
            for line, column in arguments.found
        }
        names = [name for name in names if name[1] <= parsed]
        _mark(values["argument"], names, -1)
        _mark(values["argument"], [name for name in names if name[0] in places], 1)
    return values


def _mark(values: np.ndarray, spans: Sequence[tuple[int, int]], side: int) -> None:
    for start, stop in spans:
        values[start:stop] = side


def _read(text: str, begins: np.ndarray) -> _Reading:
    """The file as `tokenize` reads it, as far as it gets."""
    read, depth, defines, begins_line = _Reading(), 0, False, True
    try:
        for kind, what, start, stop in _tokens(text, begins):
            depth += (kind == tokenize.INDENT) - (kind == tokenize.DEDENT)
            if kind == tokenize.COMMENT:
                read.add("comment", start, stop)
            elif kind == tokenize.NEWLINE:
                begins_line = True
            elif kind not in _NOT_CODE:
                name = _called(kind, what)
                read.add(name, start, stop)
                if name == "identifier" and defines:
                    read.add("function_name", start, stop)
                read.code[min(depth, max(_DEPTHS))].append((start, stop))
                if begins_line and depth == 0:
                    read.statements.append(start)
                defines, begins_line = what == "def", False
            read.end = max(read.end, stop)
    except (tokenize.TokenError, SyntaxError):
        return read
    read.end = len(text)
    return read


def _tokens(text: str, begins: np.ndarray) -> Iterator[tuple[int, str, int, int]]:
    """The tokens of the language: of which kind, what, and from which character to which."""
    strings, string_began = 0, 0
    for kind, what, first, last, _ in tokenize.generate_tokens(io.StringIO(text).readline):
        # Not every Python raises where it can read no further.
        if kind == tokenize.ERRORTOKEN:
            raise tokenize.TokenError(what, first)
        start, stop = (
            min(int(begins[line - 1]) + column, len(text)) for line, column in (first, last)
        )
        if kind in _STRING_BEGINS:
            string_began = start if strings == 0 else string_began
            strings += 1
        elif kind in _STRING_ENDS:
            strings -= 1
            if strings == 0:
                yield tokenize.STRING, text[string_began:stop], string_began, stop
        elif strings == 0:
            yield kind, what, start, stop


def _called(kind: int, what: str) -> str:
    """What a token of the language is."""
    if kind == tokenize.NAME:
        return "keyword" if keyword.iskeyword(what) else "identifier"
    return {tokenize.STRING: "string", tokenize.OP: "operator"}.get(kind, "other")


def _parsed(text: str, read: _Reading) -> tuple[int, _Arguments | None]:
    """The arguments in the file, or in its beginning up to one of the last statements; and how much
    that is.
    """
    arguments = _Arguments()
    for end in [len(text), *read.statements[: -_LEFT_OUT - 1 : -1]]:
        try:
            # What is odd in somebody's source is nobody's concern here.
            with warnings.catch_warnings(action="ignore"):
                arguments.visit(ast.parse(text[:end]))
            return end, arguments
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            arguments = _Arguments()
    return 0, None


class _Arguments(ast.NodeVisitor):
    """Where names are that are parameters of the function around them: line and column in bytes."""

    def __init__(self) -> None:
        self.found: list[tuple[int, int]] = []
        self._parameters: frozenset[str] = frozenset()

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in self._parameters:
            self.found.append((node.lineno, node.col_offset))

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """What is inside a string is part of the string."""

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for outside in (*node.decorator_list, node.returns):
            if outside is not None:
                self.visit(outside)
        self._visit_inside(node.args, node.body)

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._visit_inside(node.args, [node.body])

    def _visit_inside(self, arguments: ast.arguments, body: Sequence[ast.AST]) -> None:
        parameters = [
            *arguments.posonlyargs,
            *arguments.args,
            *arguments.kwonlyargs,
            *(one for one in (arguments.vararg, arguments.kwarg) if one is not None),
        ]
        # Defaults and annotations are no part of the function.
        defaults = [default for default in arguments.kw_defaults if default is not None]
        annotations = [one.annotation for one in parameters if one.annotation is not None]
        for outside in (*arguments.defaults, *defaults, *annotations):
            self.visit(outside)
        self.found += [(one.lineno, one.col_offset) for one in parameters]
        around, self._parameters = self._parameters, frozenset(one.arg for one in parameters)
        for inside in body:
            self.visit(inside)
        self._parameters = around
