"""Text to token ids and back, exactly: a byte-level BPE tokenizer read from a tokenizer.json.

Knows the bytes of every token, so that text can be cut at any token without loss. Needs no torch.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from model.small_files import read_small_text

TOKENIZER_FILE = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
# A file from elsewhere must not size our memory at will. The largest vocabularies in use take half of the bytes.
MAX_FILE_BYTES = 64 << 20
"""Of a tokenizer.json that is read."""
_MAX_TOKENS = 1 << 21


def byte_to_char() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary.

    Bytes that print as themselves in Latin-1 keep their character, the others (controls, spaces, 0xAD) take
    the code points from U+0100 on in order of their value: the convention of GPT-2's vocabulary files.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


class Tokenizer:
    """A byte-level BPE vocabulary.

    Text typed by a user never turns into a special token: `encode` treats `<|endoftext|>` as plain characters
    unless told otherwise. Reading is safe from several threads.
    """

    def __init__(self, serialized: str) -> None:
        """Takes the text of a tokenizer.json, `serialized`; ValueError where it is not a byte-level BPE tokenizer."""
        self.serialized = serialized
        self._plain = _build(serialized)
        self._plain.encode_special_tokens = True
        added = self._plain.get_added_tokens_decoder()
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        self._bytes = _token_table(self._plain.get_vocab(with_added_tokens=True), set(added))
        self._whole_texts: dict[int, str | None] = {}

    @classmethod
    def from_file(cls, path: Path | str) -> "Tokenizer":
        """Reads a tokenizer.json; ValueError naming the file where it cannot be used, OSError where unread."""
        try:
            return cls(read_small_text(path, MAX_FILE_BYTES))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def load(cls, directory: Path | str) -> "Tokenizer | None":
        """The tokenizer of a model directory, or None where it has no tokenizer.json (token ids only)."""
        path = Path(directory) / TOKENIZER_FILE
        return cls.from_file(path) if path.exists() else None

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id, special tokens included."""
        return len(self._bytes)

    @property
    def eos_token_id(self) -> int | None:
        """The id of `<|endoftext|>`, or None where the vocabulary lacks it."""
        return self._plain.token_to_id(END_OF_TEXT)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The token ids of `text`; nothing is added in front or behind.

        `allow_special` turns the spelling of a special token into that token. ValueError where the text holds
        an unpaired surrogate, which no bytes can stand for.
        """
        _refuse_surrogates(text)
        backend = self._with_special if allow_special else self._plain
        return backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD, ids without a token become nothing."""
        return self.bytes_of(ids, skip_special).decode("utf-8", errors="replace")

    def bytes_of(self, ids: Sequence[int], skip_special: bool = True) -> bytes:
        """The exact bytes that `ids` stand for, in order."""
        return b"".join([self.token_bytes(token_id, skip_special) for token_id in ids])

    def token_bytes(self, token_id: int, skip_special: bool = True) -> bytes:
        """The exact bytes of one token, which may be part of a character.

        Empty for an id without a token, and for a special token unless `skip_special` is False.
        """
        if not 0 <= token_id < len(self._bytes) or (skip_special and token_id in self._special):
            return b""
        return self._bytes[token_id]

    def whole_text(self, token_id: int) -> str | None:
        """The text of one token that is whole characters by itself; None for any other, and for a marker."""
        try:
            return self._whole_texts[token_id]
        except KeyError:
            return self._note_whole_text(token_id)

    def _note_whole_text(self, token_id: int) -> str | None:
        if not 0 <= token_id < len(self._bytes):
            return None
        try:
            text = None if token_id in self._special else self._bytes[token_id].decode()
        except UnicodeDecodeError:
            text = None
        self._whole_texts[token_id] = text
        return text

    @cached_property
    def ids_by_bytes(self) -> dict[bytes, tuple[int, ...]]:
        """The ids of the tokens that stand for some bytes, markers left out."""
        found: dict[bytes, tuple[int, ...]] = {}
        for token_id, text in enumerate(self._bytes):
            if text and token_id not in self._special:
                found[text] = (*found.get(text, ()), token_id)
        return found

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a marker of the vocabulary rather than text."""
        return token_id in self._special

    @cached_property
    def _with_special(self) -> tokenizers.Tokenizer:
        # A second instance, because whether markers are parsed is a switch of the whole tokenizer.
        return _build(self.serialized)


def _build(serialized: str) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(serialized)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"not a tokenizer.json: {error}") from None
    decoder = json.loads(serialized).get("decoder") or {}
    if not _is_byte_level(decoder):
        raise ValueError(f"its decoder is {decoder.get('type', 'missing')}; only ByteLevel tokenizers are served")
    backend.no_truncation()
    backend.no_padding()
    if backend.token_to_id(END_OF_TEXT) is not None:
        # Some files keep it as an ordinary entry; it is a marker all the same.
        backend.add_special_tokens([END_OF_TEXT])
    return backend


def _is_byte_level(decoder: dict[str, Any]) -> bool:
    if decoder.get("type") == "Sequence":
        return [part.get("type") for part in decoder.get("decoders", [])] == ["ByteLevel"]
    return decoder.get("type") == "ByteLevel"


def _token_table(vocabulary: dict[str, int], added: set[int]) -> list[bytes]:
    to_byte = {ord(char): byte for byte, char in byte_to_char().items()}
    num_ids = max(vocabulary.values(), default=-1) + 1
    if num_ids > _MAX_TOKENS:
        raise ValueError(f"it has the token id {num_ids - 1}; at most {_MAX_TOKENS - 1} is served")
    table = [b""] * num_ids
    for token, token_id in vocabulary.items():
        spelled = token_id in added or any(ord(char) not in to_byte for char in token)
        table[token_id] = token.encode() if spelled else token.translate(to_byte).encode("latin-1")
    return table


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text holds an unpaired surrogate at character {error.start}") from None
