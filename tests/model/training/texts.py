"""A corpus small enough to train on in a test, and a recipe for it."""

from __future__ import annotations

import lzma
import random
from pathlib import Path
from typing import Any

import yaml

WHO = ("the fox", "a little bird", "Tom", "Sara", "the old king", "her cat")
DID = ("found", "lost", "liked", "painted", "carried", "hid")
WHAT = ("a red ball", "the box", "some bread", "a song", "the moon", "his hat")


def documents(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)

    def sentence() -> str:
        return f"{rng.choice(WHO)} {rng.choice(DID)} {rng.choice(WHAT)}."

    return [" ".join(sentence() for _ in range(rng.randint(4, 9))) for _ in range(count)]


def write_corpus(directory: Path) -> None:
    """`stories.txt.xz` and `tales.txt`."""
    join = "\n<|endoftext|>\n".join
    (directory / "stories.txt.xz").write_bytes(lzma.compress(join(documents(120, 1)).encode()))
    (directory / "tales.txt").write_text(join(documents(60, 2)), encoding="utf-8")


def write_recipe(directory: Path, **sections: dict[str, Any]) -> Path:
    """`recipe.yaml` of a network of two layers, with changes to its sections."""
    values: dict[str, dict[str, Any]] = {
        "model": {"architecture": "memory-mosaic-v1", "n_layer": 2, "n_head": 2, "n_embd": 16, "pmem_size": 12},
        "data": {
            "sources": [{"path": "stories.txt.xz", "weight": 1.5}, {"path": "tales.txt", "weight": 0.5}],
            "vocab_size": 300,
            "held_out": 0.1,
            "window": 24,
        },
        "training": {"steps": 6, "batch": 4, "micro_batch": 2, "learning_rate": 0.01, "warmup_steps": 2},
        "run": {"directory": "run", "device": "cpu", "log_every": 2, "evaluate_every": 4},
    }
    for name, changes in sections.items():
        values[name] = values[name] | changes
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path
