"""Texts as documents, and which of them are held out. Free of torch."""

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Collection
from pathlib import Path

from model.tokenizer import END_OF_TEXT


def read_documents(path: Path) -> list[str]:
    """The documents of a UTF-8 file, plain or .xz, separated by `<|endoftext|>`: stripped, empty ones left out.

    Raises OSError where the file cannot be read, ValueError naming it where it is not such a text.
    """
    try:
        content = path.read_bytes()
        text = (lzma.decompress(content) if path.suffix == ".xz" else content).decode()
    except (lzma.LZMAError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    return [document for part in text.split(END_OF_TEXT) if (document := part.strip())]


def document_hash(document: str) -> bytes:
    """Identifies a document by its text, wherever it lies."""
    return hashlib.sha256(document.encode()).digest()


def is_held_out(digest: bytes, share: float) -> bool:
    """Whether the document of this hash belongs to the `share` of all documents that is never trained on."""
    return int.from_bytes(digest[:8], "big") < share * 2**64


def split(documents: list[str], share: float, never: Collection[bytes]) -> tuple[list[str], list[str]]:
    """Documents to train on, and those held out; the hashes in `never` are in neither."""
    train, held_out = [], []
    for document in documents:
        digest = document_hash(document)
        if is_held_out(digest, share):
            held_out.append(document)
        elif digest not in never:
            train.append(document)
    return train, held_out
