"""Every command of docs/training.md runs as it is written, on a tiny corpus and with a hundredth of the steps.

The recipes that the page names load, and describe networks of the sizes it says.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch

from model.tokenizer import Tokenizer
from model.training.networks import make_network, network_config
from model.training.recipe import load_recipe
from model.training.tokens import train_tokenizer
from tests.model.training.texts import documents, write_corpus
from tests.service.process import ServerProcess, clean_environment

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
STEPS = {
    "steps: 400": "steps: 4",
    "steps=440": "steps=6",
    "steps=480": "steps=8",
    "decay_steps=40": "decay_steps=2",
    "training.steps=40 ": "training.steps=2 ",
}
ENVIRONMENT = {"TESSERA_LOCAL": "1", "TESSERA_THREADS": "1", "OMP_NUM_THREADS": "1"}


def test_every_command_runs(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    write_corpus(tmp_path / "texts")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ran = []
    for language, text in BLOCKS:
        for long, short in STEPS.items():
            text = text.replace(long, short)
        if language == "yaml":
            (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        elif text.startswith("tessera serve"):
            with ServerProcess(
                command=("bash", "-c", f"exec {text}"), cwd=tmp_path, environment=ENVIRONMENT | {"PATH": path}
            ) as server:
                answer = httpx.post(
                    f"{server.url}/v1/completions", json={"prompt": "the fox", "max_tokens": 4}, timeout=30
                )
                assert answer.json()["usage"]["completion_tokens"] <= 4
        else:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", text],
                cwd=tmp_path, env=clean_environment(ENVIRONMENT | {"PATH": path}), timeout=120,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{text}\n{done.stdout}"
        ran.append(language)
    assert ran.count("bash") >= 7
    states = {path.parent.parent.name: path.name for path in tmp_path.glob("*/state/*")}
    assert states == {
        "run": "step-00000006",
        "further": "step-00000002",
        "baseline": "step-00000004",
        "two": "step-00000004",
        "branch": "step-00000008",
    }
    listed = set(re.findall(r"^\| `([\w./-]+?)[`/]", PAGE.split("## What lies")[1].split("##")[0], re.MULTILINE))
    assert {path.name for path in (tmp_path / "run").iterdir()} == listed - {"tensorboard"}


@pytest.mark.parametrize(
    ("name", "millions"),
    [("tinystories", 29.4), ("babistories", 123.6), ("babistories-transformer", 124.0), ("pilot", 1.1)],
)
def test_the_recipes_describe_what_they_say(name: str, millions: float) -> None:
    recipe = load_recipe(ROOT / "model" / "recipes" / f"{name}.yaml")
    assert f"`{name}.yaml`" in PAGE
    vocabulary = recipe.data.vocab_size or {"pilot": 4096}.get(name, 50257)
    tokenizer = Tokenizer(train_tokenizer(documents(9, 1), 300))
    recipe = recipe.model_copy(update={"model": {**recipe.model, "vocab_size": vocabulary}})
    with torch.device("meta"):
        network = make_network(network_config(recipe, tokenizer))
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
