"""The model that comes with the project: complete, whole, and trained."""

from pathlib import Path

import pytest
import torch

from model.checkpoint import load_model
from model.evaluate import Score, Subject, evaluate, window_batches
from model.mosaic_v1 import MemoryMosaic
from model.tokenizer import Tokenizer

DIRECTORY = Path(__file__).parents[2] / "model" / "pretrained" / "llama-tales-mosaic-6m"
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play in the park with her friends. One day, "
    "she saw a big red ball under a tree. She was very happy and ran to get it."
)


@pytest.fixture(scope="module")
def model() -> MemoryMosaic:
    return load_model(DIRECTORY)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.load(DIRECTORY)
    assert tokenizer is not None
    return tokenizer


def test_its_parts_fit_together(model: MemoryMosaic, tokenizer: Tokenizer) -> None:
    assert {path.name for path in DIRECTORY.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert sum(path.stat().st_size for path in DIRECTORY.iterdir()) < 30e6
    assert tokenizer.vocab_size == model.config.num_sampled_tokens == model.config.vocab_size
    assert tokenizer.eos_token_id == model.config.eos_token_id == 0
    assert tokenizer.decode(tokenizer.encode(STORY)) == STORY


def test_its_card_says_what_its_licences_ask(model: MemoryMosaic) -> None:
    card = (DIRECTORY / "README.md").read_text()
    assert card.startswith("# llama-")
    assert f"{model.num_parameters:,}" in card
    for required in ("Built with Llama", "Llama 3.1 Community License", "CDLA-Sharing-1.0", "CC BY", "MIT", "4.061"):
        assert required in card


def test_it_has_learned_to_tell_stories(model: MemoryMosaic, tokenizer: Tokenizer) -> None:
    def loss(token_ids: list[int]) -> float:
        score = Score()
        for inputs, targets in window_batches([0, *token_ids], 64, 1):
            evaluate(Subject(model), inputs, targets, None, score)
        return score.nats / score.num_tokens

    story = tokenizer.encode(STORY)
    shuffled = torch.tensor(story)[torch.randperm(len(story), generator=torch.Generator().manual_seed(1))].tolist()
    assert loss(story) < 3
    assert loss(shuffled) > 6
