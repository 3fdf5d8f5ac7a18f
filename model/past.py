"""What came before a token: the one thing in which training (all tokens at once) and serving (a cache) differ.

Layers are written once, against `Past`; `ParallelPast` is the form for whole sequences, `model.cached_past` the other.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from model.arithmetic import leaky_average, read


class Average(IntEnum):
    """The two leaky averages of a block."""

    CONTEXTUAL = 0
    PERSISTENT = 1


class Past(Protocol):
    """One layer's view of the tokens before each token.

    Tensors are [*tokens, heads, dim], where *tokens is whatever shape the implementation gives the tokens.
    Pair t-1 is completed by token t. A read at token t sees the pairs completed by tokens up to and including t.
    """

    def average(self, x: Tensor, log_decay: Tensor, which: Average) -> Tensor:
        """y_t = x_t + exp(log_decay) * y_{t-1}; log_decay is [heads]."""
        ...

    def previous_key(self, key: Tensor) -> Tensor:
        """The contextual unit key of the token before; anything where there is none."""
        ...

    def previous_contribution(self, contribution: Tensor) -> Tensor:
        """What the token before contributes to its pair's value; anything where there is none."""
        ...

    def read(self, queries: Tensor, completed_keys: Tensor, completed_values: Tensor) -> Tensor:
        """Stores the pair that each token completes, then reads what each token sees; 0 where it sees nothing."""
        ...


class ParallelPast:
    """Whole sequences from their first token: *tokens is [batch, time]. Differentiable, stores nothing."""

    def average(self, x: Tensor, log_decay: Tensor, which: Average) -> Tensor:  # noqa: ARG002
        return leaky_average(x, log_decay)

    def previous_key(self, key: Tensor) -> Tensor:
        return shift(key)

    def previous_contribution(self, contribution: Tensor) -> Tensor:
        return shift(contribution)

    def read(self, queries: Tensor, completed_keys: Tensor, completed_values: Tensor) -> Tensor:
        # Token 0 completes no pair: without it "completed by token t or before" is the usual causal mask.
        q, k, v = (x[:, 1:].transpose(1, 2) for x in (queries, completed_keys, completed_values))
        if q.shape[2] == 0:
            return queries * 0
        y = read(q, k, v, causal=True).transpose(1, 2)
        return F.pad(y, (0, 0, 0, 0, 1, 0))


def shift(x: Tensor) -> Tensor:
    """[batch, time, heads, dim]: the row of the token before each token, 0 before the first."""
    return F.pad(x[:, :-1], (0, 0, 0, 0, 1, 0))
