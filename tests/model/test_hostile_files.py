"""Model files from someone who means harm: no code runs, and no memory is taken that the file does not hold."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import load_model, save_model
from model.config import NetworkConfig
from model.convert import convert_checkpoint
from model.published import ConversionError
from model.tokenizer import Tokenizer
from service.settings import DEFAULT_MODEL
from tests.model.mosaics import random_model, small_config
from tests.model.published_checkpoints import library_checkpoint

CONFIG = small_config()
SHIPPED = DEFAULT_MODEL


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_model(random_model(CONFIG, dtype=torch.float32), CONFIG, tmp_path)
    return tmp_path


def entry(offsets: list[int], shape: list[int], kind: str = "F32") -> dict[str, object]:
    return {"dtype": kind, "shape": shape, "data_offsets": offsets}


def weights(header: dict[str, object] | bytes, data: bytes = bytes(16)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (struct.pack("<Q", 1 << 60) + b"{}", "its header is 1152921504606846976 bytes long"),
        (weights(b"{" + b" " * (17 << 20) + b"}"), "its header is 17825794 bytes long"),
        (weights(b'{"a":' * 50_000), "recursion"),
        (weights({"a": entry([0, 1 << 50], [1 << 48])}), "not fully covered"),
        (weights({"a": entry([0, 16], [1 << 62, 4])}), "overflow"),
        (weights({"a": entry([0, 16], [-1])}), "-1"),
        (weights({"a": entry([0, 16], [4]), "b": entry([0, 16], [4])}), "offset"),
        (weights({"a": entry([4, 16], [3])}), "offset"),
        (weights({"a": entry([0, 16], [4], "OBJECT")}), "OBJECT"),
        (weights({f"t{i}": entry([0, 0], [0]) for i in range(1000)}, b""), "is missing"),
        (pickle.dumps({"a": 1}), "header"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_weights_that_lie_are_refused(directory: Path, content: bytes, words: str) -> None:
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=rf"model\.safetensors: .*{words}"):
        load_model(directory)


@pytest.mark.parametrize(
    ("name", "load"),
    [("config.json", lambda d: NetworkConfig.load(d / "config.json")), ("tokenizer.json", Tokenizer.load)],
)
@pytest.mark.parametrize("kind", ["pipe", "device", "sparse"])
def test_files_without_end_are_not_read(directory: Path, name: str, load: Callable[[Path], object], kind: str) -> None:
    path = directory / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    with pytest.raises(ValueError, match=rf"{name}: (not a regular file|too large)"):
        load(directory)


def test_weights_that_are_no_file_are_not_read(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").symlink_to("/dev/zero")
    with pytest.raises(FileNotFoundError):
        load_model(directory)


@pytest.mark.parametrize("token_id", [1 << 21, 2**32 - 1])
def test_an_id_does_not_size_the_table_of_tokens(token_id: int) -> None:
    content = json.loads((SHIPPED / "tokenizer.json").read_text())
    content["model"]["vocab"]["x" * 9] = token_id
    with pytest.raises(ValueError, match=f"token id {token_id}"):
        Tokenizer(json.dumps(content))


def refused(tmp_path: Path) -> str:
    with pytest.raises(ConversionError) as caught:
        convert_checkpoint(tmp_path / "ckpt.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def test_a_tensor_larger_than_its_data_is_refused(tmp_path: Path) -> None:
    """It repeats one number: 17 GB of weights in a file of a few kilobytes."""
    checkpoint: dict[str, Any] = library_checkpoint()
    name = next(iter(checkpoint["model"]))
    checkpoint["model"][name] = torch.zeros(1).expand(1 << 16, 1 << 16)
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    assert "come to 17" in refused(tmp_path)


def rewrite(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Writes the archive anew, each part as `change` makes it."""
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, change(name, content))


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_a_file_that_grows_when_it_is_read_is_refused(tmp_path: Path, compression: int) -> None:
    def padded(name: str, content: bytes) -> bytes:
        return content + bytes(17 << 20) if name.endswith("data.pkl") else content

    torch.save(library_checkpoint(), tmp_path / "ckpt.pt")
    rewrite(tmp_path / "ckpt.pt", padded, compression)
    assert ("compressed" if compression else "beside its tensors") in refused(tmp_path)


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02cos\nsystem\n(X\x0f\x00\x00\x00touch exploitedtR.",
        b"\x80\x02cbuiltins\neval\n(X\x04\x00\x00\x001+1\ntR.",
        b"\x80\x02ctorch.hub\nload\n(X\x01\x00\x00\x00xX\x01\x00\x00\x00ytR.",
        b"\x80\x02]" + b"(" * 10_000 + b"l" * 10_000 + b".",
        b"\x80\x04\x96" + struct.pack("<Q", 1 << 60) + b".",
    ],
    ids=["system", "eval", "hub", "nested", "huge"],
)
def test_programs_for_the_unpickler_do_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: bytes) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(library_checkpoint(), tmp_path / "ckpt.pt")
    rewrite(tmp_path / "ckpt.pt", lambda name, content: program if name.endswith("data.pkl") else content)
    assert "ckpt.pt: " in refused(tmp_path)
    (tmp_path / "ckpt.pt").write_bytes(program)  # and in the older format
    assert "ckpt.pt: " in refused(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]
