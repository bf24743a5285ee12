"""The demo's text: the source code of the Python standard library.

It is on every machine that can run the demo, so nothing is downloaded, and source code repeats its
names so often that copying what followed last time soon pays.
"""

import os
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__"})

# Every tenth file, counted in sorted order, is held out whole: windows of one file share its names,
# so a split inside files would let a model score well on names that it had memorised.
_HELD_OUT_EVERY = 10

# Long files (tables, help texts, reference modules) would fill most of the corpus. What this leaves
# is about as many tokens as the demo's training draws, and takes half the time to encode.
_CHARACTERS_PER_FILE = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Text as tokens, split by file.

    `train` and `held_out` are int64 tensors of shape [token]: one file after the other;
    `held_out_texts` are the held-out files, as far as they are read.
    """

    train: Tensor
    held_out: Tensor
    held_out_texts: tuple[str, ...]
    tokenizer: Tokenizer


def load(vocabulary: int = 512) -> Corpus:
    """Read the standard library and encode it with a byte-pair vocabulary of `vocabulary` tokens.

    The same Python installation gives the same tokens every time. The vocabulary is trained on the
    training files only.

    Raises ValueError if `vocabulary` cannot hold the 256 bytes, and RuntimeError if this Python
    came without its source files.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocabulary < len(alphabet):
        raise ValueError(
            f"vocabulary is {vocabulary}; a byte-level vocabulary needs at least {len(alphabet)}, "
            "one token for each byte: pass a larger one"
        )
    texts = _texts(Path(sysconfig.get_paths()["stdlib"]))
    held_out = texts[::_HELD_OUT_EVERY]
    train = [text for number, text in enumerate(texts) if number % _HELD_OUT_EVERY]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    with _single_threaded():
        tokenizer.train_from_iterator(
            train,
            trainers.BpeTrainer(
                vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False
            ),
        )
    return Corpus(
        train=_encode(tokenizer, train),
        held_out=_encode(tokenizer, held_out),
        held_out_texts=tuple(held_out),
        tokenizer=tokenizer,
    )


def _texts(root: Path) -> list[str]:
    """Read the beginning of every source file under `root`, in sorted order."""
    names = sorted(
        name
        for name in (path.relative_to(root) for path in root.rglob("*.py"))
        if _LEFT_OUT.isdisjoint(name.parts)
    )
    if len(names) < _HELD_OUT_EVERY:
        raise RuntimeError(
            f"found {len(names)} source files (*.py) of the Python standard library under {root}; "
            f"the demo trains on them and needs at least {_HELD_OUT_EVERY}. This Python came "
            "without them, or with them in an archive: run the demo with a Python installed from "
            "python.org, a package manager, uv or conda"
        )
    return [
        (root / name).read_text("utf-8", errors="replace")[:_CHARACTERS_PER_FILE] for name in names
    ]


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    return torch.cat(
        [torch.tensor(tokenizer.encode(text).ids, dtype=torch.int64) for text in texts]
    )


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Keep `tokenizers` from starting threads, about which it warns at every later fork."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
