"""The past of a served sequence: averages advanced token by token from a state slot, pairs in a cache's blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from model.arithmetic import read, unit
from model.cache import NUM_STATE_VECTORS, MemoryBatch
from model.config import MosaicConfig
from model.past import Average
from model.step_plan import ReadGroup, plan_step

_PENDING = 2  # the state vector after the two averages


class CachedStep:
    """One call on a batch, through all layers. State is written back by `commit` alone."""

    def __init__(self, batch: MemoryBatch, config: MosaicConfig, dtype: torch.dtype) -> None:
        if batch.cache.keys_by_dimension:
            raise ValueError("this cache stores keys by dimension; the plain forward reads them by pair")
        self.cache = batch.cache
        self.plan = plan_step(batch, config.n_head, dtype)
        self.slots = batch.slots[self.plan.sequences]
        state = self.cache.state[:, self.slots].to(dtype)
        if 0 in batch.num_computed:
            # Ranks of sequences that start anew are the packed rows of their first tokens.
            state[:, self.plan.starts] = 0
        # [3, n_layer, sequences, heads, dim]
        self.state = state.view(*state.shape[:3], config.n_head, config.head_dim).movedim(2, 0)
        self.pending_keys = unit(self.state[Average.CONTEXTUAL], config.norm_eps)
        self.new_state: list[list[Tensor]] = [[] for _ in range(NUM_STATE_VECTORS)]
        # The packed rows after which the state is kept, and in which slots: the last of each sequence, and snapshots.
        self.kept_rows, self.kept_slots = self.plan.last, self.slots
        if batch.snapshots is not None:
            asked = batch.snapshots[self.plan.order]
            rows = (asked >= 0).nonzero().flatten()
            self.kept_rows = torch.cat([self.kept_rows, rows])
            self.kept_slots = torch.cat([self.kept_slots, asked[rows]])

    def past(self, layer: int) -> CachedPast:
        """The past as the blocks see it, to be asked layer after layer."""
        return CachedPast(self, layer)

    def commit(self) -> None:
        """Writes the state after the last token of every sequence, and the snapshots, into the cache."""
        kept = [torch.stack(new) if new else None for new in self.new_state]
        # The average of a persistent memory that is not there stays zero.
        zeros = torch.zeros_like(next(vector for vector in kept if vector is not None))
        vectors = torch.stack([zeros if vector is None else vector for vector in kept], dim=2)
        self.cache.state[:, self.kept_slots] = vectors.flatten(-2).to(self.cache.state.dtype)


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
        self._store(self.keys, completed_keys)
        self._store(self.values, completed_values)
        parts = [self._read_group(group, queries) for group in self.plan.groups]
        y = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.plan.unpad is not None:
            y = y[self.plan.unpad]
        return y if self.plan.starts is None else y.index_fill_(0, self.plan.starts, 0)

    def _keep(self, vector: int, x: Tensor) -> None:
        is_all = x.shape[0] == self.plan.step_sizes[0] == self.step.kept_rows.shape[0]
        self.step.new_state[vector].append(x if is_all else x[self.step.kept_rows])

    def _previous(self, before: Tensor, x: Tensor) -> Tensor:
        """The row of the token before each token; `before` [sequences, heads, dim] precedes the first ones."""
        return before if len(self.plan.step_sizes) == 1 else torch.cat([before, x[self.plan.previous]])

    def _store(self, pool: Tensor, pairs: Tensor) -> None:
        """pool [num_blocks, heads, block_size, dim], pairs [tokens, heads, dim]."""
        if self.plan.completing is not None:
            pairs = pairs[self.plan.completing]
        # A pair that is not finite would spoil, through 0 * inf, whoever is given the block later.
        rows = pairs.reshape(-1, pool.shape[-1]).nan_to_num(0.0, 0.0, 0.0).to(pool.dtype)
        pool.view(-1, pool.shape[-1]).index_copy_(0, self.plan.pairs, rows)

    def _read_group(self, group: ReadGroup, queries: Tensor) -> Tensor:
        """[sequences * asked, heads, dim]."""
        asked = queries.unsqueeze(2) if group.queries is None else queries[group.queries].transpose(1, 2)
        if group.blocks.numel() == 0:
            y = torch.zeros_like(asked)
        else:
            keys, values = (self._gather(pool, group.blocks, asked) for pool in (self.keys, self.values))
            y = read(asked, keys, values, group.mask)
        return y.transpose(1, 2).flatten(0, 1)

    def _gather(self, pool: Tensor, blocks: Tensor, asked: Tensor) -> Tensor:
        """[sequences, heads, pairs, dim]."""
        sequences, heads, _, dim = asked.shape
        rows = pool.view(-1, pool.shape[2] * dim).index_select(0, blocks)
        return rows.view(sequences, heads, -1, dim).to(asked.dtype)
