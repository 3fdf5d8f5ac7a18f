"""The command line as a user meets it: help, one-line failures with exit codes, `generate` and `info`."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.checkpoint import load_model
from model.config import MosaicConfig
from model.init import init_model
from model.presets import V2_PRESETS
from model.tokenizer import Tokenizer
from service import cli
from service.errors import ExitCode
from service.settings import DEFAULT_MODEL, ServeSettings, env_name, flag
from tests.service.process import clean_environment

PROMPT = "Once upon a time"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs `tessera` in this process: its exit code, stdout and stderr."""
    for name in ServeSettings.model_fields:
        monkeypatch.delenv(env_name(name), raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tessera", *args])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def test_help_names_every_option(run: Run) -> None:
    code, out, _ = run("serve", "--help")
    assert code == ExitCode.OK
    for name in ServeSettings.model_fields:
        assert f"{flag(name)} " in out
    assert "--config" in out


def test_without_a_command_it_shows_help(run: Run) -> None:
    code, out, _ = run()
    assert code == ExitCode.USAGE
    assert all(command in out for command in ("serve", "generate", "info"))


def test_version(run: Run) -> None:
    code, out, _ = run("--version")
    assert code == ExitCode.OK
    assert out.startswith("tessera 0.")


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["serv"], ExitCode.USAGE, "serv"),
        (["serve", "--prot", "1"], ExitCode.USAGE, "--prot"),
        (["serve", "--port", "eight"], ExitCode.USAGE, "--port"),
        (["serve", "--port", "70000"], ExitCode.USAGE, "--port"),
        (["serve", "--dtype", "int8"], ExitCode.USAGE, "--dtype"),
        (["serve", "--memory", "lots"], ExitCode.USAGE, "--memory"),
        (["serve", "--replicas", "0"], ExitCode.USAGE, "--replicas"),
        (["serve", "--config", "/nonexistent.yaml"], ExitCode.USAGE, "/nonexistent.yaml"),
        (["serve", "--local", "--max-num-batched-tokens", "2"], ExitCode.USAGE, "--max-num-batched-tokens"),
        (["serve", "--local", "--model", "/nonexistent"], ExitCode.NO_MODEL, "/nonexistent"),
        (["serve", "--model", "/nonexistent"], ExitCode.NO_MODEL, "/nonexistent"),
        (["serve", "--local", "--model", "/"], ExitCode.NO_MODEL, "config.json"),
        (["serve", "--local", "--host", "192.0.2.1"], ExitCode.ADDRESS, "192.0.2.1"),
        (["serve", "--local", "--port", "0", "--memory", "1MiB"], ExitCode.NO_MEMORY, "--max-num-seqs"),
        (["serve", "--local", "--port", "0", "--memory", "900TiB"], ExitCode.NO_MEMORY, "available"),
        (["serve", "--local", "--port", "0", "--device", "abacus"], ExitCode.USAGE, "--device abacus"),
        (["serve", "--local", "--replicas", "2"], ExitCode.USAGE, "--replicas"),
        (["serve", "--local", "--ray-address", "auto"], ExitCode.USAGE, "--ray-address"),
        (["info", "--model", "/nonexistent"], ExitCode.NO_MODEL, "/nonexistent"),
        (["info", "--device", "abacus"], ExitCode.USAGE, "--device abacus"),
        (["generate"], ExitCode.USAGE, "prompt"),
        (["generate", ""], ExitCode.USAGE, "empty"),
        (["generate", "a", "--model", "/nonexistent"], ExitCode.NO_MODEL, "/nonexistent"),
        (["generate", "a", "--temperature", "nan"], ExitCode.USAGE, "--temperature"),
        (["serve", "--drain-timeout", "inf"], ExitCode.USAGE, "--drain-timeout"),
        (["serve", "--drain-timeout", "nan"], ExitCode.USAGE, "--drain-timeout"),
        (["generate", "a", "--temperature", "-1"], ExitCode.USAGE, "--temperature"),
        (["generate", "a b c d e f g h", "--max-model-len", "4"], ExitCode.USAGE, "--max-model-len"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_failure_is_one_line_and_an_exit_code(run: Run, args: list[str], code: ExitCode, message: str) -> None:
    got, out, err = run(*args)
    assert got == code, err
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("Loading ")]
    assert len(lines) == 1
    assert lines[0].startswith("tessera: ")
    assert message in lines[0]


def test_a_damaged_checkpoint_is_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((DEFAULT_MODEL / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((DEFAULT_MODEL / "model.safetensors").read_bytes()[:-100])
    code, _, err = run("serve", "--local", "--port", "0", "--model", str(tmp_path))
    assert code == ExitCode.NO_MODEL
    assert err.splitlines()[-1].startswith(f"tessera: cannot load the model: {tmp_path}")


@pytest.mark.parametrize(
    ("variable", "value"), [("TESSERA_MAX_NUM_SEQS", "0"), ("TESSERA_PORT", "tcp://10.0.0.1:8000")]
)
def test_a_bad_value_in_the_environment_is_named(
    run: Run, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    code, _, err = run("serve", "--local")
    assert code == ExitCode.USAGE
    assert err.startswith(f"tessera: {variable}: ")


def test_a_variable_that_is_no_option_is_reported(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA_MAX_NUM_SEQ", "4")
    monkeypatch.setenv("TESSERA_SERVICE_HOST", "10.0.0.1")
    code, _, err = run("info", "--json")
    assert (code, err) == (ExitCode.OK, "tessera: TESSERA_MAX_NUM_SEQ is ignored: there is no such option\n")


@pytest.mark.parametrize("mode", [["--local"], []])
def test_a_port_in_use_is_known_before_anything_is_loaded(run: Run, mode: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = run("serve", *mode, "--port", str(port))
    assert code == ExitCode.ADDRESS
    assert (
        err == f"tessera: port {port} on 127.0.0.1 is in use: stop what listens there, or choose another with --port\n"
    )


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def max_model_len(*args: str) -> int:
        value: int = json.loads(run("info", "--json", *args)[1])["memory"]["max_model_len"]
        return value

    config = tmp_path / "tessera.yaml"
    config.write_text("max-model-len: 100\nport: 1\n")
    assert max_model_len() == MosaicConfig.load(DEFAULT_MODEL / "config.json").block_size
    assert max_model_len("--config", str(config)) == 100
    monkeypatch.setenv("TESSERA_CONFIG", str(config))
    monkeypatch.setenv("TESSERA_MAX_MODEL_LEN", "200")
    assert max_model_len() == 200
    assert max_model_len("--max-model-len", "300") == 300


def test_info_tells_what_the_engine_would_do(run: Run) -> None:
    limits = ("--max-model-len", "65", "--max-num-seqs", "64", "--memory", "10MiB", "--dtype", "float32")
    code, out, _ = run("info", "--json", *limits)
    facts = json.loads(out)
    model = load_model(DEFAULT_MODEL)
    config = model.config
    assert code == ExitCode.OK
    assert facts["model"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["model"]["n_layer"] == config.n_layer
    # A pair is a key and a value of n_embd float32 numbers in every layer; the state is three such vectors.
    assert facts["memory"]["bytes_per_token"] == 2 * config.n_layer * config.n_embd * 4
    assert facts["memory"]["bytes_per_sequence"] == 3 * config.n_layer * config.n_embd * 4
    # Beside each of 64 sequences' states a snapshot at its prompt's end, beside every block of 32 pairs another.
    state = facts["memory"]["bytes_per_sequence"]
    num_blocks = (10 * 2**20 - 2 * 64 * state) // (32 * facts["memory"]["bytes_per_token"] + state)
    assert facts["memory"]["snapshot_bytes"] == (num_blocks + 64) * state
    assert facts["memory"]["full_sequences"] == num_blocks // 2
    facts = json.loads(run("info", "--json", *limits, "--no-prefix-cache")[1])
    left = 10 * 2**20 - 64 * state
    assert facts["memory"]["full_sequences"] == left // (64 * facts["memory"]["bytes_per_token"])
    assert facts["memory"]["snapshot_bytes"] == 0
    assert facts["runtime"]["torch"] == torch.__version__


def test_a_model_of_the_second_version_is_told_about_and_generates(run: Run, tmp_path: Path) -> None:
    init_model(V2_PRESETS["v2-tiny"], tmp_path)
    options = ("--model", str(tmp_path), "--dtype", "float32")
    code, out, _ = run("info", "--json", *options, "--block-size", "16")
    facts = json.loads(out)
    assert code == ExitCode.OK
    assert facts["model"]["architecture"] == "memory-mosaic-v2"
    assert facts["runtime"]["kernel_path"] in ("avx512bf16", "avx2", "generic")
    # Two layers, 32 wide: a window of 31 pairs lies in at most three blocks of 16; beside it five vectors of state.
    assert facts["memory"]["bytes_per_token"] == 2 * 2 * 32 * 4
    assert facts["memory"]["bytes_per_sequence"] == 3 * 16 * (2 * 2 * 32 * 4) + 5 * 2 * 32 * 4
    code, out, _ = run("generate", PROMPT, *options, "--max-tokens", "20", "--threads", "1")
    assert code == ExitCode.OK
    assert len(out.strip()) >= 20


def test_info_is_readable(run: Run) -> None:
    code, out, _ = run("info")
    assert code == ExitCode.OK
    assert "bytes per token" in out
    assert "KiB" in out


def test_generate_prints_the_models_own_greedy_continuation(run: Run) -> None:
    options = ("--temperature", "0", "--max-tokens", "12", "--threads", "1", "--dtype", "float32")
    code, out, err = run("generate", PROMPT, *options)
    tokenizer, model = Tokenizer.load(DEFAULT_MODEL), load_model(DEFAULT_MODEL)
    assert tokenizer is not None
    prompt = tokenizer.encode(PROMPT)
    ids = list(prompt)
    for _ in range(12):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert (code, err) == (ExitCode.OK, "")
    assert out == tokenizer.decode(ids[len(prompt) :]) + "\n"


def test_generate_is_a_function_of_its_seed_and_reads_standard_input(run: Run) -> None:
    command = [sys.executable, "-m", "service", "generate", "-", "--max-tokens", "9", "--seed", "5"]
    piped = subprocess.run(
        command, input=PROMPT + "\n", env=clean_environment(), capture_output=True, text=True, timeout=60, check=True
    )
    assert piped.stderr == ""
    assert run("generate", PROMPT, "--max-tokens", "9", "--seed", "5")[1] == piped.stdout
    assert run("generate", PROMPT, "--max-tokens", "9", "--seed", "6")[1] != piped.stdout


def test_generate_stays_within_the_models_limit(run: Run) -> None:
    args = ("generate", PROMPT, "--max-model-len", "8", "--max-tokens", "100", "--ignore-eos", "--temperature", "0")
    code, out, _ = run(*args)
    tokenizer = Tokenizer.load(DEFAULT_MODEL)
    assert tokenizer is not None
    assert code == ExitCode.OK
    assert len(tokenizer.encode(PROMPT + out.removesuffix("\n"))) <= 8


def test_generate_ends_quietly_when_its_reader_does() -> None:
    command = f"{sys.executable} -m service generate '{PROMPT}' --ignore-eos | head -c 4; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], env=clean_environment(), capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""
    assert done.stdout.endswith("0\n")
    assert len(done.stdout) == 4 + 2


def test_python_dash_m_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "service", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("tessera ")
