"""The commands from the outside: what they print, write and exit with."""

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loadtests.bench import Bench, BenchPlan, MeasuringRules
from loadtests.cell import CellPlan
from loadtests.cli import main
from loadtests.errors import LoadTestError
from loadtests.options import bench_plan, build_parser, cell_plans
from loadtests.plan import LoadPlan
from loadtests.server import ServerCommand
from loadtests.workload import Workload
from tests.loadtests.scripted_server import Script, ScriptedServer, serving

SCRIPTED = f"{sys.executable} -m tests.loadtests.scripted_server {{port}}"
FAST = ["--concurrency", "2", "--requests", "4", "--output-tokens", "8", "--prompt-tokens", "4"]


@contextmanager
def running(script: Script) -> Generator[ScriptedServer]:
    """A scripted server on a loop in a thread of its own."""
    ready, loops, servers = threading.Event(), [], []

    async def serve() -> None:
        async with serving(script) as server:
            servers.append(server)
            stop = asyncio.Event()
            loops.append((asyncio.get_running_loop(), stop))
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert ready.wait(60)
    try:
        yield servers[0]
    finally:
        loop, stop = loops[0]
        loop.call_soon_threadsafe(stop.set)
        thread.join(60)


def test_a_run_is_measured_written_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(Script(delays_s=(0.01,) * 8)) as server:
        code = main(["run", "--url", server.url, *FAST, "--out", str(tmp_path), "--allow-disturbed", "--save-events"])
    assert code == 0
    assert "| standard c2 | server |" in capsys.readouterr().out
    assert (tmp_path / "report.md").exists()
    assert (tmp_path / "standard-concurrency.png").exists()
    (cell,) = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert cell["summary"]["num_succeeded"] == 4
    assert cell["workload"]["model"] == "scripted"
    measured = [request for request in cell["requests"] if request["phase"] == "measured"]
    assert all(len(request["events_ms"]) == 8 for request in measured)
    assert {len(body["prompt"]) for body in server.bodies} == {4}
    assert len({tuple(body["prompt"]) for body in server.bodies}) == len(server.bodies)


def test_a_run_that_cannot_be_called_clean_ends_with_3(capsys: pytest.CaptureFixture[str]) -> None:
    with running(Script()) as server:
        assert main(["run", "--url", server.url, *FAST]) == 3
    assert re.search("warning: server, standard c2: (unverified|disturbed)", capsys.readouterr().err)


def test_failed_requests_end_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    with running(Script(status=503)) as server:
        assert main(["run", "--url", server.url, *FAST, "--allow-disturbed"]) == 1
        assert "4 of 4 failed: http_503 4 (scripted 503)" in capsys.readouterr().err
        assert main(["run", "--url", server.url, *FAST, "--allow-disturbed", "--allow-failures"]) == 0


def test_a_run_without_a_server_ends_with_4(capsys: pytest.CaptureFixture[str]) -> None:
    with running(Script()) as server:
        pass
    assert main(["run", "--url", server.url, *FAST]) == 4
    assert server.url in capsys.readouterr().err


def test_load_for_other_hosts_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--url", "http://192.0.2.1:80", *FAST]) == 2
    assert "--i-own-this-host" in capsys.readouterr().err


def test_a_run_has_an_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(Script(delays_s=(30.0,))) as server:
        arguments = ["run", "--url", server.url, *FAST, "--max-seconds", "0.5", "--out", str(tmp_path)]
        assert main(arguments) == 2
    assert "--max-seconds" in capsys.readouterr().err


def test_a_bench_takes_turns_and_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(
        [
            *("bench", "--server-command", f"one={SCRIPTED}", "--server-command", f"two={SCRIPTED}", *FAST),
            *("--rounds", "2", "--out", str(tmp_path), "--allow-disturbed"),
        ]
    )
    assert code == 0
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert [(cell["server"], cell["round"]) for cell in cells] == [("one", 1), ("two", 1), ("two", 2), ("one", 2)]
    assert all(cell["summary"]["num_succeeded"] == cell["summary"]["num_requests"] > 0 for cell in cells)
    assert "## Ratios to one" in capsys.readouterr().out
    assert not scripted_children()


async def test_servers_together_take_turns_cell_by_cell(tmp_path: Path) -> None:
    plan = BenchPlan(
        [ServerCommand("one", SCRIPTED), ServerCommand("two", SCRIPTED)],
        [CellPlan(Workload(), LoadPlan(concurrency=c, num_requests=2)) for c in (1, 2)],
        rounds=1,
        together=True,
    )
    bench = Bench(plan, MeasuringRules(), tmp_path, lambda _: None)
    await bench.run()
    names = [(result.server, result.plan.load.concurrency) for result in bench.results]
    assert names == [("one", 1), ("two", 1), ("one", 2), ("two", 2)]
    assert not scripted_children()


def test_rounds_and_servers_have_prompts_as_they_should(tmp_path: Path) -> None:
    plan = bench_plan(build_parser().parse_args(["bench", "--out", str(tmp_path), "--server-command", SCRIPTED]))
    assert plan.servers[0].name == "server-1"
    with pytest.raises(LoadTestError, match="one name"):
        Bench(BenchPlan([plan.servers[0]] * 2, plan.cells), MeasuringRules(), tmp_path, lambda _: None)


def test_a_bench_cut_short_keeps_what_it_measured_and_stops_its_server(tmp_path: Path) -> None:
    broken = f"{sys.executable} -c 'import sys; sys.exit(7)' {{port}}"
    code = main(
        [
            *("bench", "--server-command", f"good={SCRIPTED}", "--server-command", f"bad={broken}", *FAST),
            *("--out", str(tmp_path)),
        ]
    )
    assert code == 4
    results = json.loads((tmp_path / "results.json").read_text())
    assert [cell["server"] for cell in results["cells"]] == ["good"]
    assert any(note.startswith("Cut short: bad ended with code 7") for note in results["notes"])
    assert not scripted_children()


def test_a_bench_that_is_told_to_end_stops_its_server(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loadtests", "bench", "--server-command", f"s={SCRIPTED}", "--out", str(tmp_path)]
    with subprocess.Popen([*command, "--duration", "60"], stderr=subprocess.PIPE, text=True) as bench:
        assert bench.stderr is not None
        for line in bench.stderr:
            if "ready after" in line:
                break
        bench.terminate()
        assert bench.wait(60) == 130
    assert not scripted_children()


def scripted_children() -> list[int]:
    """Pids of scripted servers that still run, of this test or one before it."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and b"tests.loadtests.scripted_server" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def test_two_results_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        with running(Script(delays_s=(0.005,) * 4)) as server:
            main(["run", "--url", server.url, *FAST, "--out", str(tmp_path / name), "--allow-disturbed"])
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b" / "results.json")]) == 0
    assert "| server → server |" in capsys.readouterr().out
    assert main(["compare", str(tmp_path), str(tmp_path)]) == 2


def test_cells_follow_from_the_options() -> None:
    options = build_parser().parse_args(
        ["run", "--url", "http://x", "--concurrency", "1,32", "--rate", "2.5", "--also", "long,prefix", "--seed", "4"]
    )
    cells = cell_plans(options)
    assert [cell.name for cell in cells] == ["standard c1", "standard c32", "standard r2.5", "long c8", "prefix c8"]
    assert [cell.load.num_requests for cell in cells] == [8, 128, 32, 32, 32]
    assert [cell.load.num_warmup for cell in cells] == [1, 32, 8, 8, 8]
    assert {cell.workload.seed for cell in cells} == {4}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--concurrency", "0"],
        ["--concurrency", "1,x"],
        ["--requests", "5", "--duration", "5"],
        ["--duration", "-1"],
        ["--duration", "nan"],
        ["--max-seconds", "1e9"],
        ["--token-range", "5"],
        ["--extra-body", "[]"],
        ["--goodput", "ttft"],
    ],
)
def test_bad_options_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", "--url", "http://127.0.0.1:1", *arguments])
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--concurrency", "9999"], ["--also", "short"], ["--concurrency", "1,1"], ["--goodput", "itl=5"],
     ["--shared-prefix-tokens", "128"], ["--prompts", "/no/such/file"]],
)  # fmt: skip
def test_impossible_loads_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--url", "http://127.0.0.1:1", *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_key_comes_from_the_environment_and_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOADTESTS_API_KEY", "sesame")
    heads: list[bytes] = []

    class Listening(ScriptedServer):
        async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            original = reader.readuntil

            async def spy(separator: Any) -> bytes:
                head = await original(separator)
                heads.append(head)
                return head

            monkeypatch.setattr(reader, "readuntil", spy)
            await super().handle(reader, writer)

    monkeypatch.setattr("tests.loadtests.scripted_server.ScriptedServer", Listening)
    with running(Script()) as server:
        main(["run", "--url", server.url, *FAST, "--out", str(tmp_path), "--allow-disturbed"])
    assert heads
    assert all(b"Authorization: Bearer sesame\r\n" in head for head in heads)
    assert all("sesame" not in path.read_text() for path in tmp_path.iterdir() if path.suffix in {".json", ".md"})
