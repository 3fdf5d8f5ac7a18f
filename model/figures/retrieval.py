"""Drawing: what contextual memories retrieved for the last token of a sentence, and one head for every token."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.figures.canvas import new_figure, save_figure, words
from model.figures.retrieved import retrieved
from model.network import MosaicNetwork
from model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SENTENCE = (
    "Tom had a red ball and Sara had a blue kite. They played in the park until it was time to go home. "
    "Their friends made bread, and they ate it all and told her about the day. That night, Tom could not find his red"
)


@torch.no_grad()
def draw_retrieval(model: MosaicNetwork, tokenizer: Tokenizer, sentence: str, path: Path) -> Path:
    """Raises ValueError for a sentence of fewer than three tokens."""
    token_ids = tokenizer.encode(sentence)
    if len(token_ids) < 3:
        raise ValueError("sentence: expected three tokens or more")
    ids = torch.tensor(token_ids)
    weights = retrieved(model, ids)
    likeliest = model(ids[None])[0, -1].softmax(-1).topk(3)
    spoken = [words(tokenizer, [token_id]) for token_id in token_ids]
    pairs = [f"{key} → {value}" for key, value in pairwise(spoken)]
    figure = new_figure(10, 1.5 + 2.6 * len(weights) + 0.11 * len(token_ids))
    tops = figure.subplots(len(weights) + 1, 1, height_ratios=[1.0] * len(weights) + [2.2])
    for axes, (name, read) in zip(tops, weights.items(), strict=False):
        _draw_heads(axes, name, read[:, :, -1], pairs)
    guesses = ", ".join(
        f"“{words(tokenizer, [i])}” {p:.0%}" for p, i in zip(*(t.tolist() for t in likeliest), strict=True)
    )
    figure.suptitle(
        f"What each head retrieved for the last token, “{spoken[-1]}”, after which the network expects {guesses}",
        fontsize=10,
    )
    name, layer, head = _telling_head(weights, ids, int(likeliest.indices[0]))
    _draw_tokens(
        tops[-1], f"{name} memory, layer {layer}, head {head}: every token", weights[name][layer, head], spoken
    )
    return save_figure(figure, path)


def _telling_head(weights: Mapping[str, Tensor], token_ids: Tensor, predicted: int) -> tuple[str, int, int]:
    """Memory, layer and head that, for the last token, gave most weight to pairs whose value is the predicted token."""
    holds = token_ids[1:] == predicted
    told = {name: (read[:, :, -1] * holds).sum(-1) for name, read in weights.items()}
    name = max(told, key=lambda memory: float(told[memory].max()))
    layer, head = divmod(int(told[name].argmax()), told[name].shape[1])
    return name, layer, head


def _draw_heads(axes: Axes, name: str, read: Tensor, pairs: list[str]) -> None:
    """`read` is [layers, heads, pairs]."""
    layers, heads = read.shape[:2]
    image = axes.imshow(read.flatten(0, 1).numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="none")
    axes.set_yticks([(layer + 0.5) * heads - 0.5 for layer in range(layers)], [f"layer {n}" for n in range(layers)])
    for layer in range(1, layers):
        axes.axhline(layer * heads - 0.5, color="0.8", linewidth=0.6)
    axes.set_xticks(range(len(pairs)), pairs, rotation=90)
    axes.tick_params(labelsize=7, length=2)
    axes.set_title(f"{name} memory: the stored pairs, and the weight of each", fontsize=9)
    axes.figure.colorbar(image, ax=axes, pad=0.01, aspect=15).ax.tick_params(labelsize=7)


def _draw_tokens(axes: Axes, title: str, read: Tensor, spoken: list[str]) -> None:
    """`read` is [time, pairs]."""
    axes.imshow(read.T.numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="none")
    axes.set_xticks(range(len(spoken)), spoken, rotation=90)
    axes.set_yticks(range(len(spoken) - 1), [f"{k} → {v}" for k, v in pairwise(spoken)])
    axes.tick_params(labelsize=6, length=2)
    axes.set_xlabel("token that reads", fontsize=9)
    axes.set_title(title, fontsize=9)
