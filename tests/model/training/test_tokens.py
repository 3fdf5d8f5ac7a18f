"""Packed tokens: every document once, none that is held out; made once, and anew for other data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from model.tokenizer import Tokenizer
from model.training.corpus import document_hash, is_held_out, read_documents
from model.training.recipe import load_recipe
from model.training.tokens import MANIFEST_FILE, PackedTokens, open_packed, pack, train_tokenizer
from tests.model.training.texts import documents, write_recipe


def unpacked(packed: PackedTokens, ids: np.ndarray) -> list[str]:
    texts, end = [], packed.tokenizer.eos_token_id
    start = 0
    for stop in np.flatnonzero(ids == end).tolist():
        texts.append(packed.tokenizer.decode(ids[start:stop].tolist()))
        start = stop + 1
    assert start == len(ids)
    return texts


def test_documents_are_packed_or_held_out(corpus: Path) -> None:
    recipe = load_recipe(write_recipe(corpus))
    packed = pack(recipe.data, corpus / "tokens")
    everything = [read_documents(source.path) for source in recipe.data.sources]
    held_out = [d for part in everything for d in part if is_held_out(document_hash(d), 0.1)]
    assert 5 < len(held_out) < 40
    assert unpacked(packed, packed.validation) == held_out
    for part, ids in zip(everything, packed.sources, strict=True):
        assert ids.dtype == np.uint16
        assert unpacked(packed, ids) == [d for d in part if d not in held_out]


def test_a_validation_text_is_not_trained_on_either(corpus: Path) -> None:
    # Its documents lie in the sources too, and among them.
    (corpus / "valid.txt").write_text("<|endoftext|>".join(documents(10, 1)), encoding="utf-8")
    recipe = load_recipe(write_recipe(corpus, data={"validation": "valid.txt"}))
    packed = pack(recipe.data, corpus / "tokens")
    assert unpacked(packed, packed.validation) == documents(10, 1)
    trained = {text for ids in packed.sources for text in unpacked(packed, ids)}
    assert len(trained) > 100
    assert not trained & set(documents(10, 1))


def test_the_files_are_made_once_and_anew_for_other_data(corpus: Path) -> None:
    path, tokens = write_recipe(corpus), corpus / "tokens"
    first = pack(load_recipe(path).data, tokens)
    made = (tokens / MANIFEST_FILE).stat().st_mtime_ns
    assert pack(load_recipe(path).data, tokens).digest == first.digest
    assert (tokens / MANIFEST_FILE).stat().st_mtime_ns == made
    assert pack(load_recipe(path, ["data.vocab_size=290"]).data, tokens).digest != first.digest
    assert open_packed(tokens).tokenizer.vocab_size <= 290


def test_a_damaged_file_is_noticed(corpus: Path) -> None:
    pack(load_recipe(write_recipe(corpus)).data, corpus / "tokens")
    manifest = json.loads((corpus / "tokens" / MANIFEST_FILE).read_text(encoding="utf-8"))
    name = next(iter(manifest["files"]))
    (corpus / "tokens" / name).write_bytes(b"\0\0")
    with pytest.raises(ValueError, match="holds 1 tokens"):
        open_packed(corpus / "tokens")


def test_the_trained_tokenizer_keeps_every_byte() -> None:
    tokenizer = Tokenizer(train_tokenizer(documents(50, 3), 320))
    assert tokenizer.vocab_size == 320
    assert tokenizer.eos_token_id == 0
    text = "the fox \u00e9\U0001f600 <|endoftext|>\n\n  end"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("the fox found")) < 8


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b" / ".git").mkdir(parents=True)
    (tmp_path / "b" / ".git" / "config").write_text("hidden")
    (tmp_path / "b" / "one.txt").write_text("third")
    (tmp_path / "a.txt").write_text("first\n<|endoftext|>\nsecond\n<|endoftext|>\n")
    assert read_documents(tmp_path) == ["first", "second", "third"]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "stories.jsonl"
    path.write_text('"one\\ntwo"\n\n{"text": "three", "by": 4}\n')
    assert read_documents(path, "jsonl") == ["one\ntwo", "three"]
    for bad in ("3", "{}", '{"text": 1}', "[", "[" * 100_000):
        path.write_text(bad)
        with pytest.raises(ValueError, match=r"stories\.jsonl"):
            read_documents(path, "jsonl")


def test_a_text_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff\xff")
    (tmp_path / "bad.txt.xz").write_bytes(b"not xz")
    for name in ("bad.txt", "bad.txt.xz"):
        with pytest.raises(ValueError, match=name):
            read_documents(tmp_path / name)
