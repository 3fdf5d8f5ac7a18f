"""GPT-2's tokenizer from tiktoken's data: the same splits as tiktoken, from either file, offline too."""

import hashlib
import sys
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from model import gpt2_tokenizer
from model.gpt2_tokenizer import (
    DataFile,
    TokenizerDataError,
    byte_level_bpe_json,
    gpt2_tokenizer_json,
    parse_tiktoken,
    parse_vocab_bpe,
)
from model.tokenizer import Tokenizer
from tests.model.small_bpe import ranks, tiktoken_file, vocab_bpe_file

TOKENIZER = Tokenizer(byte_level_bpe_json(ranks()))
TIKTOKEN = tiktoken.Encoding(
    name="small",
    pat_str=r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    mergeable_ranks=ranks(),
    special_tokens={"<|endoftext|>": len(ranks())},
)
story_like = st.text(alphabet="ctheaginord s'f12\n\t.!\u00e9\u4e2d\U0001f600\u00a0", max_size=40)


@given(st.one_of(story_like, st.text()))
def test_splits_text_as_tiktoken_does(text: str) -> None:
    assert TOKENIZER.encode(text) == TIKTOKEN.encode_ordinary(text)


def test_special_token_as_in_tiktoken() -> None:
    text = "the thing<|endoftext|>and the rest<|endoftext|>"
    assert TOKENIZER.encode(text, allow_special=True) == TIKTOKEN.encode(text, allowed_special="all")


def test_both_formats_hold_the_same_ranks() -> None:
    assert parse_tiktoken(tiktoken_file()) == parse_vocab_bpe(vocab_bpe_file().decode()) == ranks()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """tiktoken's cache, and the small data published in place of the real one."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name, content in [("R50K_BASE", tiktoken_file()), ("VOCAB_BPE", vocab_bpe_file())]:
        # A port that nothing listens on: a download fails at once.
        published = DataFile(f"http://127.0.0.1:9/{name}", hashlib.sha256(content).hexdigest())
        monkeypatch.setattr(gpt2_tokenizer, name, published)
    return tmp_path


@pytest.mark.parametrize(("name", "content"), [("R50K_BASE", tiktoken_file()), ("VOCAB_BPE", vocab_bpe_file())])
def test_reads_tiktokens_cache(cache: Path, name: str, content: bytes) -> None:
    (cache / getattr(gpt2_tokenizer, name).cache_name).write_bytes(content)
    assert Tokenizer(gpt2_tokenizer_json()).encode("the cafés") == TOKENIZER.encode("the cafés")


def test_falls_back_on_the_older_cache_variable(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    monkeypatch.setenv("DATA_GYM_CACHE_DIR", str(cache))
    (cache / gpt2_tokenizer.R50K_BASE.cache_name).write_bytes(tiktoken_file())
    assert Tokenizer(gpt2_tokenizer_json()).eos_token_id == len(ranks())


def test_cache_names_are_tiktokens() -> None:
    assert gpt2_tokenizer.VOCAB_BPE.cache_name == "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"


def test_offline_the_message_names_the_file_and_its_place(cache: Path) -> None:
    with pytest.raises(TokenizerDataError) as caught:
        gpt2_tokenizer_json()
    message = str(caught.value)
    assert gpt2_tokenizer.R50K_BASE.url in message
    assert str(cache / gpt2_tokenizer.R50K_BASE.cache_name) in message
    assert "\n" not in message


def test_another_file_under_that_name_is_not_used(cache: Path) -> None:
    (cache / gpt2_tokenizer.R50K_BASE.cache_name).write_bytes(tiktoken_file() + b"AAAA 999\n")
    with pytest.raises(TokenizerDataError):
        gpt2_tokenizer_json()


def test_without_tiktoken_the_message_says_how_to_get_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken.load", None)
    with pytest.raises(TokenizerDataError, match=r"pip install 'tessera-mosaics\[convert\]'"):
        gpt2_tokenizer_json()


def test_a_switched_off_cache_is_named_in_the_message(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    with pytest.raises(TokenizerDataError, match="named by TIKTOKEN_CACHE_DIR"):
        gpt2_tokenizer_json()


@pytest.mark.parametrize("damaged", [b"AAAA", b"!!! 3\n", b"QQ== x\n"])
def test_damaged_tiktoken_file(damaged: bytes) -> None:
    with pytest.raises(ValueError, match=r"not a \.tiktoken file"):
        parse_tiktoken(damaged)


def test_damaged_vocab_bpe() -> None:
    with pytest.raises(ValueError, match="is no merge"):
        parse_vocab_bpe("#version: 0.2\na b\nnonsense\n")


def test_ranks_that_are_no_bpe_are_refused() -> None:
    with pytest.raises(ValueError, match="not made of two tokens"):
        byte_level_bpe_json(ranks() | {b"xyz": len(ranks())})
    with pytest.raises(ValueError, match="from 0 up"):
        byte_level_bpe_json(ranks() | {b"xy": len(ranks()) + 1})
