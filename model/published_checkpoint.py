"""Reading a training checkpoint from someone else without running code from it."""

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.published import COMPILED_PREFIX, ConversionError

# The structure around the tensors; the published scripts leave some hundred kilobytes.
_MAX_PICKLE_BYTES = 16 << 20


@dataclass(frozen=True)
class PublishedCheckpoint:
    """What a published training script saved, as far as we use it."""

    tensors: Mapping[str, Tensor]
    """`model`, names without torch.compile's prefix."""
    arguments: Mapping[str, Any]
    """`model_args`: all arguments of Library's script, the sizes alone in nanoMosaics."""
    settings: Mapping[str, Any]
    """`config`: the settings of nanoMosaics' script; empty in Library."""
    progress: Mapping[str, Any]
    """How far training had come: `iter_num` and, in nanoMosaics, `best_val_loss`."""


def read_checkpoint(path: Path) -> PublishedCheckpoint:
    """Reads a file of torch.save. ConversionError where it is none of a training script, OSError where unread."""
    loaded = _load(path)
    for entry in ("model", "model_args"):
        if not isinstance(loaded.get(entry), dict):
            raise ConversionError(f"{path}: not a checkpoint of the published training code, it has no {entry!r} entry")
    tensors = _without_prefix(loaded["model"])
    _check_sizes(path, tensors)
    settings = loaded.get("config")
    return PublishedCheckpoint(
        tensors=tensors,
        arguments=loaded["model_args"],
        settings=settings if isinstance(settings, dict) else {},
        progress={name: _number(loaded[name]) for name in ("iter_num", "best_val_loss") if name in loaded},
    )


def _load(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ConversionError(f"{path}: {'a directory' if path.is_dir() else 'no such file'}")
    # What this raises is the file system's; what torch raises below, in many kinds, is the content's.
    path.open("rb").close()
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _check_parts(path)
    try:
        # The published formats hold tensors and plain Python values only: no type needs to be allowed on top.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError:
        raise ConversionError(f"{path}: {_why_unreadable(path)}") from None
    except Exception as error:
        raise ConversionError(f"{path}: not a file written by torch.save ({type(error).__name__})") from None
    if not isinstance(loaded, dict):
        raise ConversionError(f"{path}: holds a {type(loaded).__name__}, not a training checkpoint")
    return loaded


def _check_parts(path: Path) -> None:
    """torch.save leaves its parts as they are, so that no file is larger than it looks."""
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError):
        return  # torch says what is wrong
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise ConversionError(f"{path}: not a file written by torch.save, its parts are compressed")
    if any(part.filename.endswith(".pkl") and part.file_size > _MAX_PICKLE_BYTES for part in parts):
        raise ConversionError(f"{path}: more than {_MAX_PICKLE_BYTES} bytes beside its tensors")


def _check_sizes(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A tensor can repeat what is there and so be of any size. Tied weights are there once for two."""
    num_bytes, most = sum(tensor.nbytes for tensor in tensors.values()), 2 * path.stat().st_size
    if num_bytes > most:
        raise ConversionError(f"{path}: its tensors come to {num_bytes} bytes, a file of this size has {most} at most")


def _why_unreadable(path: Path) -> str:
    try:
        refused = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not in torch's zip format, so it cannot be looked into
        refused = []
    if not refused:
        return "not a file written by torch.save"
    return f"holds objects that only run code could restore ({', '.join(sorted(refused)[:3])}); nothing was run"


def _without_prefix(named: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, tensor in named.items():
        bare = str(name).removeprefix(COMPILED_PREFIX)
        if not isinstance(tensor, Tensor):
            raise ConversionError(f"{name} is not a tensor")
        if bare in tensors:
            raise ConversionError(f"{bare} is there twice, with and without the prefix {COMPILED_PREFIX}")
        tensors[bare] = tensor
    return tensors


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
