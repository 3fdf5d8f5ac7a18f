"""The interface of the serving-time arithmetic, and its plain form in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from model.cache import MemoryBatch
from model.network import MosaicNetwork
from model.quantise import quantise_network

QUANTISED = "-int8"
"""Ends the name of a path whose weights are quantised."""


def split_path(path: str | None) -> tuple[str | None, bool]:
    """A path's name without its ending, and whether it quantises weights."""
    if path is None or not path.endswith(QUANTISED):
        return path, False
    return path.removesuffix(QUANTISED), True


class Kernel(Protocol):
    """Runs the steps of one network over a memory cache."""

    path: str
    """What does the arithmetic. Equal inputs give equal bytes only on equal paths of the same revision."""
    revision: int
    keys_by_dimension: bool
    """How the `MemoryCache` it works on must be laid out."""

    def step(
        self,
        token_ids: Tensor,
        batch: MemoryBatch,
        *,
        rows: Tensor | None = None,
        on_start: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Absorbs `token_ids` [tokens] as `MosaicNetwork.forward` with a cache does.

        Returns the logits after each sequence's last token, [sequences, vocab_size], or those after the tokens `rows`
        [wanted] int64, [wanted, vocab_size]. Calls `on_start` when all is prepared and the network is about to run.
        """
        ...


class TorchKernel:
    """The network's own cached forward. Runs wherever torch does; the reference for every other kernel.

    With `is_quantised` the model's weights are replaced by int8, in place.
    """

    keys_by_dimension = False
    revision = 0

    def __init__(self, model: MosaicNetwork, *, is_quantised: bool = False) -> None:
        self.path = f"torch-{model.embedding.weight.device.type}" + QUANTISED * is_quantised
        self._model = quantise_network(model) if is_quantised else model

    def step(
        self,
        token_ids: Tensor,
        batch: MemoryBatch,
        *,
        rows: Tensor | None = None,
        on_start: Callable[[], None] = lambda: None,
    ) -> Tensor:
        on_start()
        logits: Tensor = self._model(token_ids, batch, all_logits=rows is not None)
        return logits if rows is None else logits[rows]
