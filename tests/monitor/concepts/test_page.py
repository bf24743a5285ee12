"""The page on concepts is true: its Python runs in order, and it names every built-in concept."""

import re
from pathlib import Path

import torch

import monitor.concepts
from monitor.concepts import from_tokenizer, python_source
from tests.models import AttentionOnly
from tests.models.planted_words import WORD
from tests.monitor.concepts.tokenizers import byte_level

PAGE = Path(__file__).parents[3].joinpath("docs", "concepts.md").read_text()
FILES = [path.read_text() for path in Path(monitor.concepts.__path__[0]).glob("*.py")]


def test_every_python_block_of_the_page_runs_in_order():
    torch.manual_seed(0)
    tokenizer = byte_level(FILES)
    vocabulary = tokenizer.get_vocab_size()
    tokens = torch.randint(vocabulary, (20, 64))
    names = {
        "model": AttentionOnly(vocab_size=vocabulary),
        "held_out_tokens": tokens,
        "newline_id": tokenizer.encode("\n").ids[0],
        "french_ids": [row[: 3 + i].tolist() for i, row in enumerate(tokens[:8])],
        "english_ids": list(tokens[8:16]),
        "tagged_ids": tokens,
        "is_noun": tokens % 2 == 0,
        "is_verb": tokens % 3 == 0,
        "word": WORD,
        "tokenizer": tokenizer,
        "files": FILES,
    }
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, names)
    assert names["newline"].label(torch.tensor([[names["newline_id"], 0]])).tolist() == [
        [True, False]
    ]
    assert set(names["tables"]["analogies"]["relation"]) == {"royalty"}


def test_every_built_in_concept_is_on_the_page():
    tokenizer = byte_level(FILES)
    from_ids = {concept.name for concept in from_tokenizer(tokenizer, keywords=["def"])}
    from_python = set(python_source(FILES, tokenizer).labels)
    by_table = [
        set(
            re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", part, flags=re.MULTILINE)))
        )
        for part in PAGE.split("\n\n")
        if part.startswith("| `")
    ]
    assert by_table == [from_ids | {"from_tokenizer"}, from_python | {"python_source"}]
