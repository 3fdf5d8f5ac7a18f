"""Packed token files: every source's documents as one run of ids, memory-mapped; and the manifest beside them.

Free of torch. The files are made once; the manifest says of what, and whether they still fit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from model.tokenizer import END_OF_TEXT, TOKENIZER_FILE, Tokenizer
from model.training.corpus import document_hash, read_documents, split, text_files
from model.training.recipe import Data

MANIFEST_FILE = "manifest.json"
VALIDATION = "validation"

Ids = NDArray[np.uint16] | NDArray[np.uint32]


@dataclass(frozen=True)
class PackedTokens:
    """What a run trains and validates on. The arrays are maps of files, read where they are used."""

    tokenizer: Tokenizer
    sources: tuple[Ids, ...]
    """One run of ids per source of the recipe, in its order; each document is followed by the end token."""
    validation: Ids
    digest: str
    """Identifies all of it."""


def pack(data: Data, directory: Path, *, is_final: bool = False) -> PackedTokens:
    """The packed tokens in `directory`, made now unless they are there and of the same data.

    Raises OSError where a text cannot be read or written, ValueError where it or the tokenizer cannot be used; and,
    with `is_final`, where other tokens are there.
    """
    wanted = _description(data)
    manifest = directory / MANIFEST_FILE
    is_there = manifest.exists()
    if not is_there or json.loads(manifest.read_text(encoding="utf-8"))["data"] != wanted:
        if is_there and is_final:
            raise ValueError(f"{directory}: not of the texts that the run began with; give another run.directory")
        _write(data, wanted, directory)
    return open_packed(directory)


def open_packed(directory: Path) -> PackedTokens:
    """Maps the files that `pack` has made. Raises ValueError where a file is not as long as the manifest says."""
    text = (directory / MANIFEST_FILE).read_text(encoding="utf-8")
    manifest = json.loads(text)
    dtype = np.dtype(manifest["dtype"])
    arrays = {}
    for name, facts in manifest["files"].items():
        array: Ids = np.memmap(directory / name, dtype, mode="r") if facts["tokens"] else np.zeros(0, dtype)
        if len(array) != facts["tokens"]:
            raise ValueError(f"{directory / name}: holds {len(array)} tokens, the manifest says {facts['tokens']}")
        arrays[name] = array
    *sources, validation = arrays.values()
    digest = hashlib.sha256(text.encode()).hexdigest()
    return PackedTokens(Tokenizer.from_file(directory / TOKENIZER_FILE), tuple(sources), validation, digest)


def _description(data: Data) -> dict[str, Any]:
    """What determines the files' contents."""
    return {
        "sources": [[source.format, *map(_file_digest, text_files(source.path))] for source in data.sources],
        "validation": data.validation and [_file_digest(file) for file in text_files(data.validation)],
        "tokenizer": data.tokenizer and _file_digest(data.tokenizer),
        "vocab_size": data.vocab_size,
        "held_out": data.held_out,
    }


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(data: Data, description: dict[str, Any], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    validation = read_documents(data.validation) if data.validation else []
    never = {document_hash(document) for document in validation}
    parts = [split(read_documents(source.path, source.format), data.held_out, never) for source in data.sources]
    held_out = [document for _, part in parts for document in part]
    serialized = (
        data.tokenizer.read_text(encoding="utf-8")
        if data.tokenizer
        else train_tokenizer((document for train, _ in parts for document in train), data.vocab_size or 0)
    )
    tokenizer = Tokenizer(serialized)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    texts = {f"{n}-{s.path.name.split('.')[0]}.bin": parts[n][0] for n, s in enumerate(data.sources)}
    texts[f"{VALIDATION}.bin"] = validation or held_out
    files = {}
    for name, documents in texts.items():
        ids = np.fromiter(_packed_ids(documents, tokenizer), dtype)
        ids.tofile(directory / name)
        files[name] = {
            "documents": len(documents),
            "bytes": sum(len(d.encode()) for d in documents),
            "tokens": len(ids),
        }
    (directory / TOKENIZER_FILE).write_text(serialized, encoding="utf-8")
    manifest = {"data": description, "dtype": dtype.name, "held_out_documents": len(held_out), "files": files}
    # Last, so that a manifest never describes files that are not there.
    (directory / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _packed_ids(documents: list[str], tokenizer: Tokenizer) -> Iterator[int]:
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError(f"the tokenizer has no {END_OF_TEXT} to end documents with")
    for document in documents:
        yield from tokenizer.encode(document)
        yield end


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> str:
    """A tokenizer.json: byte-level BPE of at most `vocab_size` tokens, `<|endoftext|>` the first of them."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    return backend.to_str()
