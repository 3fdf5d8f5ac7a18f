"""The network that a recipe asks for: a Memory Mosaic of any version, or a transformer to compare with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import torch
from safetensors.torch import save_file
from torch import nn

from model.checkpoint import save_model
from model.config import Architecture, NetworkConfig
from model.factory import build_network
from model.fingerprint import CONFIG_FILE, WEIGHTS_FILE
from model.tokenizer import Tokenizer
from model.training.recipe import Recipe
from model.training.transformer import Transformer, TransformerConfig

# Numbers that the published `Library` code trains with unless told otherwise; a recipe may give its own.
_PUBLISHED = {
    "pmem_count": 1,
    "key_log_scale_max": 5.0,
    "persistent_key_log_scale_max": 10.0,
    "norm_eps": 0.0,
    "pre_norm": True,
    "value_extractor": "lowrlinearconv",
    "bias": False,
    "tied": True,
    "has_persistent": True,
}


def network_config(recipe: Recipe, tokenizer: Tokenizer) -> NetworkConfig | TransformerConfig:
    """The configuration of the recipe's section `model`, completed by what the data determines.

    Raises ValueError, naming the field, where it is none.
    """
    given = dict(recipe.model)
    known = {"block_size": recipe.data.window, "eos_token_id": tokenizer.eos_token_id}
    values = {"vocab_size": tokenizer.vocab_size, **known, **given}
    architecture, known_names = given.get("architecture"), (*get_args(Architecture), "transformer")
    if architecture not in known_names:
        raise ValueError(f"model.architecture: expected one of {', '.join(known_names)}, got {architecture!r}")
    try:
        if architecture == "transformer":
            return TransformerConfig.from_dict(values)
        if architecture == "memory-mosaic-v1":
            values = {**_PUBLISHED, "logit_scale": _inverse_root(given.get("n_embd")), **values}
        return NetworkConfig.from_dict({"tokenizer_vocab_size": tokenizer.vocab_size, **values})
    except ValueError as error:
        raise ValueError(f"model: {error}") from None


def make_network(config: NetworkConfig | TransformerConfig) -> nn.Module:
    """A network with freshly drawn weights, whose forward takes token ids [batch, time] to logits."""
    return Transformer(config) if isinstance(config, TransformerConfig) else build_network(config)


def save_network(network: nn.Module, config: NetworkConfig | TransformerConfig, directory: Path, dtype: str) -> None:
    """Writes configuration and weights, these as `dtype`; of a Memory Mosaic, a directory that can be served."""
    if isinstance(config, TransformerConfig):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG_FILE).write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
        save_file(network.state_dict(), directory / WEIGHTS_FILE)
        return
    narrow = build_network(config)
    narrow.load_state_dict(network.state_dict())
    save_model(narrow.cast_weights(getattr(torch, dtype)), config, directory)


def _inverse_root(n_embd: object) -> float:
    return n_embd**-0.5 if isinstance(n_embd, int) and n_embd > 0 else 1.0
