"""What a model's directory is known by, whatever it is called and wherever it lies. No torch."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from model.config import NetworkConfig
from model.small_files import read_small_text
from model.tokenizer import MAX_FILE_BYTES, TOKENIZER_FILE

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def fingerprint(directory: str | os.PathLike[str], config: NetworkConfig | None = None) -> str:
    """64 hexadecimal digits, the same for equal configurations and equal files of weights. Reads all of the weights.

    Raises OSError where a file cannot be read, ValueError where the configuration is none.
    """
    config = config or NetworkConfig.load(Path(directory) / CONFIG_FILE)
    with (Path(directory) / WEIGHTS_FILE).open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(json.dumps([config.to_json(), weights]).encode()).hexdigest()


def require_fingerprint(directory: str | os.PathLike[str], found: str, asked: str) -> None:
    """Raises ValueError where the fingerprint found in a directory does not begin with what was asked for."""
    if not found.startswith(asked):
        raise ValueError(f"the checkpoint in {directory} is {found[:12]}, and {asked[:12]} was asked for")


def tokenizer_digest(directory: str | os.PathLike[str]) -> str:
    """64 hexadecimal digits of the directory's tokenizer.json; none where it has no such file.

    Raises OSError where it cannot be read, ValueError where it is too large or no text.
    """
    path = Path(directory) / TOKENIZER_FILE
    if not path.exists():
        return ""
    return hashlib.sha256(read_small_text(path, MAX_FILE_BYTES).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells the content of one model directory from another: of its network, and of its tokenizer if any."""

    fingerprint: str
    tokenizer: str

    def __str__(self) -> str:
        return f"{self.fingerprint[:12]} with " + (
            f"tokenizer {self.tokenizer[:12]}" if self.tokenizer else "no tokenizer"
        )


def identify(directory: str | os.PathLike[str]) -> Identity:
    """Reads all files that serve. Raises OSError where one cannot be read, ValueError where it is none of a model."""
    weights = Path(directory) / WEIGHTS_FILE
    if not weights.is_file():  # which opening, of a pipe for one, would not tell
        raise FileNotFoundError(f"{weights}: no such file")
    return Identity(fingerprint(directory), tokenizer_digest(directory))
