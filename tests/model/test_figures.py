"""Pictures of a network: the weights they show are those of its reads; the commands draw what they name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.figures.__main__ import main
from model.figures.curves import main as draw_curves
from model.figures.persistent import most_used
from model.figures.position import losses, without
from model.figures.retrieved import retrieved
from model.init import init_model
from model.past import ParallelPast
from model.past_v2 import Memory, ParallelPastV2
from model.presets import SHAPES
from tests.model.mosaics import (
    assert_close,
    draw_ids,
    random_model,
    random_v2_model,
    small_config,
    small_v2_config,
)
from tests.model.training.texts import documents

PICTURES = ("retrieval", "keys", "persistent", "position")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n<|endoftext|>\n".join(documents(20, 1)), encoding="utf-8")
    return path


@pytest.mark.parametrize("shape", ["tiny", "v2-tiny"])
def test_the_command_draws_every_picture(tmp_path: Path, text: Path, shape: str) -> None:
    init_model(replace(SHAPES[shape], block_size=40), tmp_path / "model")
    directories = [str(tmp_path / "model"), str(tmp_path / "out")]
    assert main([*directories, "--text", str(text), "--sentence", "a fox, a box"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{name}.png" for name in PICTURES}
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes().startswith(PNG)
        assert 2_000 < path.stat().st_size < 150_000


def test_what_cannot_be_drawn_is_said_in_one_line(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init_model(SHAPES["tiny"], tmp_path / "model")
    text.write_text("too short", encoding="utf-8")
    assert main([str(tmp_path / "model"), str(tmp_path / "out"), "--text", str(text)]) == 2
    assert "at least 513 are needed" in capsys.readouterr().err
    assert main([str(tmp_path / "nothing"), str(tmp_path / "out"), "--text", str(text)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_curves_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, loss in (("a", "3.5"), ("b", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.csv").write_text(f"step,tokens,validation_loss\n1,1000,\n2,2000,{loss}\n")
    assert draw_curves([str(tmp_path / "curves.png"), f"first={tmp_path / 'a'}"]) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)
    assert draw_curves([str(tmp_path / "curves.png"), f"second={tmp_path / 'b'}"]) == 2
    assert "no step was validated" in capsys.readouterr().err


def test_weights_are_those_of_the_first_versions_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    # Values that name their pairs: what a read returns is then the weights themselves.
    model, ids = random_model(small_config()).requires_grad_(False), draw_ids(11, 9)[0]
    read, returned = ParallelPast.read, []

    def telling(self: ParallelPast, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        returned.append(read(self, queries, keys, _numbers(values))[0])
        return read(self, queries, keys, values)

    monkeypatch.setattr(ParallelPast, "read", telling)
    expected = model(ids[None])
    returned.clear()
    weights = retrieved(model, ids)["contextual"]
    assert_close(
        torch.stack(returned), torch.einsum("lhti,i->lth", weights, _of_pairs(9))[..., None].expand(-1, -1, -1, 6), 1e-9
    )
    assert_close(weights.sum(-1)[:, :, 1:], torch.ones(2, 2, 8), 1e-9)
    assert torch.equal(model(ids[None]), expected), "nothing stays behind"


def test_weights_are_those_of_the_second_versions_reads() -> None:
    config = small_v2_config(short_window=5, long_delay=3, max_train_delay=5)
    weights = retrieved(random_v2_model(config).requires_grad_(False), draw_ids(11, 9)[0])
    for memory, name in zip(Memory, ("short-term", "long-term"), strict=True):
        past = ParallelPastV2(torch.zeros(1, 9, dtype=torch.int64), window=5, delay=3)
        seen = (weights[name] > 0).sum(-1)
        assert torch.equal(seen, past.num_visible(memory).expand_as(seen))


def test_a_memory_is_silenced_and_speaks_again() -> None:
    model, ids = random_v2_model(small_v2_config()).requires_grad_(False), torch.stack(draw_ids(11, 12, 12))
    whole = losses(model, ids)
    for part in ("short-term", "long-term", "persistent"):
        with without(model, part):
            changed = losses(model, ids)
        assert not torch.allclose(changed, whole)
    assert torch.equal(losses(model, ids), whole)
    # The long-term memory shows nothing before the delay.
    with without(model, "long-term"):
        assert torch.equal(losses(model, ids)[:, :3], whole[:, :3])


def test_entries_of_persistent_memories_add_up_to_what_is_read() -> None:
    model, ids = random_model(small_config(n_layer=1, n_head=1, pmem_size=1)).requires_grad_(False), draw_ids(11, 9)[0]
    said: list[torch.Tensor] = []
    model.blocks[0].get_submodule("persistent").register_forward_hook(lambda _, __, out: said.append(out))
    (entry,) = most_used(model, ids[None])
    assert_close(entry.use[:, None] * entry.value, said[0][0], 1e-9)


def _of_pairs(time: int) -> torch.Tensor:
    return torch.arange(1, time, dtype=torch.float64)


def _numbers(values: torch.Tensor) -> torch.Tensor:
    """The number of a pair in place of its value, from 1 on."""
    return torch.arange(values.shape[1], dtype=values.dtype)[None, :, None, None].expand_as(values)
