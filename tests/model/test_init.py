"""Models of random weights, as `python -m model.init` writes them, and the words they are made to speak."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.checkpoint import load_model
from model.config import MosaicConfig, MosaicV2Config
from model.init import init_model, main
from model.presets import PRESETS, mosaic_of
from model.syllables import MIN_VOCAB_SIZE, NUM_UNPRINTED, syllable_tokenizer_json
from model.tokenizer import Tokenizer

TINY = PRESETS["tiny"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(syllable_tokenizer_json(30_000))


def test_every_sampled_id_is_visible_text_and_its_own_spelling(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 30_000
    num_sampled = 30_000 - NUM_UNPRINTED
    spelled = [tokenizer.decode([i]) for i in range(num_sampled)]
    assert len(set(spelled)) == num_sampled
    assert all(text.isascii() and text.isprintable() for text in spelled)
    assert [tokenizer.encode(text) for text in spelled] == [[i] for i in range(num_sampled)]


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("vocab_size", [MIN_VOCAB_SIZE, MIN_VOCAB_SIZE + 1, 511])
def test_vocabularies_of_any_size(vocab_size: int) -> None:
    assert Tokenizer(syllable_tokenizer_json(vocab_size)).vocab_size == vocab_size


def test_too_small_and_too_large_vocabularies_are_refused() -> None:
    for vocab_size in (MIN_VOCAB_SIZE - 1, 2_000_000):
        with pytest.raises(ValueError, match="vocab_size"):
            syllable_tokenizer_json(vocab_size)


def test_what_is_written_loads_and_equal_seeds_give_equal_files(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        init_model(TINY, tmp_path / name, seed=seed)
    a, b, c = (
        [(tmp_path / name / file).read_bytes() for file in ("model.safetensors", "tokenizer.json")] for name in "abc"
    )
    assert a == b
    assert a[0] != c[0]
    config = load_model(tmp_path / "a").config
    assert (config.num_sampled_tokens, config.eos_token_id) == (TINY.vocab_size - NUM_UNPRINTED, None)


def test_sizes_take_the_place_of_the_presets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "out"), "--preset", "tiny", "--n-layer", "1", "--n-embd", "16"]) == 0
    assert "1 layers, 2 heads, 16 wide, 512 ids" in capsys.readouterr().out
    expected = mosaic_of(vocab_size=512, n_layer=1, n_head=2, n_embd=16, pmem_size=48, block_size=256)
    config = load_model(tmp_path / "out").config
    assert isinstance(config, MosaicConfig)
    assert config.logit_scale == expected.logit_scale


def test_the_second_version_has_sizes_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main([str(out), "--preset", "v2-tiny", "--pmem-size", "7"]) == 2
    assert "pmem_size: v2-tiny is a memory-mosaic-v2" in capsys.readouterr().err
    assert main([str(out), "--preset", "v2-tiny", "--persistent-size", "7", "--short-window", "40"]) == 0
    config = load_model(out).config
    assert isinstance(config, MosaicV2Config)
    assert (config.persistent_size, config.short_window, config.long_delay) == (7, 40, 8)


def test_a_directory_in_use_is_left_alone_unless_forced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert main([str(tmp_path), "--preset", "tiny"]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main([str(tmp_path), "--preset", "tiny", "--force"]) == 0
    assert main([str(tmp_path), "--preset", "tiny", "--n-layer", "1", "--force"]) == 0
    assert load_model(tmp_path).config.n_layer == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("options", [["--n-head", "5"], ["--vocab-size", "9"], ["--seed", "-1"], ["--n-layer", "0"]])
def test_nonsense_is_one_line_and_writes_nothing(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "out"), "--preset", "tiny", *options]) == 2
    assert options[0].removeprefix("--").replace("-", "_") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
