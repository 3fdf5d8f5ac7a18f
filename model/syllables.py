"""A byte-level BPE vocabulary of any size for models that were never trained: made-up words instead of learned ones."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, product

from model.gpt2_tokenizer import byte_level_bpe_json

_PRINTED = bytes(range(0x20, 0x7F))
_OTHERS = bytes(byte for byte in range(256) if byte not in _PRINTED)
_SYLLABLES = [bytes(pair) for pair in product(b"bcdfghjklmnpqrstvwxyz", b"aeiou")]

NUM_UNPRINTED = len(_OTHERS) + 1
"""Last ids of every such vocabulary: the bytes that alone are no visible text, and `<|endoftext|>`."""
MIN_VOCAB_SIZE = len(_PRINTED) + NUM_UNPRINTED


def syllable_tokenizer_json(vocab_size: int) -> str:
    """The text of a tokenizer.json with `vocab_size` ids, of which all but the last `NUM_UNPRINTED` are visible text.

    Raises ValueError where that is less than `MIN_VOCAB_SIZE`, or more than there are made-up words.
    """
    num_words = vocab_size - MIN_VOCAB_SIZE
    if num_words < 0:
        raise ValueError(f"vocab_size: expected {MIN_VOCAB_SIZE} or more, got {vocab_size}")
    tokens = [bytes([byte]) for byte in _PRINTED] + list(islice(_words(), num_words))
    if len(tokens) < len(_PRINTED) + num_words:
        raise ValueError(f"vocab_size: there are words for {len(tokens) + NUM_UNPRINTED} ids, got {vocab_size}")
    tokens += [bytes([byte]) for byte in _OTHERS]
    return byte_level_bpe_json({token: rank for rank, token in enumerate(tokens)})


def _words() -> Iterator[bytes]:
    """Every syllable, then words of one, two and three behind a space: each made of two that came before it."""
    yield from _SYLLABLES
    words = [b" "]
    for _ in range(3):
        words = [word + syllable for word in words for syllable in _SYLLABLES]
        yield from words
