"""Concepts in trainings by the Trainer of transformers: by default those of its tokenizer, else the
user's, and nothing that a tokenizer may do stops training.
"""

import string

import pytest
from transformers import PreTrainedTokenizerFast

import monitor
from tests.callbacks.huggingface.rows import HELD_OUT, Rows
from tests.models.concepts import CONCEPTS
from tests.monitor.concepts.tokenizers import characters

# More tokens than the model has.
TOKENIZER = characters(string.ascii_letters + string.digits + " ,.;")


def names(root) -> set[tuple[str, ...]]:
    stored = monitor.read(root, "stimuli").query("stimulus == 'concepts'")
    assert len(stored) == 7
    return {tuple(name for name, _ in row) for row in stored["labels"]}


@pytest.fixture
def train(trainer, dynamics, root):
    def train(tokenizer, **more):
        watching = dynamics(schedule=1, **more)
        running = trainer(watching, held_out=Rows(HELD_OUT), max_steps=1)
        running.processing_class = tokenizer
        running.train()
        return names(root)

    return train


def test_by_default_they_are_those_of_the_tokenizer(train):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER)
    expected = ("leading_space", "capital", "digit", "punctuation", "white_space", "function_word")
    assert train(tokenizer) == {expected}


@pytest.mark.parametrize(("concepts", "expected"), [([], ()), (CONCEPTS[:1], ("even",))])
def test_the_users_come_first(train, concepts, expected):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER)
    assert train(tokenizer, concepts=concepts) == {expected}


class Images:
    """What a Trainer of images may have for a tokenizer."""


class Failing:
    def __len__(self):
        return 10

    def decode(self, ids, **more):
        raise RuntimeError("not today")


@pytest.mark.parametrize("tokenizer", [None, Images(), Failing()])
def test_what_is_no_tokenizer_stops_nothing(train, tokenizer):
    assert train(tokenizer) == {()}
