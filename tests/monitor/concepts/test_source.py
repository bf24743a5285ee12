"""What Python says of its source: against a walk over single characters, known answers for names
and indentation, files that are cut off or no Python, and tokens longer than a character.
"""

import ast
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import monitor.concepts
from monitor.concepts import python_source
from tests.monitor.concepts.tokenizers import byte_level, characters
from tests.oracles.source import depth_of_lines, of_characters

KINDS = ("comment", "string", "identifier", "keyword", "operator")
NAMES = (*KINDS, "indented_1", "indented_2", "indented_3", "function_name", "argument")

SAMPLE = '''\
import os  # the system's
@wraps(size)
def first(one, *two, three: one = one, **four) -> size:
    """Says 'def second(one)' and # is no comment."""
    if one and f"{one} of {'two'}":
        total = one + two[0] - size.one(three=3)
        return lambda size, ü=one: size * ü * one
    class Inner:
        kept = one
        async def inner(self, été):
            return self.one, été, one

one = r'a\\'b' if two else first(one=size)
'''


def labels(text, **more):
    """Of each character of a file."""
    found = python_source([text], characters(text), context=len(text), **more)
    assert found.tokens.shape == (1, len(text))
    return {name: values[0].tolist() for name, values in found.labels.items()}


def having(text, name, side=1):
    """Words of characters next to each other that have a concept."""
    found, words, before = labels(text)[name], [], False
    for character, one in zip(text, found, strict=True):
        if one == side:
            words = [*words[:-1], words[-1] + character] if before else [*words, character]
        before = one == side
    return words


@pytest.mark.parametrize(
    "text",
    [SAMPLE, *(path.read_text() for path in Path(monitor.concepts.__path__[0]).glob("*.py"))],
)
def test_characters_are_what_walking_over_them_says(text):
    found, expected = labels(text), of_characters(text)
    for name in KINDS:
        assert found[name] == [1 if kind == name else -1 for kind in expected], name


def test_names_where_functions_are_defined_among_names():
    assert having(SAMPLE, "function_name") == ["first", "inner"]
    found = labels(SAMPLE)
    counted = [side != 0 for side in found["function_name"]]
    assert counted == [side == 1 for side in found["identifier"]]


def test_arguments_of_the_function_around_them():
    # By hand, in the order of the text. In `wraps(size)`, annotations, attributes and names of
    # keyword arguments are none, nor what is a parameter further out alone; a default belongs to
    # the function further out.
    signature, condition, total = "one two three four", "one", "one two"
    in_lambda, in_class, inner = "size ü one size ü", "one", "self été self été"
    expected = f"{signature} {condition} {total} {in_lambda} {in_class} {inner}".split()
    assert having(SAMPLE, "argument") == expected
    assert "size" in having(SAMPLE, "argument", side=-1)


@pytest.mark.parametrize("least", [1, 2, 3])
def test_indentation_of_code(least):
    text = (
        "def f():\n    # far\n    if a:\n        b = (1 +\n 2)\n\n        c\n"
        "        if g:\n            if h:\n                i\n    d\ne  # near\n"
    )
    found = labels(text)[f"indented_{least}"]
    lines = [line for line, depth in enumerate(depth_of_lines(text)) if depth >= least]
    # Inside brackets a line is as deep as what it goes on with.
    lines += [4] if least <= 2 else []
    of_line = [text[:place].count("\n") for place in range(len(text))]
    code = "deff():ifa:b=(1+2)cifg:ifh:ide"
    assert "".join(c for c, side in zip(text, found, strict=True) if side) == code
    assert all(
        (side == 1) == (line in lines) for side, line in zip(found, of_line, strict=True) if side
    )


def test_a_byte_order_mark_is_no_source():
    found, marked = (
        python_source([text], characters("\ufeff" + SAMPLE), context=64, sequences=4)
        for text in (SAMPLE, "\ufeff" + SAMPLE)
    )
    assert torch.equal(found.tokens, marked.tokens)
    assert torch.equal(found.labels["keyword"], marked.labels["keyword"])


@pytest.mark.parametrize(
    "cut", ['    x = """never ends\n', "    x = 'never ends\n", "    x = (1,\n", "\tx\n  y\n"]
)
def test_of_a_file_that_is_cut_off_the_beginning_counts(cut):
    text = SAMPLE + "def second(five):\n" + cut
    found, whole = labels(text), labels(SAMPLE)
    for name in NAMES:
        assert found[name][: len(SAMPLE)] == whole[name], name
    # Of the last function nothing is known of its arguments, and nothing beyond what was read.
    assert set(found["argument"][len(SAMPLE) :]) == {0}
    assert found["function_name"][len(SAMPLE) + 4] == 1
    if "never" in cut:
        assert {found[name][-3] for name in NAMES} == {0}


def test_what_is_no_python_has_names_at_most():
    found = labels("Dear Sir, I can't say what $ this is? Yours\n")
    assert set(found["argument"]) == {0}
    assert found["identifier"][0] == 1
    assert found["identifier"][-3] == 0


def test_odd_source_warns_nobody_and_line_ends_are_all_the_same():
    assert having("x = '\\d' is 1\n", "string") == ["'\\d'"]
    crlf = SAMPLE.replace("\n", "\r\n")
    tokenizer = characters(SAMPLE)
    one, other = (python_source([text], tokenizer, context=40) for text in (SAMPLE, crlf))
    assert torch.equal(one.tokens, other.tokens)
    assert all(torch.equal(one.labels[name], other.labels[name]) for name in NAMES)


@pytest.mark.parametrize("of_transformers", [False, True])
def test_tokens_are_what_their_first_visible_character_is(of_transformers):
    tokenizer = byte_level([SAMPLE], size=320)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    given = PreTrainedTokenizerFast(tokenizer_object=tokenizer) if of_transformers else tokenizer
    found = python_source([SAMPLE], given, context=16)
    assert tokenizer.truncation is not None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    encoding = tokenizer.encode(SAMPLE)
    whole = len(encoding.ids) // 16 * 16
    assert found.tokens.flatten().tolist() == encoding.ids[:whole]
    assert max(map(len, encoding.tokens)) > 4
    kinds = of_characters(SAMPLE)
    for name in KINDS:
        expected = []
        for start, stop in encoding.offsets[:whole]:
            visible = [at for at in range(start, stop) if not SAMPLE[at].isspace()]
            expected.append(1 if kinds[visible[0] if visible else start] == name else -1)
        assert found.labels[name].flatten().tolist() == expected, name


def test_windows_are_spread_over_files_that_stay_together():
    texts = [f"name_{number} = {number}\n" * 40 for number in range(10)]
    tokenizer = characters("".join(texts))
    found = python_source(["", *texts, "x"], tokenizer, context=50, sequences=25)
    assert found.tokens.shape == (25, 50)
    assert found.source.tolist() == sorted(found.source.tolist())
    assert len(found.source.unique()) == 10
    assert len(found.tokens.unique(dim=0)) == 25
    # With few files the windows are all that can be kept apart.
    few = python_source(texts[:3], tokenizer, context=50, sequences=25)
    assert few.source.tolist() == list(range(len(few.tokens)))


def test_short_files_are_padded():
    found = python_source(["a = 1\n", "bb = 22  # c\n"], characters("abc = 12#\n"), context=8)
    assert found.length.tolist() == [6, 8]
    assert [values[0, 6:].tolist() for values in found.labels.values()] == [[0, 0]] * len(NAMES)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("x = 1", characters("x")), TypeError, "expected a list of files, each as one string"),
        (([b"x"], characters("x")), TypeError, "expected a list of files, each as one string"),
        ((["x = 1"], "gpt2"), TypeError, "str does not say which characters its tokens are"),
        (([""], characters("x")), ValueError, "1 files without any text"),
        (([], characters("x")), ValueError, "0 files without any text"),
    ],
)
def test_arguments_of_no_use(arguments, error, message):
    with pytest.raises(error, match=message):
        python_source(*arguments)


@pytest.mark.parametrize("argument", [{"context": 1}, {"context": 2.0}, {"sequences": 0}])
def test_numbers_of_no_use(argument):
    with pytest.raises(ValueError, match=f"{next(iter(argument))}=.*: expected a whole number"):
        python_source(["x = 1"], characters("x"), **argument)


def test_the_sample_is_python():
    assert ast.parse(SAMPLE)


def test_an_expression_too_deep_to_walk_through_costs_what_follows_it_alone():
    text = "def f(one):\n    return one\n\n\ndeep = " + " + ".join(["x"] * 900) + "\n"
    assert having(text, "function_name") == ["f"]
    assert having(text, "argument")[:2] == ["one", "one"]
