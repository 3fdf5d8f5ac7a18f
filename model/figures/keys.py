"""Drawing: how long the keys of each head remember, and how sharply each memory tells keys apart."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from model.config import MosaicV2Config
from model.figures.canvas import MEMORY_COLOURS, head_ticks, label, new_figure, save_figure
from model.layers import Block, log_decay, scale
from model.mosaic_v2 import BlockV2
from model.network import MosaicNetwork
from model.past_v2 import Memory, num_visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LAST, _BETAS = 512, (5, 10, 20, 50, 100, 200, 500, 1000)


@torch.no_grad()
def draw_keys(model: MosaicNetwork, token_ids: Tensor, path: Path) -> Path:
    """`token_ids` [windows, time] is text, which the second version's decays depend on."""
    figure = new_figure(10, 3.8)
    left, right = figure.subplots(1, 2)
    if isinstance(model.config, MosaicV2Config):
        _draw_gated(left, model, token_ids)
        _draw_bandwidths(right, model)
    else:
        _draw_fixed(left, right, model)
    return save_figure(figure, path)


def _draw_fixed(left: Axes, right: Axes, model: MosaicNetwork) -> None:
    """First version: one decay and one sharpness per head, the same for every text."""
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    config = model.config
    memories = {"contextual": [(block.contextual, 2 * block.contextual.log_scale_max) for block in blocks]}
    persistent = [(block.persistent, block.persistent.log_scale_max) for block in blocks if block.persistent]
    if persistent:
        memories["persistent"] = persistent  # type: ignore[assignment]
    for name, parts in memories.items():
        half_lives = torch.cat([_half_life(log_decay(part.key.leak, torch.float32)) for part, _ in parts])
        betas = torch.cat([scale(part.key.log_scale, 2, most, torch.float32)[:, 0] for part, most in parts])
        left.semilogy(half_lives.tolist(), "o", color=MEMORY_COLOURS[name], markersize=4, label=f"{name} memory")
        right.semilogy(betas.tolist(), "o", color=MEMORY_COLOURS[name], markersize=4, label=f"{name} memory")
    for axes in (left, right):
        head_ticks(axes, config.n_layer, config.n_head)
    label(left, "Half-life of the leaky average behind a key", "layer, and in it a point per head", "tokens")
    label(right, "Sharpness beta: logit of two equal keys", "layer, and in it a point per head", "beta")


def _draw_gated(axes: Axes, model: MosaicNetwork, token_ids: Tensor) -> None:
    """Second version: the decay is the token's own; its median and the middle 80% over the text."""
    found: dict[Memory, list[Tensor]] = {memory: [] for memory in Memory}
    hooks = []
    for block in model.blocks:
        assert isinstance(block, BlockV2)
        for memory, part in zip(Memory, (block.contextual.short, block.contextual.long), strict=True):
            keep = found[memory]
            hooks.append(part.key.decay.register_forward_hook(lambda _, __, out, keep=keep: keep.append(out)))
    model(token_ids)
    for hook in hooks:
        hook.remove()
    shares = torch.tensor([0.1, 0.5, 0.9])
    for shift, (memory, name) in enumerate(zip(Memory, ("short-term", "long-term"), strict=True)):
        per_head = torch.cat([_half_life(-x.abs()).flatten(0, 1) for x in found[memory]], dim=1)
        low, middle, high = torch.quantile(per_head.float(), shares, dim=0).numpy()
        at = [n + 0.4 * shift - 0.2 for n in range(len(middle))]
        axes.errorbar(
            at, middle, (middle - low, high - middle), fmt="o", markersize=3, elinewidth=0.8,
            color=MEMORY_COLOURS[name], label=f"{name} memory",
        )  # fmt: skip
    axes.set_yscale("log")
    head_ticks(axes, model.config.n_layer, model.config.n_head)
    title = "Half-life of a key's sum: median and middle 80% of tokens"
    label(axes, title, "layer, and in it a point per head", "tokens")


def _draw_bandwidths(axes: Axes, model: MosaicNetwork) -> None:
    """Second version: beta grows with the pairs that are seen."""
    config = model.config
    assert isinstance(config, MosaicV2Config)
    positions = torch.arange(1, max(_LAST, config.block_size) + 1)
    for memory, name in zip(Memory, ("short-term", "long-term"), strict=True):
        counts = num_visible(positions, memory, window=config.short_window, delay=config.long_delay)
        counts = torch.unique(counts[counts > 0])
        if not len(counts):
            continue
        for i, block in enumerate(model.blocks):
            assert isinstance(block, BlockV2)
            part: nn.Module = block.contextual.short if memory is Memory.SHORT else block.contextual.long
            for head, beta in enumerate(part.get_submodule("bandwidth")(counts, torch.float32)[..., 0].T):
                named = {"label": f"{name} memory, a line per head"} if i == head == 0 else {}
                axes.loglog(counts, beta, color=MEMORY_COLOURS[name], linewidth=0.7, alpha=0.7, **named)
    low, high = axes.dataLim.intervaly
    axes.set_yticks(_BETAS, [str(beta) for beta in _BETAS])
    axes.minorticks_off()
    axes.set_ylim(0.9 * low, 1.1 * high)
    label(axes, "Sharpness beta over the number of pairs seen", "pairs", "beta")


def _half_life(log_decays: Tensor) -> Tensor:
    """Tokens after which a factor exp(log decay) a token has come to a half."""
    return math.log(2) / (-log_decays).clamp(min=1e-6)
