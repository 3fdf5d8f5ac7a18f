"""Drawing: the loss along a text and a text read twice, of the whole network and without each of its memories."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import MosaicV2Config
from model.figures.canvas import label, new_figure, save_figure
from model.network import MosaicNetwork

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BATCH, _TICKS = 4, (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30)
_STYLES = {"whole": "C7-", "contextual": "C0-", "short-term": "C0-", "long-term": "C2-", "persistent": "C1-"}


def draw_position(model: MosaicNetwork, token_ids: Tensor, path: Path) -> Path:
    """`token_ids` is [windows, time + 1]."""
    figure = new_figure(10, 3.8)
    left, right = figure.subplots(1, 2)
    config = model.config
    for name in ("", *_parts(model)):
        with without(model, name):
            _draw_curve(left, losses(model, token_ids).mean(0), name)
    if token_ids.shape[1] - 1 > config.block_size:
        left.axvline(config.block_size, color="0.5", linestyle=":", label="trained window")
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_yticks(_TICKS, _TICKS)
    left.minorticks_off()
    low, high = left.dataLim.intervaly
    left.set_ylim(0.9 * low, 1.1 * high)
    label(left, "Loss by position in the text", "tokens before", "nats per token")
    once = token_ids[:, : config.block_size // 2]
    twice = losses(model, torch.cat([once, once], 1)).mean(0)
    first, second = twice[: once.shape[1] - 1], twice[once.shape[1] :]
    _draw_curve(right, first, "", label="first time")
    _draw_curve(right, second, "", style="C3-", label="second time")
    right.set_xscale("log")
    label(right, "A passage read twice in a row", "tokens of the passage before", "nats per token")
    return save_figure(figure, path)


@torch.no_grad()
def losses(model: MosaicNetwork, token_ids: Tensor) -> Tensor:
    """[windows, time + 1] -> nats [windows, time]; token t + 1 is predicted from tokens 0 .. t."""
    parts = []
    for ids in torch.split(token_ids, _BATCH):
        logits = model(ids[:, :-1])
        parts.append(F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none"))
    return torch.cat(parts)


@contextmanager
def without(model: MosaicNetwork, part: str) -> Iterator[None]:
    """Inside, the named memory says nothing, in every layer; with an empty name all is as it was."""
    modules = [block.get_submodule(_parts(model)[part]) for block in model.blocks] if part else []
    hooks = [module.register_forward_hook(_silence) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


_silence: Callable[[object, object, Tensor], Tensor] = lambda module, given, said: torch.zeros_like(said)  # noqa: E731, ARG005


def _parts(model: MosaicNetwork) -> Mapping[str, str]:
    """The memories of a block, and where in it they are."""
    if isinstance(model.config, MosaicV2Config):
        memories = {"short-term": "contextual.short", "long-term": "contextual.long"}
    else:
        memories = {"contextual": "contextual"}
    return memories | {"persistent": "persistent"}


def _draw_curve(axes: Axes, by_position: Tensor, part: str, *, style: str = "", label: str = "") -> None:
    """Means over stretches of positions that grow by half: 2, 2, 2, 3, 4, ... tokens."""
    edges = [0]
    while edges[-1] < len(by_position):
        edges.append(min(max(edges[-1] + 2, int(edges[-1] * 1.5)), len(by_position)))
    at = [(low + high + 1) / 2 for low, high in pairwise(edges)]
    means = [by_position[low:high].mean() for low, high in pairwise(edges)]
    axes.plot(
        at, means, style or _STYLES[part or "whole"], label=label or (f"without {part}" if part else "whole network")
    )
