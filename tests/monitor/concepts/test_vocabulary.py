"""What tokenizers of all kinds say of their tokens: against the characters of tokens whose text is
known, and through what can mislead: spaces that decoders take off, bytes, special tokens.
"""

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from monitor.concepts import from_tokenizer
from tests.monitor.concepts.tokenizers import byte_level, characters, metaspace, word_piece


def sides(tokenizer, name, **more):
    """By the text of each token as the vocabulary has it, the label."""
    (concept,) = [one for one in from_tokenizer(tokenizer, **more) if one.name == name]
    vocabulary = tokenizer.get_vocab()
    ids = torch.tensor([list(vocabulary.values())])
    return dict(zip(vocabulary, concept.label(ids)[0].tolist(), strict=True))


KNOWN = {
    # Ġ is a space and Ċ a line break, as such vocabularies write them.
    "leading_space": {"Ġthe": 1, "Ġ": 1, "the": -1, "T": -1, "Ċ": -1, ",": -1},
    "capital": {"The": 1, "T": 1, "Ġthe": -1, "1": -1},
    "digit": {"1": 1, "Ġ12": 1, "The": -1, "Ċ": -1},
    "punctuation": {",": 1, "!": 1, ";": 1, "Ġ": -1, "the": -1, "1": -1, "Ċ": -1},
    "newline": {"Ċ": 1, "Ġ": -1, "the": -1},
    "white_space": {"Ġ": 1, "Ċ": 1, "Ġthe": -1, ",": -1},
    "function_word": {"Ġthe": 1, "The": 1, "Ġand": 1, "Ġcat": -1, "T": -1, ",": -1},
}


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("of_transformers", [False, True])
def test_byte_level_tokens(name, of_transformers):
    tokenizer = byte_level()
    if of_transformers:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    found = sides(tokenizer, name)
    assert KNOWN[name].keys() <= found.keys()
    assert {text: found[text] for text in KNOWN[name]} == KNOWN[name]
    # A special token, and bytes that are no whole character.
    assert found["<|endoftext|>"] == 0
    assert [found[half] for half in ("Ã", "æ", "å")] == [0, 0, 0]


@pytest.mark.parametrize("tokenizer", [byte_level(), metaspace(), word_piece()])
def test_every_token_is_what_its_text_says(tokenizer):
    """A token's text by what is added to a known one, from the marks that a vocabulary uses."""
    kind = type(tokenizer.model).__name__
    spaced = sides(tokenizer, "leading_space")
    counted = {text: side for text, side in spaced.items() if side}
    assert len(counted) > 50
    for text, side in counted.items():
        if kind == "WordPiece":
            assert (side == 1) == (not text.startswith("##")), text
        else:
            assert (side == 1) == text.startswith(("Ġ", "▁")), text


def test_words_of_a_vocabulary_whose_decoder_takes_spaces_off():
    found = sides(metaspace(), "function_word")
    assert (found["▁the"], found["▁and"], found["▁cat"]) == (1, 1, -1)


def test_keywords_are_those_that_are_given():
    assert "keyword" not in {concept.name for concept in from_tokenizer(byte_level())}
    found = sides(byte_level(), "keyword", keywords=["cat", "dog"])
    assert {text for text, side in found.items() if side == 1} >= {"Ġcat", "Ġdog"}
    assert all((side == 1) == (text.strip("Ġ") in {"cat", "dog"}) for text, side in found.items())
    with pytest.raises(TypeError, match="keywords= is 'cat'; expected a list of words"):
        from_tokenizer(byte_level(), keywords="cat")


def test_what_all_tokens_have_or_none_is_left_out():
    names = {concept.name for concept in from_tokenizer(characters("ab1 "))}
    assert names == {"leading_space", "digit", "white_space", "function_word"}


def test_ids_beyond_the_tokenizers_do_not_count():
    tokenizer = characters("ab1 ")
    for concept in from_tokenizer(tokenizer):
        inside, *beyond = concept.label(torch.tensor([[0, 4, 5, 10**6]]))[0].tolist()
        assert inside in {1, -1}
        assert beyond == [0, 0, 0]
        assert concept.help.endswith(".")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("gpt2", "str cannot decode token ids: expected a tokenizers.Tokenizer"),
        (None, "NoneType has no vocabulary: expected a tokenizers.Tokenizer"),
        (Tokenizer(models.BPE()), "Tokenizer says of none of its tokens what text it is"),
    ],
)
def test_what_is_no_tokenizer(given, message):
    with pytest.raises(TypeError, match=message):
        from_tokenizer(given)
