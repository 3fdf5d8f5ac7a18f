"""Drawing: what persistent memories hold, as a table: where an entry was read most, and which tokens it speaks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import MosaicConfig
from model.figures.canvas import new_figure, save_figure, words
from model.layers import PersistentMemory, scale
from model.mosaic_v2 import GatedPersistentMemory
from model.network import MosaicNetwork
from model.tokenizer import Tokenizer

_PER_LAYER, _MAX_ROWS, _TOKENS = 2, 12, 6
_BEFORE, _MAX_CONTEXTS = 3, 66  # tokens, and characters that fit into the column


@dataclass(frozen=True, slots=True)
class Entry:
    """A pair of a head, or a unit between the matrices of a gated memory, as it behaved on a text."""

    name: str
    use: Tensor
    """[tokens]: how much of it was in what each token read, as far as it spoke for `value` and not against it."""
    value: Tensor
    """[n_embd]: the direction of what it adds to the stream."""

    @property
    def strength(self) -> float:
        return float(self.use.abs().mean() * self.value.norm())


@torch.no_grad()
def draw_persistent(model: MosaicNetwork, tokenizer: Tokenizer, token_ids: Tensor, path: Path) -> Path:
    """`token_ids` is [windows, time]. Raises ValueError for a network without persistent memories."""
    if isinstance(model.config, MosaicConfig) and not model.config.has_persistent:
        raise ValueError("the network has no persistent memories")
    entries = most_used(model, token_ids)
    ids = token_ids.flatten().tolist()
    rows = [[e.name, _contexts(tokenizer, ids, e.use), _promoted(model, tokenizer, e.value)] for e in entries]
    figure = new_figure(10, 0.4 + 0.27 * len(rows))
    axes = figure.subplots()
    axes.axis("off")
    table = axes.table(
        rows, colLabels=["entry", "read most by the last of these tokens", "speaks for"],
        colWidths=[0.2, 0.45, 0.35], cellLoc="left", colLoc="left", loc="center", edges="horizontal",
    )  # fmt: skip
    table.auto_set_font_size(value=False)
    table.set_fontsize(8)
    table.scale(1, 1.3)
    return save_figure(figure, path)


@torch.no_grad()
def most_used(model: MosaicNetwork, token_ids: Tensor) -> list[Entry]:
    """Of each layer (of some, spread, where they are many) the entries that spoke most, one of a head at most."""
    layers = range(0, len(model.blocks), -(-len(model.blocks) * _PER_LAYER // _MAX_ROWS))
    persistent = {layer: model.blocks[layer].get_submodule("persistent") for layer in layers}
    asked = _asked(model, token_ids, list(persistent.values()))
    entries = []
    for (layer, memory), given in zip(persistent.items(), asked, strict=True):
        found = _pairs(memory, given) if isinstance(memory, PersistentMemory) else _units(memory, given)
        found.sort(key=lambda entry: -entry.strength)
        entries += [Entry(f"layer {layer}, {entry.name}", entry.use, entry.value) for entry in found[:_PER_LAYER]]
    return entries


def _asked(model: MosaicNetwork, token_ids: Tensor, memories: list[nn.Module]) -> list[Tensor]:
    """What each memory is asked on a text: unit keys, or inputs where it has no keys."""
    seen: dict[nn.Module, Tensor] = {}
    hooks = [
        memory.key.register_forward_hook(lambda _, __, key, memory=memory: seen.update({memory: key}))
        if isinstance(memory, PersistentMemory)
        else memory.register_forward_pre_hook(lambda memory, given: seen.update({memory: given[0]}))
        for memory in memories
    ]
    model(token_ids)
    for hook in hooks:
        hook.remove()
    return [seen[memory] for memory in memories]


def _pairs(memory: PersistentMemory, keys: Tensor) -> list[Entry]:
    """The most read pair of each head; unit keys are [windows, time, heads, dim]."""
    banks, heads, _, dim = memory.keys.shape
    query = (keys * scale(memory.key.log_scale, 2, memory.log_scale_max, keys.dtype)).flatten(0, 1)
    entries = []
    for head in range(heads):
        logits = torch.einsum("td,cpd->tcp", query[:, head], memory.keys[:, head])
        weights = (logits.softmax(-1) / banks).flatten(1)
        number = int(weights.mean(0).argmax())
        value = memory.output.weight[:, head * dim : (head + 1) * dim] @ memory.values[:, head].flatten(0, 1)[number]
        value = value * scale(memory.log_scale, 1, torch.inf, value.dtype)[head]
        entries.append(Entry(f"head {head}, pair {number}", weights[:, number], value))
    return entries


def _units(memory: nn.Module, x: Tensor) -> list[Entry]:
    """The units that spoke most; x is the memory's input, [windows, time, n_embd]."""
    assert isinstance(memory, GatedPersistentMemory)
    active = (F.silu(memory.gate(x)) * memory.up(x)).flatten(0, 1)
    strength = active.abs().mean(0) * memory.down.weight.norm(dim=0)
    entries = []
    for number in strength.topk(min(_PER_LAYER, len(strength))).indices.tolist():
        use = active[:, number]
        sign = use[use.abs().argmax()].sign()
        entries.append(Entry(f"unit {number}", use * sign, memory.down.weight[:, number] * sign))
    return entries


def _contexts(tokenizer: Tokenizer, token_ids: list[int], use: Tensor) -> str:
    """The ends of texts at which an entry was used most, each once."""
    told = ""
    for end in use.topk(min(30, len(use))).indices.tolist():
        context = words(tokenizer, token_ids[max(0, end - _BEFORE) : end + 1]).strip()
        if context and context not in told and len(told) + len(context) < _MAX_CONTEXTS:
            told += ("   |   " if told else "") + context
    return told


def _promoted(model: MosaicNetwork, tokenizer: Tokenizer, value: Tensor) -> str:
    """The tokens whose logits a direction of the stream raises most, all else left out."""
    head = model.embedding.weight if model.head is None else model.head.get_parameter("weight")
    ranked = (head @ (model.norm.weight * value)).topk(min(30, len(head))).indices.tolist()
    spoken = dict.fromkeys(words(tokenizer, [token_id]).strip() for token_id in ranked)
    return ", ".join([text for text in spoken if text.isprintable() and text.strip("·")][:_TOKENS])
