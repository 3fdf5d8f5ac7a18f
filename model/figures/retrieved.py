"""What contextual memories read for a text: the weights over the pairs stored so far."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from model.config import MosaicV2Config
from model.network import MosaicNetwork
from model.past import ParallelPast
from model.past_v2 import Memory, ParallelPastV2


@torch.no_grad()
def retrieved(model: MosaicNetwork, token_ids: Tensor) -> Mapping[str, Tensor]:
    """[time] -> by the memory's name [layers, heads, time, pairs]: the weight of each pair in what each token reads.

    Pair i holds what followed token i, so there are time - 1 of them. The weights of a token add up to 1, or to 0 where
    its memory is empty.
    """
    pasts = [_recorder(model, token_ids) for _ in model.blocks]
    hooks = [
        block.get_submodule("contextual").register_forward_pre_hook(partial(_exchange, past))
        for block, past in zip(model.blocks, pasts, strict=True)
    ]
    try:
        model(token_ids[None])
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.stack([past.weights[name] for past in pasts]) for name in pasts[0].weights}


def _exchange(past: object, module: nn.Module, given: tuple[Tensor, object]) -> tuple[Tensor, object]:  # noqa: ARG001
    return given[0], past


def _recorder(model: MosaicNetwork, token_ids: Tensor) -> _Past | _PastV2:
    config = model.config
    if isinstance(config, MosaicV2Config):
        return _PastV2(token_ids[None], window=config.short_window, delay=config.long_delay)
    return _Past()


class _Past(ParallelPast):
    """Keeps the weights of what is read."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def read(self, queries: Tensor, completed_keys: Tensor, completed_values: Tensor) -> Tensor:
        self.weights["contextual"] = _weights(queries[0], completed_keys[0], most=None, least=1)
        return super().read(queries, completed_keys, completed_values)


class _PastV2(ParallelPastV2):
    """Likewise, of both memories."""

    def __init__(self, token_ids: Tensor, *, window: int, delay: int) -> None:
        super().__init__(token_ids, window=window, delay=delay)
        self.weights: dict[str, Tensor] = {}

    def read(self, queries: Tensor, completed_keys: Tensor, completed_values: Tensor, memory: Memory) -> Tensor:
        if memory is Memory.SHORT:
            self.weights["short-term"] = _weights(queries[0], completed_keys[0], most=self.window - 1, least=1)
        else:
            self.weights["long-term"] = _weights(queries[0], completed_keys[0], most=None, least=self.delay)
        return super().read(queries, completed_keys, completed_values, memory)


def _weights(queries: Tensor, completed_keys: Tensor, *, most: int | None, least: int) -> Tensor:
    """[time, heads, dim] each -> [heads, time, pairs]. Token t sees pairs t - most .. t - least."""
    time = len(queries)
    logits = torch.einsum("thd,ihd->hti", queries, completed_keys[1:])
    distance = torch.arange(time)[:, None] - torch.arange(time - 1)
    sees = (distance >= least) & (distance <= (time if most is None else most))
    return logits.masked_fill(~sees, -torch.inf).softmax(-1).nan_to_num(0.0)
