"""The past of a served sequence: averages advanced token by token from a state slot, pairs in a cache's blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from model.arithmetic import unit
from model.cache import NUM_STATE_VECTORS, MemoryBatch
from model.config import MosaicConfig
from model.paged_pairs import read_pairs, store_pairs
from model.past import Average
from model.step_plan import View, plan_step

_PENDING = 2  # the state vector after the two averages


class CachedStep:
    """One call on a batch, through all layers. State is written back by `commit` alone."""

    def __init__(self, batch: MemoryBatch, config: MosaicConfig, dtype: torch.dtype) -> None:
        if batch.cache.keys_by_dimension:
            raise ValueError("this cache stores keys by dimension; the plain forward reads them by pair")
        self.cache = batch.cache
        self.plan = plan_step(batch, config.n_head, dtype, [View(batch.block_tables)])
        state = self.cache.state[:, batch.slots[self.plan.sequences]].to(dtype)
        if 0 in batch.num_computed:
            # Ranks of sequences that start anew are the packed rows of their first tokens.
            state[:, self.plan.starts] = 0
        # [3, n_layer, sequences, heads, dim]
        self.state = state.view(*state.shape[:3], config.n_head, config.head_dim).movedim(2, 0)
        self.pending_keys = unit(self.state[Average.CONTEXTUAL], config.norm_eps)
        self.new_state: list[list[Tensor]] = [[] for _ in range(NUM_STATE_VECTORS)]

    def past(self, layer: int) -> CachedPast:
        """The past as the blocks see it, to be asked layer after layer."""
        return CachedPast(self, layer)

    def commit(self) -> None:
        """Writes the state after the last token of every sequence, and the snapshots, into the cache."""
        kept = [torch.stack(new) if new else None for new in self.new_state]
        # The average of a persistent memory that is not there stays zero.
        zeros = torch.zeros_like(next(vector for vector in kept if vector is not None))
        vectors = torch.stack([zeros if vector is None else vector for vector in kept], dim=2)
        self.cache.state[:, self.plan.kept_slots] = vectors.flatten(-2).to(self.cache.state.dtype)


class CachedPast:
    """One layer of a step; *tokens is [tokens], in the packed order of the plan."""

    def __init__(self, step: CachedStep, layer: int) -> None:
        self.step, self.plan, self.layer = step, step.plan, layer
        self.keys, self.values = step.cache.keys[layer], step.cache.values[layer]

    def average(self, x: Tensor, log_decay: Tensor, which: Average) -> Tensor:
        """Token by token, so that how a text is cut into calls cannot change a bit of it."""
        decay = torch.exp(log_decay)[:, None]
        state = self.step.state[which, self.layer]
        averages = []
        for x_t in torch.split(x, self.plan.step_sizes):
            state = state[: x_t.shape[0]] * decay + x_t
            averages.append(state)
        y = averages[0] if len(averages) == 1 else torch.cat(averages)
        self._keep(which, y)
        return y

    def previous_key(self, key: Tensor) -> Tensor:
        return self._previous(self.step.pending_keys[self.layer], key)

    def previous_contribution(self, contribution: Tensor) -> Tensor:
        self._keep(_PENDING, contribution)
        return self._previous(self.step.state[_PENDING, self.layer], contribution)

    def read(self, queries: Tensor, completed_keys: Tensor, completed_values: Tensor) -> Tensor:
        plan = self.plan.reads[0]
        store_pairs(self.keys, completed_keys, plan)
        store_pairs(self.values, completed_values, plan)
        return read_pairs(self.keys, self.values, queries, plan)

    def _keep(self, vector: int, x: Tensor) -> None:
        is_all = x.shape[0] == self.plan.step_sizes[0] == self.plan.kept_rows.shape[0]
        self.step.new_state[vector].append(x if is_all else x[self.plan.kept_rows])

    def _previous(self, before: Tensor, x: Tensor) -> Tensor:
        """The row of the token before each token; `before` [sequences, heads, dim] precedes the first ones."""
        return before if len(self.plan.step_sizes) == 1 else torch.cat([before, x[self.plan.previous]])
