"""The suite at a tiny shape: real models, real servers, everything it writes."""

import json
from pathlib import Path

import pytest

from loadtests import suite
from loadtests.memory import MemoryCurve, MemoryPoint, memory_table
from loadtests.shape import Shape, ShapeError, run_module
from tests.loadtests.test_cli import SCRIPTED


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def test_cells_are_measured_beside_their_roofline(models: Path, tmp_path: Path) -> None:
    few = ["--requests", "1", "--warmup-requests", "0", "--output-tokens", "8", "--token-range", "10:300"]
    once = ["--rounds", "1", "--together", "--allow-disturbed"]
    arguments = ["--shapes", "tiny", "--models", str(models), "--out", str(tmp_path)]
    assert suite.main(["cells", *arguments, *few, *once]) == 0
    found = json.loads((tmp_path / "tiny" / "results.json").read_text())
    assert found["step_costs"].keys() == {"bfloat16", "int8"}
    assert {(cell["server"], cell["cell"]) for cell in found["cells"]} == {
        (server, cell)
        for server in ("bfloat16", "int8")
        for cell in ("standard c1", "standard c8", "standard c32", "long c8", "prefix c8")
    }
    assert all(cell["summary"]["num_short"] == 0 for cell in found["cells"])
    assert "| roofline | share |" in (tmp_path / "tiny" / "report.md").read_text()


class _ScriptedShape(Shape):
    """A shape whose server is not ours: what is tested is the measuring."""

    def tessera(self, width: str, *options: str, max_num_seqs: int, max_model_len: int = 0) -> str:
        return SCRIPTED


def test_memory_is_measured_with_a_new_server_for_each_context(tmp_path: Path) -> None:
    curve = MemoryCurve(_ScriptedShape("scripted", tmp_path), tmp_path, contexts=(64, 128))
    assert curve.run() == 0
    assert [point.context for point in curve.points] == [64, 128]
    assert all(point.peak_bytes >= point.idle_bytes > 0 for point in curve.points)
    assert len(json.loads((tmp_path / "memory.json").read_text())["points"]) == 2
    assert (tmp_path / "memory.png").exists()


def test_memory_is_told_by_sequence_and_token() -> None:
    point = MemoryPoint(1024, 100 * 2**20, 140 * 2**20, 50.0, 2.0, 0, "clean")
    assert point.bytes_per_sequence == 10 * 2**20
    assert "| 1024 | clean | 100 | 140 | 10.0 | 10.0 | 50.0 | 2.00 |" in memory_table([point])


def test_a_shape_that_is_none_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.main(["cells", "--shapes", "huge", "--models", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "model.init" in capsys.readouterr().err
    with pytest.raises(ShapeError, match=r"json.tool: .*No such file"):
        run_module("json.tool", str(tmp_path / "absent"))
