"""Tokenizers as models have them, trained in a blink; and characters as tokens."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPOKEN = "The cat and the dog, 12 of them. Not 3!\n  A word in the rest; über naïve 日本\n" * 4


def _trained(tokenizer: Tokenizer, trainer: object, texts: list[str]) -> Tokenizer:
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def byte_level(texts: list[str] | None = None, size: int = 400) -> Tokenizer:
    """As GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    return _trained(tokenizer, trainer, texts or [SPOKEN])


def metaspace() -> Tokenizer:
    """As Llama 2's: its decoder takes the space off the first token of a text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False)
    return _trained(tokenizer, trainer, [SPOKEN])


def word_piece() -> Tokenizer:
    """As BERT's: what goes on with a word is marked, and not what begins one."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=150, special_tokens=["[UNK]"], show_progress=False
    )
    return _trained(tokenizer, trainer, [SPOKEN])


def characters(text: str) -> Tokenizer:
    """Every character of `text` a token."""
    vocabulary = {character: number for number, character in enumerate(sorted(set(text)))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer
