"""MosaicConfig: a round trip through JSON, and every kind of nonsense refused by the name of its field."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from model.config import MosaicConfig, MosaicV2Config, NetworkConfig
from tests.model.mosaics import configs, small_config, small_v2_config, v2_configs


@settings(max_examples=30, deadline=None)
@given(configs())
def test_round_trip(config: MosaicConfig) -> None:
    assert MosaicConfig.from_dict(json.loads(config.to_json())) == config


@settings(max_examples=20, deadline=None)
@given(v2_configs())
def test_round_trip_of_the_second_version(config: MosaicV2Config) -> None:
    assert NetworkConfig.from_dict(json.loads(config.to_json())) == config


def test_a_file_says_of_which_version_it_is(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for config in (small_config(), small_v2_config()):
        config.save(path)
        assert NetworkConfig.load(path) == type(config).load(path) == config
    with pytest.raises(ValueError, match="'memory-mosaic-v2' is not what MosaicConfig describes"):
        MosaicConfig.load(path)


def test_without_a_version_it_is_the_first() -> None:
    values = small_config().to_dict()
    del values["architecture"]
    assert NetworkConfig.from_dict(values) == small_config()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("persistent_size", 0),
        ("persistent_size", 2**40),
        ("short_window", 1),
        ("short_window", 10**6),
        ("long_delay", 0),
        ("long_delay", 7),
        ("max_train_delay", 8),
        ("max_train_delay", True),
        ("n_head", 12),
        ("architecture", "memory-mosaic-v1"),
        ("eos_token_id", 11),
    ],
)
def test_nonsense_in_the_second_version(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        small_v2_config(**{field: value})


def test_files(tmp_path: Path) -> None:
    config = small_config(eos_token_id=0, tokenizer_vocab_size=7)
    config.save(tmp_path / "config.json")
    assert MosaicConfig.load(tmp_path / "config.json") == config


def test_derived_sizes() -> None:
    assert small_config().head_dim == 6
    assert small_config().num_sampled_tokens == 11
    assert small_config(tokenizer_vocab_size=7).num_sampled_tokens == 7


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("vocab_size", True),
        ("vocab_size", 4.0),
        ("vocab_size", "11"),
        ("vocab_size", 10**12),
        ("vocab_size", None),
        ("n_layer", 0),
        ("n_layer", 10**6),
        ("n_head", 0),
        ("n_head", 5),
        ("n_embd", -12),
        ("n_embd", 2**40),
        ("block_size", 0),
        ("pmem_size", 0),
        ("pmem_count", 10**6),
        ("key_log_scale_max", float("nan")),
        ("key_log_scale_max", 41),
        ("persistent_key_log_scale_max", float("inf")),
        ("persistent_key_log_scale_max", 81.0),
        ("norm_eps", -1e-10),
        ("norm_eps", 2),
        ("logit_scale", 0),
        ("logit_scale", "1"),
        ("pre_norm", 1),
        ("bias", "yes"),
        ("value_extractor", "conv"),
        ("value_extractor", ["linearconv"]),
        ("architecture", "memory-mosaic-v9"),
        ("eos_token_id", 11),
        ("eos_token_id", -1),
        ("tokenizer_vocab_size", 12),
        ("tokenizer_vocab_size", 0),
    ],
)
def test_nonsense_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        small_config(**{field: value})


def test_the_end_token_can_be_sampled() -> None:
    with pytest.raises(ValueError, match="eos_token_id"):
        small_config(tokenizer_vocab_size=7, eos_token_id=8)


def test_sizes_of_an_absent_memory_do_not_matter() -> None:
    assert small_config(has_persistent=False, pmem_size=0, pmem_count=0).pmem_size == 0


def test_fields_are_all_known_and_all_there() -> None:
    values = small_config().to_dict()
    with pytest.raises(ValueError, match="unknown fields 'dropout', 'n_heads'"):
        MosaicConfig.from_dict(values | {"n_heads": 2, "dropout": 0.1})
    del values["bias"]
    with pytest.raises(ValueError, match="missing field 'bias'"):
        MosaicConfig.from_dict(values)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"n_layer": NaN}', "[" * 100_000, "\udcff"])
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"config\.json: "):
        MosaicConfig.load(path)


def test_a_file_too_large_for_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(" " * (1 << 21) + small_config().to_json())
    with pytest.raises(ValueError, match="too large"):
        MosaicConfig.load(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        MosaicConfig.load(tmp_path / "config.json")


def test_needs_no_torch() -> None:
    code = "import sys, model.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
