"""What came before a token, as the second version's blocks ask for it: `ParallelPastV2` for whole sequences.

`model.cached_past_v2` is the other form, over a cache.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.arithmetic import read, windowed_read
from model.gated_average import gated_average
from model.past import shift


class Memory(IntEnum):
    """The two contextual memories of a block."""

    SHORT = 0
    LONG = 1


class PastV2(Protocol):
    """One layer's view of the tokens before each token.

    Tensors are [*tokens, heads, dim], where *tokens is whatever shape the implementation gives the tokens.
    Pair t-1 is completed by token t. The short-term memory shows token t the pairs of the window before it, the
    long-term memory those that are older than the delay.
    """

    def average(self, x: Tensor, log_gate: Tensor, log_decay: Tensor, memory: Memory) -> Tensor:
        """y_t = exp(log_gate_t) x_t + exp(log_decay_t) y_{t-1}, in a positive scale of each token's own.

        log_gate and log_decay are [*tokens, heads].
        """
        ...

    def previous_key(self, key: Tensor, memory: Memory) -> Tensor:
        """The unit key of the token before; anything where there is none."""
        ...

    def previous_contribution(self, contribution: Tensor, memory: Memory) -> Tensor:
        """What the token before contributes to its pair's value; anything where there is none."""
        ...

    def num_visible(self, memory: Memory) -> Tensor:
        """How many pairs each token sees, integers of a shape that broadcasts to *tokens."""
        ...

    def read(self, queries: Tensor, completed_keys: Tensor, completed_values: Tensor, memory: Memory) -> Tensor:
        """Stores the pair that each token completes, then reads what each token sees; 0 where it sees nothing."""
        ...


class ParallelPastV2:
    """Whole sequences from their first token: *tokens is [batch, time]. Differentiable, stores nothing."""

    def __init__(self, token_ids: Tensor, *, window: int, delay: int) -> None:
        """`token_ids` [batch, time]; pairs t-window+1 .. t-1 are short-term, those up to t-delay long-term."""
        self.window, self.delay = window, delay
        self.positions = torch.arange(token_ids.shape[1], device=token_ids.device)

    def average(self, x: Tensor, log_gate: Tensor, log_decay: Tensor, memory: Memory) -> Tensor:  # noqa: ARG002
        return gated_average(x, log_gate, log_decay)[0]

    def previous_key(self, key: Tensor, memory: Memory) -> Tensor:  # noqa: ARG002
        return shift(key)

    def previous_contribution(self, contribution: Tensor, memory: Memory) -> Tensor:  # noqa: ARG002
        return shift(contribution)

    def num_visible(self, memory: Memory) -> Tensor:
        return num_visible(self.positions, memory, window=self.window, delay=self.delay)

    def read(self, queries: Tensor, completed_keys: Tensor, completed_values: Tensor, memory: Memory) -> Tensor:
        time = queries.shape[1]
        seeing_nothing = min(time, 1 if memory is Memory.SHORT else self.delay)
        if seeing_nothing == time:
            return queries * 0
        # Token t completes pair t-1: without token 0 the row of a pair is its number.
        q = queries[:, seeing_nothing:].transpose(1, 2)
        k, v = (x[:, 1 : 1 + q.shape[2]].transpose(1, 2) for x in (completed_keys, completed_values))
        window = self.window - 1
        if memory is Memory.LONG or q.shape[2] <= window:
            y = read(q, k, v, causal=True)
        else:
            k, v = (F.pad(x, (0, 0, window - 1, 0)) for x in (k, v))
            y = windowed_read(q, k, v, window, torch.full((q.shape[0],), window - 1, device=q.device))
        return F.pad(y.transpose(1, 2), (0, 0, 0, 0, seeing_nothing, 0))


def num_visible(positions: Tensor, memory: Memory, *, window: int, delay: int) -> Tensor:
    """How many pairs of a memory the tokens at these positions see."""
    if memory is Memory.SHORT:
        return positions.clamp(max=window - 1)
    return (positions - (delay - 1)).clamp(min=0)
