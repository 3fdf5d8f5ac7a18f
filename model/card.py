"""The model card (README.md) of a converted checkpoint: what the files say about the model, and what they cannot."""

from collections.abc import Mapping
from typing import Any

from model.config import MosaicConfig, MosaicV2Config, NetworkConfig

CARD_FILE = "README.md"

# What a training script may have recorded that tells how the model came about; nothing that names a machine.
_TRAINING_FACTS = (
    "dataset", "iter_num", "max_iters", "batch_size", "gradient_accumulation_steps", "learning_rate", "min_lr",
    "warmup_iters", "lr_decay_iters", "weight_decay", "beta1", "beta2", "grad_clip", "ic_dropout", "hd_dropout",
    "dropout", "dtype", "seed", "best_val_loss",
)  # fmt: skip


def model_card(name: str, source: str, config: MosaicConfig, num_parameters: int, training: Mapping[str, Any]) -> str:
    """The card's Markdown. `source` names the published training code, `training` is what it recorded."""
    sections = [
        f"# {_plain(name)}",
        "A Memory Mosaic, a language model made of associative memories "
        "([arXiv 2405.06394](https://arxiv.org/abs/2405.06394)), "
        f"converted from a checkpoint of the published training code, {source}.",
        table(architecture(config, num_parameters)),
        "## Text and tokens",
        tokens(config),
        "## Training, as the checkpoint records it",
        table(_training(training)) if _training(training) else "The checkpoint records nothing of it.",
        "## To be filled in",
        "The checkpoint does not say what text the model was trained on, under which licence it may be passed on, how "
        "well it does and what it is for. Whoever shares it should say so here.",
    ]
    return "\n\n".join(sections) + "\n"


def architecture(config: NetworkConfig, num_parameters: int, weights: str = "float32") -> dict[str, str]:
    """Sizes and choices of a network, by what they are called in a card."""
    rows = {
        "parameters": f"{num_parameters:,}",
        "layers": str(config.n_layer),
        "heads": f"{config.n_head} of {config.head_dim}",
        "width": str(config.n_embd),
    }
    if isinstance(config, MosaicConfig):
        persistent = f"{config.pmem_count} x {config.pmem_size} pairs per head" if config.has_persistent else "none"
        rows |= {
            "persistent memory": persistent,
            "values": config.value_extractor,
            "norms": "pre-LN" if config.pre_norm else "post-LN",
            "biases": "yes" if config.bias else "no",
            "embedding and head": "shared" if config.tied else "separate",
        }
    elif isinstance(config, MosaicV2Config):
        rows |= {
            "short-term memory": f"the {config.short_window - 1} pairs before a token",
            "long-term memory": f"pairs {config.long_delay} tokens back and more",
            "persistent memory": f"gated, {config.persistent_size} wide",
            "embedding and head": "separate",
        }
    return rows | {
        "vocabulary": str(config.vocab_size),
        "trained context": f"{config.block_size} tokens",
        "weights": f"{weights}, safetensors",
    }


def tokens(config: NetworkConfig) -> str:
    """What a card says of the tokenizer."""
    if config.tokenizer_vocab_size is None:
        return "No tokenizer was given with it: it takes and gives token ids only."
    size, vocabulary = config.tokenizer_vocab_size, config.vocab_size
    text = f"`tokenizer.json` is a byte-level BPE of {size} tokens."
    if size < vocabulary:
        text += f" Ids {size} to {vocabulary - 1} are padding of the vocabulary and never sampled."
    if config.eos_token_id is None:
        return text + " It has no `<|endoftext|>`, so no token ends a text."
    return text + f" `<|endoftext|>` (id {config.eos_token_id}) ends a text."


def table(rows: Mapping[str, str]) -> str:
    """Two columns without headings."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _training(training: Mapping[str, Any]) -> dict[str, str]:
    found = {name: training[name] for name in _TRAINING_FACTS if name in training}
    return {name: _plain(_number(value)) for name, value in found.items()}


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(text: str) -> str:
    """Text from a stranger's file as one line without markup."""
    return "".join(char for char in text if char.isalnum() or char in " ._+-/")[:80]
