"""Options: where a value comes from, what is refused, and how it reaches the engine."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from service.autoscaling import Scaling
from service.config import EngineConfig
from service.errors import UsageError
from service.settings import ServeSettings, env_name, flag, load_settings
from service.values import parse_size


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "tessera.yaml"
    path.write_text(text)
    return path


def test_a_given_value_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    config = write(tmp_path, "port: 9000\nmax-num-seqs: 4\nmax_num_waiting: 5\n")
    settings = load_settings({"port": 9001}, {"port": "--port"}, config)
    assert (settings.port, settings.max_num_seqs, settings.max_num_waiting) == (9001, 4, 5)
    assert settings.block_size == ServeSettings().block_size


def test_an_empty_file_is_no_options(tmp_path: Path) -> None:
    assert load_settings({}, {}, write(tmp_path, "# nothing\n")) == ServeSettings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1", "unknown option 'prot'"),
        ("prot: 1\nhots: x", "unknown option 'hots', 'prot'"),
        ("port: eight", "key port"),
        ("port: 70000", "key port"),
        ("local: maybe", "key local"),
        ("memory: 3 XB", "not a size"),
        ("- port", "mapping"),
        ("port: [", "not YAML"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    config = write(tmp_path, text)
    with pytest.raises(UsageError, match=message) as caught:
        load_settings({}, {}, config)
    assert str(config) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load_settings({}, {}, tmp_path / "absent.yaml")


def test_a_bad_value_is_reported_with_its_origin() -> None:
    with pytest.raises(UsageError, match=r"^TESSERA_PORT: .*65535"):
        load_settings({"port": 70_000}, {"port": "TESSERA_PORT"}, None)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1 KiB", 1024),
        ("2GiB", 2 * 2**30),
        ("1.5gib", 3 * 2**29),
        ("2GB", 2 * 10**9),
        ("3m", 3 * 10**6),
        ("3mi", 3 * 2**20),
        (7, 7),
    ],
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1 GiB 2", "1e9", "two GiB", "1..5G"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


def test_every_field_of_the_engine_config_can_be_set() -> None:
    given = {
        "model": Path("/models/m"),
        "device": "cuda:1",
        "dtype": "bfloat16",
        "memory_dtype": "float16",
        "quantization": "int8",
        "kernel": "torch",
        "threads": 3,
        "max_model_len": 99,
        "max_num_seqs": 5,
        "max_num_batched_tokens": 77,
        "memory": "1MiB",
        "block_size": 8,
        "swap_memory": "2MiB",
        "max_num_waiting": 6,
        "max_num_waiting_tokens": 9,
        "trace_endpoint": "http://127.0.0.1:4318",
        "model_fingerprint": "0123456789abcdef",
    }
    config = load_settings(given, {}, None).engine_config()
    assert config == EngineConfig(
        model_dir="/models/m",
        device="cuda:1",
        dtype="bfloat16",
        memory_dtype="float16",
        quantization="int8",
        kernel="torch",
        num_threads=3,
        max_model_len=99,
        max_num_seqs=5,
        max_num_batched_tokens=77,
        block_size=8,
        memory_bytes=2**20,
        swap_bytes=2**21,
        max_num_waiting=6,
        max_num_waiting_tokens=9,
        trace_endpoint="http://127.0.0.1:4318",
        fingerprint="0123456789abcdef",
    )
    unset = {f.name for f in fields(EngineConfig) if getattr(config, f.name) == getattr(EngineConfig("x"), f.name)}
    assert unset == {"stall_timeout_s", "prefix_cache"}
    assert not load_settings({"prefix_cache": False}, {}, None).engine_config().prefix_cache


def test_defaults_are_those_of_the_engine_config() -> None:
    settings = ServeSettings()
    assert settings.engine_config() == EngineConfig(str(settings.model))


def test_a_gpu_for_each_replica_means_cuda() -> None:
    assert load_settings({"num_gpus": 0.5}, {}, None).engine_config().device == "cuda"
    assert load_settings({"num_gpus": 1, "device": "cuda:0"}, {}, None).engine_config().device == "cuda:0"


def test_the_number_of_replicas_is_fixed_unless_there_is_a_most() -> None:
    assert load_settings({"replicas": 3}, {}, None).scaling() is None
    for name in ("min_replicas", "target_backlog", "upscale_delay", "downscale_delay"):
        with pytest.raises(UsageError, match=f"^{flag(name)} needs --max-replicas"):
            load_settings({"replicas": 3, name: 1}, {}, None).scaling()
    given = {"min_replicas": 0, "max_replicas": 4, "target_backlog": 2, "upscale_delay": 1, "downscale_delay": 9}
    settings = load_settings(given, {}, None)
    assert settings.scaling() == Scaling(0, 4, 1, target_backlog_s=2, upscale_delay_s=1, downscale_delay_s=9)
    assert (settings.most_replicas, ServeSettings(replicas=3).most_replicas) == (4, 3)
    with pytest.raises(UsageError, match=r"^--replicas \(3\) must be between --min-replicas \(1\) and --max-replicas"):
        load_settings({"replicas": 3, "max_replicas": 2}, {}, None).scaling()


def test_contradictions_are_reported_by_option() -> None:
    settings = load_settings({"max_num_batched_tokens": 2}, {}, None)
    with pytest.raises(UsageError, match=r"^--swap-memory .* needs --prefix-cache"):
        load_settings({"swap_memory": 1, "prefix_cache": False}, {}, None).engine_config()
    with pytest.raises(UsageError, match=r"^--max-num-batched-tokens \(2\) must be at least --max-num-seqs"):
        settings.engine_config()


def test_the_name_in_the_api_defaults_to_the_directory(tmp_path: Path) -> None:
    assert ServeSettings(model=tmp_path / "tales").model_name == "tales"
    assert ServeSettings(model=tmp_path / "tales", served_model_name="mosaic").model_name == "mosaic"


def test_lists_are_read_from_words_and_from_yaml(tmp_path: Path) -> None:
    origins = ("https://a.example", "https://b.example")
    given = load_settings({"cors_origins": "https://a.example, https://b.example"}, {}, None)
    assert given.gateway_settings().cors_origins == origins
    listed = load_settings({}, {}, write(tmp_path, "cors-origins: [https://a.example, https://b.example]"))
    assert listed.gateway_settings().cors_origins == origins


def test_every_option_says_what_it_does() -> None:
    for name, field in ServeSettings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
    assert flag("max_num_seqs") == "--max-num-seqs"
    assert env_name("max_num_seqs") == "TESSERA_MAX_NUM_SEQS"
