"""The loss on held-out text during training: every window's tokens predicted once, from those before them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.training.processes import Processes
from model.training.tokens import PackedTokens


class Validation:
    """Windows without overlap over the validation text, shared out among the processes."""

    def __init__(self, packed: PackedTokens, window: int, most: int | None, batch: int) -> None:
        """`most` windows at most, spread evenly. Raises ValueError where the text is shorter than one window."""
        ids = packed.validation
        count = (len(ids) - 1) // window
        if count < 1:
            raise ValueError(f"the validation text has {len(ids)} tokens, less than one window of {window}")
        picked = np.unique(np.linspace(0, count - 1, min(count, most or count)).astype(np.int64))
        starts = [n * window for n in picked.tolist()]
        self._rows = np.stack([np.asarray(ids[start : start + window + 1], dtype=np.int64) for start in starts])
        self._batch = batch
        self.num_tokens: int = len(self._rows) * window
        self.num_bytes = sum(len(packed.tokenizer.bytes_of(row[1:].tolist())) for row in self._rows)

    @torch.no_grad()
    def loss(self, network: nn.Module, device: torch.device, processes: Processes) -> float:
        """Mean nats per token; the same number in every process."""
        total = torch.zeros((), dtype=torch.float64)
        network.eval()
        for rows in self._batches(processes):
            rows = rows.to(device)
            logits = network(rows[:, :-1])
            total += (
                F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="sum").double().cpu()
            )
        network.train()
        processes.average(total)
        return total.item() * processes.size / self.num_tokens

    def bits_per_byte(self, nats_per_token: float) -> float:
        """The same loss in a unit that does not depend on the tokenizer."""
        return nats_per_token * self.num_tokens / math.log(2) / self.num_bytes

    def _batches(self, processes: Processes) -> Iterator[Tensor]:
        mine = torch.from_numpy(self._rows[processes.rank :: processes.size])
        return iter(torch.split(mine, self._batch))
