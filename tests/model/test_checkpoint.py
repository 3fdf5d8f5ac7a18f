"""Model directories: what is written is read back, and what does not fit is refused before it costs memory."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint import expected_shapes, load_model, save_model
from model.config import MosaicConfig
from tests.model.mosaics import random_model, small_config

CONFIG = small_config(bias=True, tied=False, pmem_count=2)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_model(random_model(CONFIG, dtype=torch.float32), CONFIG, tmp_path)
    return tmp_path


def rewrite(directory: Path, **changes: torch.Tensor | None) -> None:
    """Replaces tensors of the weights file; None leaves one out."""
    weights = load_file(directory / "model.safetensors") | {name.replace("__", "."): t for name, t in changes.items()}
    save_file({name: t for name, t in weights.items() if t is not None}, directory / "model.safetensors")


def reconfigure(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("changes", [{}, {"tied": False, "value_extractor": "linearconv"}, {"has_persistent": False}])
def test_round_trip(tmp_path: Path, changes: dict[str, Any], dtype: torch.dtype) -> None:
    config = small_config(**changes)
    model = random_model(config, dtype=dtype).requires_grad_(False)
    save_model(model, config, tmp_path / "new" / "directory")
    loaded = load_model(tmp_path / "new" / "directory", dtype=dtype)
    assert loaded.config == config
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    state = loaded.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected_shapes(config)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert torch.equal(model(torch.tensor([[1, 2, 3]])), loaded(torch.tensor([[1, 2, 3]])))


def test_names_are_the_documented_ones() -> None:
    shapes = expected_shapes(small_config(n_layer=1, bias=True, tied=False, value_extractor="linearconv"))
    assert shapes["blocks.0.contextual.value.next.weight"] == (12, 12)
    assert shapes["blocks.0.contextual.value.bias"] == (12,)
    assert shapes["blocks.0.persistent.keys"] == (1, 2, 5, 6)
    assert shapes["blocks.0.contextual.key.leak"] == (2,)
    assert shapes["head.weight"] == (11, 12)
    assert "head.weight" not in expected_shapes(small_config())
    assert not any("persistent" in name for name in expected_shapes(small_config(has_persistent=False)))


def test_loaded_as_a_narrower_type(directory: Path) -> None:
    model = load_model(directory, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    precise = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert {"norm.weight", "blocks.0.persistent.log_scale", "blocks.0.contextual.value.mix"} <= precise
    assert not any(n.endswith(("projection.weight", "projection.bias", "keys", "values")) for n in precise)


def test_stored_in_a_narrower_type(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, directory / "model.safetensors")
    assert torch.equal(load_model(directory).norm.weight, weights["norm.weight"].bfloat16().float())


def test_the_fingerprint_names_the_content(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    first = load_model(directory)
    copy = tmp_path_factory.mktemp("copy")
    save_model(first.state_dict(), CONFIG, copy)
    assert load_model(copy, dtype=torch.bfloat16).fingerprint == first.fingerprint
    assert len(first.fingerprint) == 64
    reconfigure(copy, eos_token_id=3)
    other_config = load_model(copy).fingerprint
    reconfigure(copy, eos_token_id=None)
    rewrite(copy, norm__weight=torch.ones(12))
    assert len({first.fingerprint, other_config, load_model(copy).fingerprint}) == 3


def test_saving_replaces_whole_files_that_others_may_read(directory: Path) -> None:
    save_model(random_model(CONFIG, seed=1, dtype=torch.float32), CONFIG, directory)
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors"]
    modes = {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}
    assert len(modes) == 1


def test_a_loaded_model_does_not_depend_on_its_file(directory: Path) -> None:
    model = load_model(directory)
    before = model(torch.tensor([[1, 2]]))
    path = directory / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(model(torch.tensor([[1, 2]])), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm__weight": None}, "'norm.weight' is missing"),
        (
            {"blocks__0__persistent__keys": torch.zeros(2, 2, 5, 7)},
            r"'blocks.0.persistent.keys' has shape \[2, 2, 5, 7\]",
        ),
        ({"blocks__2__contextual_norm__weight": torch.zeros(12)}, "'blocks.2.contextual_norm.weight' has no place"),
        ({"norm__weight": torch.zeros(12, dtype=torch.int32)}, "'norm.weight' is of type I32"),
        ({"norm__bias": torch.full((12,), torch.nan)}, "'norm.bias' holds numbers that are not finite"),
    ],
)
def test_weights_that_do_not_fit_are_named(directory: Path, changes: dict[str, Any], message: str) -> None:
    rewrite(directory, **changes)
    with pytest.raises(ValueError, match=rf"model\.safetensors: tensor {message}"):
        load_model(directory)


def test_numbers_too_large_for_the_type(directory: Path) -> None:
    rewrite(directory, head__weight=torch.full((11, 12), 1e6))
    load_model(directory)
    with pytest.raises(ValueError, match=r"'head.weight' .* not finite as torch.float16"):
        load_model(directory, dtype=torch.float16)


def test_a_configuration_of_absurd_size_allocates_nothing(directory: Path) -> None:
    # The weights it describes would take half a terabyte.
    reconfigure(directory, n_embd=1 << 16, vocab_size=1 << 21)
    with pytest.raises(ValueError, match=r"tensor 'embedding\.weight' has shape"):
        load_model(directory)


@pytest.mark.parametrize("damage", [b"", b"\xff" * 64, "half"])
def test_a_damaged_file(directory: Path, damage: bytes | str) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(damage if isinstance(damage, bytes) else path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_model(directory)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file(directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(FileNotFoundError, match=name.replace(".", r"\.")):
        load_model(directory)


def test_a_type_that_is_none(directory: Path) -> None:
    with pytest.raises(ValueError, match="dtype"):
        load_model(directory, dtype=torch.int8)


def test_what_does_not_fit_is_not_saved(tmp_path: Path) -> None:
    state = random_model(CONFIG).state_dict()
    other: MosaicConfig = small_config(n_embd=24)
    with pytest.raises(ValueError, match=r"'embedding\.weight'"):
        save_model(state, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()
