"""Copies of models that a machine is sent: whole and right or not there, safe beside others, within their bound."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from model.checkpoint import save_model
from model.fingerprint import CONFIG_FILE, WEIGHTS_FILE, Identity, identify
from model.mosaic_v1 import MemoryMosaic
from model.tokenizer import TOKENIZER_FILE
from service.errors import EngineStartError, ModelNotFoundError
from service.model_copies import MODEL_FILES, ModelCopies, copies_directory
from service.model_offer import PIECE_BYTES, ModelOffer
from service.settings import DEFAULT_MODEL
from tests.engine.test_with_checkpoint import CONFIG

PLENTY = 1 << 30


class Sender:
    """A source that reads an offer, and counts what it was asked for."""

    def __init__(self, directory: Path) -> None:
        self.files = {name: (directory / name).read_bytes() for name in MODEL_FILES if (directory / name).exists()}
        self.num_fetches = 0

    def sizes(self) -> Mapping[str, int]:
        self.num_fetches += 1
        time.sleep(0.1)  # for whoever might come between
        return {name: len(content) for name, content in self.files.items()}

    def pieces(self, name: str) -> Iterator[bytes]:
        for start in range(0, len(self.files[name]), 1000):
            yield self.files[name][start : start + 1000]


def make_model(directory: Path, seed: int, *, has_tokenizer: bool = True) -> Path:
    torch.manual_seed(seed)
    save_model(MemoryMosaic(CONFIG), CONFIG, directory)
    if has_tokenizer:
        shutil.copy(DEFAULT_MODEL / TOKENIZER_FILE, directory)
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [make_model(tmp_path_factory.mktemp("model"), seed) for seed in range(3)]


def size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir())


def kept(directory: Path) -> list[Path]:
    """Everything in a directory of copies but its lock."""
    return [path for path in directory.iterdir() if path.name != "lock"]


def test_a_copy_is_the_same_and_is_fetched_once(models: list[Path], tmp_path: Path) -> None:
    sender, identity = Sender(models[0]), identify(models[0])
    first = ModelCopies(tmp_path / "copies", PLENTY).lend(identity, sender)
    again = ModelCopies(tmp_path / "copies", PLENTY).lend(identity, sender)
    assert first == again
    assert sender.num_fetches == 1
    assert identify(first) == identity
    assert {path.name for path in first.iterdir()} == set(MODEL_FILES)
    for path in (tmp_path / "copies", first):
        assert path.stat().st_mode & 0o777 == 0o700


def test_who_comes_while_another_fetches_waits_for_it(models: list[Path], tmp_path: Path) -> None:
    sender, identity = Sender(models[0]), identify(models[0])
    with ThreadPoolExecutor() as threads:
        lent = [threads.submit(ModelCopies(tmp_path / "copies", PLENTY).lend, identity, sender) for _ in range(4)]
        assert len({future.result(timeout=60) for future in lent}) == 1
    assert sender.num_fetches == 1


def test_tokenizers_tell_copies_apart(models: list[Path], tmp_path: Path) -> None:
    bare = make_model(tmp_path / "bare", 0, has_tokenizer=False)
    copies = ModelCopies(tmp_path / "copies", PLENTY)
    directories = [copies.lend(identify(directory), Sender(directory)) for directory in (models[0], bare)]
    assert [(directory / TOKENIZER_FILE).exists() for directory in directories] == [True, False]


@pytest.mark.parametrize("name", MODEL_FILES)
def test_what_arrives_otherwise_than_it_was_asked_for_is_refused(models: list[Path], tmp_path: Path, name: str) -> None:
    sender = Sender(models[0])
    middle = len(sender.files[name]) // 2
    content = bytearray(sender.files[name])
    content[middle] ^= 1
    sender.files[name] = bytes(content)
    with pytest.raises(ModelNotFoundError, match="is not"):
        ModelCopies(tmp_path / "copies", PLENTY).lend(identify(models[0]), sender)
    assert kept(tmp_path / "copies") == []


def test_another_checkpoint_is_refused(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=f"is not {identify(models[0])}"):
        ModelCopies(tmp_path / "copies", PLENTY).lend(identify(models[0]), Sender(models[1]))
    assert kept(tmp_path / "copies") == []


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_length_than_announced_is_refused(
    models: list[Path], tmp_path: Path, change: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = Sender(models[0])
    sizes = {name: len(content) for name, content in sender.files.items()}
    monkeypatch.setattr(sender, "sizes", lambda: sizes | {WEIGHTS_FILE: sizes[WEIGHTS_FILE] + change})
    with pytest.raises(ModelNotFoundError, match=f"{WEIGHTS_FILE} was not sent as announced"):
        ModelCopies(tmp_path / "copies", PLENTY).lend(identify(models[0]), sender)
    assert kept(tmp_path / "copies") == []


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "evil.py", ""])
def test_a_sender_does_not_choose_where_it_is_written(models: list[Path], tmp_path: Path, name: str) -> None:
    sender = Sender(models[0])
    sender.files[name] = b"import os"
    with pytest.raises(ModelNotFoundError, match="no file of a model"):
        ModelCopies(tmp_path / "copies", PLENTY).lend(identify(models[0]), sender)
    assert kept(tmp_path / "copies") == []


def test_a_damaged_copy_is_fetched_anew(models: list[Path], tmp_path: Path) -> None:
    sender, identity = Sender(models[0]), identify(models[0])
    copy = ModelCopies(tmp_path / "copies", PLENTY).lend(identity, sender)
    (copy / CONFIG_FILE).unlink()
    assert ModelCopies(tmp_path / "copies", PLENTY).lend(identity, sender) == copy
    assert sender.num_fetches == 2
    assert identify(copy) == identity


def lend_and_end(directory: Path, bound: int, identity: Identity, sender: Sender) -> Path:
    """As a process would that ends at once."""
    copies = ModelCopies(directory, bound)
    copy = copies.lend(identity, sender)
    for descriptor in copies._held:
        os.close(descriptor)
    return copy


def test_the_copies_used_least_recently_go_first(models: list[Path], tmp_path: Path) -> None:
    bound = 2 * max(map(size, models)) + 1000
    identities, senders = [identify(model) for model in models], [Sender(model) for model in models]
    lend = [(identity, sender) for identity, sender in zip(identities, senders, strict=True)]
    first = lend_and_end(tmp_path / "copies", bound, *lend[0])
    second = lend_and_end(tmp_path / "copies", bound, *lend[1])
    os.utime(first, (1, 1))
    lend_and_end(tmp_path / "copies", bound, *lend[0])  # which makes it the latest
    os.utime(second, (2, 2))
    third = lend_and_end(tmp_path / "copies", bound, *lend[2])
    assert sorted(kept(tmp_path / "copies")) == sorted([first, third])


def test_a_copy_in_use_stays_and_what_has_no_room_is_refused(models: list[Path], tmp_path: Path) -> None:
    bound = size(models[0]) + 1000
    holder = ModelCopies(tmp_path / "copies", bound)
    copy = holder.lend(identify(models[0]), Sender(models[0]))
    with pytest.raises(EngineStartError, match="--model-copies"):
        ModelCopies(tmp_path / "copies", bound).lend(identify(models[1]), Sender(models[1]))
    assert kept(tmp_path / "copies") == [copy]
    assert identify(copy) == identify(models[0])


def test_what_is_larger_than_the_bound_takes_nothing_away(models: list[Path], tmp_path: Path) -> None:
    copy = lend_and_end(tmp_path / "copies", PLENTY, identify(models[0]), Sender(models[0]))
    with pytest.raises(EngineStartError, match="--model-copies"):
        ModelCopies(tmp_path / "copies", 1000).lend(identify(models[1]), Sender(models[1]))
    assert kept(tmp_path / "copies") == [copy]


def test_what_a_killed_process_left_unfinished_goes(models: list[Path], tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    code = f"""
import os, signal
from pathlib import Path
from model.fingerprint import Identity
from service.model_copies import ModelCopies
class Dying:
    def sizes(self): return {{"config.json": 2}}
    def pieces(self, name): os.kill(os.getpid(), signal.SIGKILL)
ModelCopies(Path({str(copies)!r}), 1000).lend(Identity("a", "b"), Dying())
"""
    killed = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert killed.returncode == -9
    assert len(kept(copies)) == 1
    copy = ModelCopies(copies, PLENTY).lend(identify(models[0]), Sender(models[0]))
    assert kept(copies) == [copy]


def test_a_directory_that_others_may_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "elsewhere").symlink_to(tmp_path / "open")
    for name in ("open", "elsewhere"):
        with pytest.raises(PermissionError, match="owner alone"):
            ModelCopies(tmp_path / name, PLENTY)


def test_copies_are_where_a_users_caches_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert copies_directory() == tmp_path / "tessera" / "models"
    for unusable in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert copies_directory() == Path.home() / ".cache" / "tessera" / "models"


def test_an_offer_is_of_regular_files_as_they_were(models: list[Path], tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(models[0], directory)
    (directory / TOKENIZER_FILE).unlink()
    os.mkfifo(directory / TOKENIZER_FILE)  # which must not be waited for
    (directory / "notes.txt").write_text("private")
    offer = ModelOffer(directory, MODEL_FILES)
    assert offer.sizes() == {name: (models[0] / name).stat().st_size for name in (CONFIG_FILE, WEIGHTS_FILE)}
    weights = (directory / WEIGHTS_FILE).read_bytes()
    shutil.rmtree(directory)
    assert offer.piece(WEIGHTS_FILE, 5) == weights[5 : 5 + PIECE_BYTES]
    with pytest.raises(KeyError):
        offer.piece("notes.txt", 0)
    assert ModelOffer(None, MODEL_FILES).sizes() == {}
