"""What a model's directory is known by, whatever it is called and wherever it lies. No torch."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from model.config import NetworkConfig

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
