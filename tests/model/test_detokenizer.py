"""Text as it arrives: whole characters only, and nothing lost or invented."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.detokenizer import IncrementalDetokenizer
from model.gpt2_tokenizer import byte_level_bpe_json
from model.tokenizer import Tokenizer
from tests.model.small_bpe import MERGES, ranks

TOKENIZER = Tokenizer(byte_level_bpe_json(ranks()))
RANKS = ranks()
EOS = 256 + len(MERGES)

# Bytes of multi-byte characters are drawn often, so that broken and whole sequences both occur.
token_id = st.one_of(
    st.integers(0, EOS + 1),
    st.sampled_from([RANKS[bytes([byte])] for byte in b"\xc3\xa9\xe4\xb8\xad\xf0\x9f\x98\x80\xed\xa0\xff"]),
)


@given(st.lists(st.lists(token_id, max_size=4)), st.booleans())
def test_pushes_and_flush_join_to_the_whole_text(chunks: list[list[int]], skip_special: bool) -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER, skip_special=skip_special)
    text = "".join(detokenizer.push(chunk) for chunk in chunks) + detokenizer.flush()
    assert text == TOKENIZER.decode([i for chunk in chunks for i in chunk], skip_special=skip_special)


@given(st.text())
def test_no_replacement_character_is_shown_for_whole_text(text: str) -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    shown = [detokenizer.push([token_id]) for token_id in TOKENIZER.encode(text)]
    assert "".join(shown) == text
    assert detokenizer.flush() == ""


def test_a_split_character_waits_for_its_last_byte() -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    assert detokenizer.push([RANKS[b"caf\xc3"]]) == "caf"
    assert detokenizer.push([RANKS[b"\xa9"]]) == "\u00e9"
    assert detokenizer.push([RANKS[b"\xf0\x9f"]]) == ""
    assert detokenizer.push([RANKS[b"\x98\x80"]]) == "\U0001f600"


@pytest.mark.parametrize("tail", [b"\xf0\x9f", b"\xe4\xb8", b"\xc3"])
def test_an_unfinished_character_is_replaced_at_the_end_only(tail: bytes) -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    assert detokenizer.push([RANKS[tail]]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_bytes_that_fit_nowhere_are_replaced_at_once() -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    assert detokenizer.push([RANKS[b"\xff"]]) == "\ufffd"
    assert detokenizer.push([RANKS[b"\xe4"]]) == ""
    assert detokenizer.push([RANKS[b"a"]]) == "\ufffda"
