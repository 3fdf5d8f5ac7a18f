"""A run's model becomes a directory to pass on: narrow, whole, with a card whose numbers are measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from model import ship
from model.checkpoint import load_model
from model.evaluate import main as evaluate
from model.ship import main
from model.tokenizer import Tokenizer
from model.train import main as train
from model.training.recipe import load_recipe
from model.training.samples import complete
from tests.model.training.texts import write_recipe

V2 = (
    "model={architecture: memory-mosaic-v2, n_layer: 1, n_head: 2, n_embd: 16, persistent_size: 24, "
    "short_window: 8, long_delay: 2, max_train_delay: 6}"
)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_runs_model_with_its_card(
    corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(ship, "SAMPLE_TOKENS", 5)
    recipe = write_recipe(corpus, run={"prompts": ["Tom found", "the fox"]})
    keys = ["training.schedule=constant", "training.decay_steps=2", *([V2] if version == "v2" else [])]
    about, runs, out, text = (corpus / name for name in ("about.md", "runs.md", "my-tales", "tales.txt"))
    runs.write_text("## Earlier runs\n\nMany.\n", encoding="utf-8")
    about.write_text("**Made in a test.**\n\n## Use\n\nNone.\n\n## Data\n\nOurs.\n", encoding="utf-8")
    assert train([str(recipe), *keys]) == 0
    from_people = ["--about", str(about), "--about", str(runs)]
    assert main([str(recipe), str(out), *keys, "--text", str(text), *from_people]) == 0
    assert {path.name for path in out.iterdir()} == {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    card = (out / "README.md").read_text(encoding="utf-8")
    model, tokenizer = load_model(out), Tokenizer.load(out)
    assert tokenizer is not None
    assert card.startswith("# my-tales\n\n**Made in a test.**\n\n")
    sections = ["Use", "Data", "Earlier runs", "Training", "Validation", "Completions"]
    assert re.findall(r"^## (.*)$", card, re.MULTILINE) == sections
    for row in (
        f"| parameters | {model.num_parameters:,} |", "| weights | bfloat16, safetensors |", "| steps | 6 |",
        "| batch | 4 windows of 24 tokens |", "| tokens | 576 |", "| stories.txt.xz | 1.5 |", "| tales.txt | 0.5 |",
    ):  # fmt: skip
        assert row in card
    assert "constant, over the last 2 steps down to 0" in card
    assert "begun with" not in card
    # The weights are narrow in the file, and the losses are those of that file.
    assert all(
        torch.equal(p, p.bfloat16().float())
        for name, p in model.named_parameters()
        if name.endswith("projection.weight")
    )
    capsys.readouterr()
    assert evaluate([str(out), "--text", str(text), "--window", "24", "--kernel", "torch"]) == 0
    nats = float(capsys.readouterr().out.split("\n")[1].split()[4])
    told = re.search(r"^\| 24 \| [\d,]+ \| ([\d.]+) \|", card, re.MULTILINE)
    assert told is not None
    assert float(told[1]) == pytest.approx(nats, abs=2e-3)
    assert card.count("\nSeed ") == 4
    told_again = complete(model, tokenizer, "the fox", 24, torch.device("cpu"), seed=2, tokens=5)
    assert f"> **the fox**{_printable(told_again)}" in card


def test_what_a_person_has_to_say_is_left_open(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(corpus, training={"steps": 2})
    assert train([str(recipe)]) == 0
    out = corpus / "my-tales"
    assert main([str(recipe), str(out), "--text", str(corpus / "tales.txt"), "--weights", "float32"]) == 0
    assert "## To be filled in" in (out / "README.md").read_text(encoding="utf-8")
    assert main([str(recipe), str(out), "--text", str(corpus / "tales.txt")]) == 2
    assert "not empty" in capsys.readouterr().err
    (corpus / "empty.txt").write_text("")
    assert main([str(recipe), str(corpus / "other"), "--text", str(corpus / "empty.txt")]) == 2
    assert not (corpus / "other").exists()
    assert load_recipe(recipe).run.directory == corpus / "run"


def test_the_card_tells_what_the_run_began_with(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ship, "SAMPLE_TOKENS", 5)
    recipe = write_recipe(corpus, training={"steps": 2})
    assert train([str(recipe)]) == 0
    (corpus / "run" / "model").rename(corpus / "old-tales")
    keys = ["run.directory=further", "training.initial=old-tales", "data.vocab_size=null"]
    keys.append("data.tokenizer=old-tales/tokenizer.json")
    assert train([str(recipe), *keys]) == 0
    assert main([str(recipe), str(corpus / "new"), *keys, "--text", str(corpus / "tales.txt")]) == 0
    assert "\n| begun with | the weights of old-tales |\n" in (corpus / "new" / "README.md").read_text(encoding="utf-8")


def test_without_a_run_there_is_nothing_to_ship(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write_recipe(corpus)), str(corpus / "out"), "--text", str(corpus / "tales.txt")]) == 2
    assert capsys.readouterr().err.count("error:") == 1
    assert not (corpus / "out").exists()


def _printable(text: str) -> str:
    """As a card shows it: no character of a model's leaves the quotation."""
    return "".join(char if char.isprintable() or char == "\n" else "�" for char in text).rstrip().replace("\n", "\n> ")
