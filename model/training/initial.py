"""The weights that a run may begin with instead of drawn ones: those of a model directory."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from model.checkpoint import load_model
from model.config import NetworkConfig
from model.tokenizer import Tokenizer
from model.training.transformer import TransformerConfig


def load_initial(
    directory: Path, network: nn.Module, config: NetworkConfig | TransformerConfig, tokenizer: Tokenizer
) -> None:
    """Gives `network`, which is of `config`, the weights in `directory`, which is left as it is.

    Raises ValueError, naming directory and fields, where its configuration or its tokenizer is another one or its files
    are damaged, OSError where one of them is missing.
    """
    model, its_tokenizer = load_model(directory), Tokenizer.load(directory)
    wanted, given = config.to_dict(), model.config.to_dict()
    if differing := [name for name in sorted({*wanted, *given}) if wanted.get(name) != given.get(name)]:
        its, recipes = (", ".join(f"{name} = {c.get(name)!r}" for name in differing) for c in (given, wanted))
        raise ValueError(f"training.initial: {directory} has {its}; the recipe {recipes}")
    if its_tokenizer is None or its_tokenizer.serialized != tokenizer.serialized:
        raise ValueError(f"training.initial: {directory} has another tokenizer; let data.tokenizer be its own")
    network.load_state_dict(model.state_dict())
