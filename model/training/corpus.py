"""Texts as documents, and which of them are held out. Free of torch."""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Collection
from pathlib import Path

from model.tokenizer import END_OF_TEXT


def text_files(path: Path) -> list[Path]:
    """`path` itself, or the files of a directory and of those in it, in the order of their names; no hidden ones."""
    if not path.is_dir():
        return [path]
    inside = (file for file in sorted(path.rglob("*")) if file.is_file())
    return [file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts)]


def read_documents(path: Path, form: str = "text") -> list[str]:
    """The documents of a UTF-8 file, plain or .xz, or of a directory of them: stripped, empty ones left out.

    `form` is one of a recipe's formats. Raises OSError where a file cannot be read, ValueError naming it where it is
    not of that form.
    """
    found: list[str] = []
    for file in text_files(path):
        try:
            content = file.read_bytes()
            text = (lzma.decompress(content) if file.suffix == ".xz" else content).decode()
            found += text.split(END_OF_TEXT) if form == "text" else map(_json_document, text.splitlines())
        except (lzma.LZMAError, ValueError, RecursionError) as error:
            raise ValueError(f"{file}: {error}") from None
    return [document for part in found if (document := part.strip())]


def _json_document(line: str) -> str:
    value = json.loads(line) if line.strip() else ""
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise ValueError(f"expected a string, or an object with a string `text`, on every line, got {line[:60]!r}")  # noqa: TRY004
    return text


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
