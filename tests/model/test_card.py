"""The model card: what the files say, and nothing that a stranger's file could inject."""

import pytest

from model.card import model_card
from model.config import MosaicConfig

CONFIG = MosaicConfig(
    vocab_size=50304, n_layer=12, n_head=12, n_embd=768, block_size=512, pmem_size=2688, pmem_count=2,
    key_log_scale_max=5, persistent_key_log_scale_max=10, norm_eps=0, logit_scale=768**-0.5, pre_norm=True,
    value_extractor="lowrlinearconv", bias=False, tied=True, has_persistent=True, eos_token_id=50256,
    tokenizer_vocab_size=50257,
)  # fmt: skip


def changed(**fields: object) -> MosaicConfig:
    return MosaicConfig.from_dict({**CONFIG.to_dict(), **fields})


def test_says_what_the_model_is() -> None:
    card = model_card("stories", "Library", CONFIG, 123456789, {"dataset": "BabiStories", "learning_rate": 5e-3})
    assert card.startswith("# stories\n")
    for fact in (
        "Library",
        "| parameters | 123,456,789 |",
        "| persistent memory | 2 x 2688 pairs per head |",
        "| trained context | 512 tokens |",
        "Ids 50257 to 50303 are padding of the vocabulary and never sampled.",
        "`<|endoftext|>` (id 50256) ends a text.",
        "| dataset | BabiStories |",
        "| learning_rate | 0.005 |",
    ):
        assert fact in card


@pytest.mark.parametrize(
    ("fields", "fact"),
    [
        ({"tokenizer_vocab_size": None, "eos_token_id": None}, "token ids only"),
        ({"eos_token_id": None}, "no token ends a text"),
        ({"has_persistent": False, "pmem_size": 0, "pmem_count": 0}, "| persistent memory | none |"),
        ({"pre_norm": False}, "| norms | post-LN |"),
        ({"tied": False}, "| embedding and head | separate |"),
        ({"bias": True}, "| biases | yes |"),
    ],
)
def test_says_what_is_different(fields: dict[str, object], fact: str) -> None:
    assert fact in model_card("m", "Library", changed(**fields), 1, {})


def test_without_training_facts_it_says_so() -> None:
    assert "records nothing" in model_card("m", "Library", CONFIG, 1, {})


def test_only_facts_about_training_are_told() -> None:
    card = model_card("m", "Library", CONFIG, 1, {"out_dir": "/home/someone", "wandb_project": "secret", "seed": 3})
    assert "someone" not in card
    assert "secret" not in card
    assert "| seed | 3 |" in card


def test_text_from_a_checkpoint_cannot_become_markup() -> None:
    card = model_card(
        "a\n# b`<x>", "Library", CONFIG, 1, {"dataset": "x | y\n<script>[l](http://z)</script>" + "n" * 999}
    )
    assert "<script>" not in card
    assert "](http://z" not in card
    assert card.splitlines()[0] == "# a bx"
    assert max(map(len, card.splitlines())) < 400
