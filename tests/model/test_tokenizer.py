"""The tokenizer: exact bytes, no special tokens out of user text, clear refusals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from model.gpt2_tokenizer import byte_level_bpe_json
from model.tokenizer import Tokenizer
from tests.model.small_bpe import MERGES, ranks

SERIALIZED = byte_level_bpe_json(ranks())
TOKENIZER = Tokenizer(SERIALIZED)
EOS = 256 + len(MERGES)
any_id = st.integers(0, EOS)


@given(st.text())
def test_text_survives_encoding(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(st.lists(any_id))
def test_decode_agrees_with_the_library(ids: list[int]) -> None:
    library = tokenizers.Tokenizer.from_str(SERIALIZED)
    for skip in (True, False):
        assert TOKENIZER.decode(ids, skip_special=skip) == library.decode(ids, skip_special_tokens=skip)


def test_sizes_and_end_token() -> None:
    assert TOKENIZER.vocab_size == EOS + 1
    assert TOKENIZER.eos_token_id == EOS
    assert TOKENIZER.is_special(EOS)
    assert not TOKENIZER.is_special(0)


def test_token_bytes_are_exact() -> None:
    for token, token_id in ranks().items():
        assert TOKENIZER.token_bytes(token_id) == token
    assert TOKENIZER.token_bytes(EOS) == b""
    assert TOKENIZER.token_bytes(EOS, skip_special=False) == b"<|endoftext|>"
    assert TOKENIZER.token_bytes(EOS + 1) == TOKENIZER.token_bytes(-1) == b""


def test_special_tokens_typed_by_a_user_are_plain_text() -> None:
    text = "the<|endoftext|>end"
    plain = TOKENIZER.encode(text)
    assert EOS not in plain
    assert TOKENIZER.decode(plain) == text
    assert EOS in TOKENIZER.encode(text, allow_special=True)
    assert TOKENIZER.encode(text) == plain


def test_ids_beyond_the_vocabulary_decode_to_nothing() -> None:
    assert TOKENIZER.decode([ranks()[b"th"], EOS + 7, ranks()[b"e"]]) == "the"


def test_unpaired_surrogate_is_refused() -> None:
    with pytest.raises(ValueError, match="unpaired surrogate at character 2"):
        TOKENIZER.encode("ab\ud800")


def test_end_of_text_kept_as_an_ordinary_entry_is_special_all_the_same() -> None:
    document = json.loads(SERIALIZED)
    document["added_tokens"] = []
    document["model"]["vocab"]["<|endoftext|>"] = EOS
    tokenizer = Tokenizer(json.dumps(document))
    assert tokenizer.eos_token_id == EOS
    assert tokenizer.is_special(EOS)
    assert tokenizer.vocab_size == EOS + 1


def test_without_end_of_text_there_is_no_end_token() -> None:
    document = json.loads(SERIALIZED)
    document["added_tokens"] = []
    tokenizer = Tokenizer(json.dumps(document))
    assert tokenizer.eos_token_id is None
    assert tokenizer.vocab_size == EOS


def test_added_tokens_keep_their_spelling() -> None:
    library = tokenizers.Tokenizer.from_str(SERIALIZED)
    library.add_tokens(["caf\u00e9 au lait"])
    assert Tokenizer(library.to_str()).token_bytes(EOS + 1) == "caf\u00e9 au lait".encode()


def test_truncation_and_padding_in_the_file_do_not_apply() -> None:
    library = tokenizers.Tokenizer.from_str(SERIALIZED)
    library.enable_truncation(2)
    library.enable_padding(length=9)
    assert Tokenizer(library.to_str()).encode("abc") == TOKENIZER.encode("abc")


def test_load_from_a_directory(tmp_path: Path) -> None:
    assert Tokenizer.load(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text(SERIALIZED)
    loaded = Tokenizer.load(tmp_path)
    assert loaded is not None
    assert loaded.encode("the thing") == TOKENIZER.encode("the thing")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"{}", "not a tokenizer.json"),
        (b"nonsense", "not a tokenizer.json"),
        (b"\xff\xfe", "not UTF-8"),
        (tokenizers.Tokenizer(models.BPE()).to_str().encode(), "decoder is missing"),
    ],
)
def test_unusable_files_are_refused_by_name(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=complaint) as caught:
        Tokenizer.load(tmp_path)
    assert str(path) in str(caught.value)


def test_decoder_other_than_byte_level_is_refused() -> None:
    library = tokenizers.Tokenizer(models.BPE())
    library.decoder = decoders.Metaspace()
    with pytest.raises(ValueError, match="Metaspace"):
        Tokenizer(library.to_str())


def test_needs_no_torch() -> None:
    code = (
        "import sys, model, model.tokenizer, model.detokenizer, model.gpt2_tokenizer; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
