"""The models that come with the project: complete, whole, and trained."""

from pathlib import Path

import pytest
import torch

from model.checkpoint import load_model
from model.evaluate import Score, Subject, evaluate, window_batches
from model.network import MosaicNetwork
from model.tokenizer import Tokenizer

PRETRAINED = Path(__file__).parents[2] / "model" / "pretrained"
DIRECTORIES = sorted(path for path in PRETRAINED.iterdir() if path.is_dir())
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play in the park with her friends. One day, "
    "she saw a big red ball under a tree. She was very happy and ran to get it."
)


Pretrained = tuple[Path, MosaicNetwork, Tokenizer]


@pytest.fixture(scope="module", params=DIRECTORIES, ids=lambda path: path.name)
def pretrained(request: pytest.FixtureRequest) -> Pretrained:
    tokenizer = Tokenizer.load(request.param)
    assert tokenizer is not None
    return request.param, load_model(request.param), tokenizer


def test_its_parts_fit_together(pretrained: Pretrained) -> None:
    directory, model, tokenizer = pretrained
    files = {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in directory.iterdir()} == files
    assert sum(path.stat().st_size for path in directory.iterdir()) < 30e6
    assert tokenizer.vocab_size == model.config.num_sampled_tokens == model.config.vocab_size
    assert tokenizer.eos_token_id == model.config.eos_token_id == 0
    assert tokenizer.decode(tokenizer.encode(STORY)) == STORY


def test_its_card_says_what_its_licences_ask(pretrained: Pretrained) -> None:
    directory, model, _ = pretrained
    card = (directory / "README.md").read_text(encoding="utf-8")
    assert card.startswith(f"# {directory.name}\n")
    assert directory.name.startswith("llama-")
    assert f"{model.num_parameters:,}" in card
    for required in ("Built with Llama", "Llama 3.1 Community License", "CDLA-Sharing-1.0", "CC BY", "MIT"):
        assert required in card
    for section in ("Use", "Data", "Training", "Validation", "Completions"):
        assert f"\n## {section}\n" in card


def test_it_has_learned_to_tell_stories(pretrained: Pretrained) -> None:
    _, model, tokenizer = pretrained

    def loss(token_ids: list[int]) -> float:
        score = Score()
        for inputs, targets in window_batches([0, *token_ids], 64, 1):
            evaluate(Subject(model), inputs, targets, None, score)
        return score.nats / score.num_tokens

    story = tokenizer.encode(STORY)
    shuffled = torch.tensor(story)[torch.randperm(len(story), generator=torch.Generator().manual_seed(1))].tolist()
    assert loss(story) < 3
    assert loss(shuffled) > 6
