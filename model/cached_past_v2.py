"""The past of a served sequence of the second version: gated sums from a state slot, pairs in two tables of blocks.

In its slot a sequence has, per layer, five vectors of n_embd: the mantissas of its short-term and of its long-term key
sum, what its last token contributes to the pending value of either memory, and a vector that begins with the
logarithms of the sums' scales, short-term heads first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.arithmetic import unit
from model.cache import MemoryBatch
from model.config import MosaicV2Config
from model.gated_average import gated_step
from model.paged_pairs import read_pairs, store_pairs
from model.past_v2 import Memory, num_visible
from model.step_plan import View, plan_step


class CachedStepV2:
    """One call on a batch, through all layers. State is written back by `commit` alone."""

    def __init__(self, batch: MemoryBatch, config: MosaicV2Config, dtype: torch.dtype) -> None:
        if batch.cache.keys_by_dimension:
            raise ValueError("this cache stores keys by dimension; the plain forward reads them by pair")
        if batch.short_tables is None:
            raise ValueError("short_tables: this model has a short-term memory")
        self.cache, self.config = batch.cache, config
        views = [
            View(batch.short_tables, window=config.short_window - 1),
            View(batch.block_tables, delay=config.long_delay),
        ]
        self.plan = plan_step(batch, config.n_head, dtype, views)
        self.num_visible = [
            num_visible(self.plan.positions, memory, window=config.short_window, delay=config.long_delay)
            for memory in Memory
        ]
        state = self.cache.state[:, batch.slots[self.plan.sequences]].to(dtype)
        size = state.shape[:2]
        scales = state[:, :, 4, : 2 * config.n_head].view(*size, 2, config.n_head)
        if self.plan.starts is not None:
            # Ranks of sequences that start anew are the packed rows of their first tokens.
            state[:, self.plan.starts] = 0
            scales[:, self.plan.starts] = -math.inf
        vectors = state[:, :, :4].view(*size, 4, config.n_head, config.head_dim)
        # [memory, n_layer, sequences, heads (, dim)]
        self.sums, self.contributions = vectors[:, :, :2].movedim(2, 0), vectors[:, :, 2:].movedim(2, 0)
        self.scales = scales.movedim(2, 0)
        self.pending_keys = unit(self.sums, 0.0)
        self.new_sums: list[Tensor] = []
        self.new_scales: list[Tensor] = []
        self.new_contributions: list[Tensor] = []

    def past(self, layer: int) -> CachedPastV2:
        """The past as the blocks see it, to be asked layer after layer."""
        return CachedPastV2(self, layer)

    def commit(self) -> None:
        """Writes the state after the last token of every sequence, and the snapshots, into the cache."""
        shape = (self.config.n_layer, 2, len(self.plan.kept_rows), -1)
        sums, contributions, scales = (
            torch.stack(kept).view(shape).transpose(1, 2)
            for kept in (self.new_sums, self.new_contributions, self.new_scales)
        )
        state, slots = self.cache.state, self.plan.kept_slots
        state[:, slots, :2] = sums.to(state.dtype)
        state[:, slots, 2:4] = contributions.to(state.dtype)
        state[:, slots, 4, : 2 * self.config.n_head] = scales.flatten(-2).to(state.dtype)


class CachedPastV2:
    """One layer of a step; *tokens is [tokens], in the packed order of the plan."""

    def __init__(self, step: CachedStepV2, layer: int) -> None:
        self.step, self.plan, self.layer = step, step.plan, layer
        self.keys, self.values = step.cache.keys[layer], step.cache.values[layer]

    def average(self, x: Tensor, log_gate: Tensor, log_decay: Tensor, memory: Memory) -> Tensor:
        """Token by token, so that how a text is cut into calls cannot change a bit of it."""
        mantissa, scale = self.step.sums[memory, self.layer], self.step.scales[memory, self.layer]
        mantissas, scales = [], []
        parts = (torch.split(tensor, self.plan.step_sizes) for tensor in (x, log_gate, log_decay))
        for x_t, gate_t, decay_t in zip(*parts, strict=True):
            size = x_t.shape[0]
            mantissa, scale = gated_step(x_t, gate_t, decay_t, mantissa[:size], scale[:size])
            mantissas.append(mantissa)
            scales.append(scale)
        y = torch.cat(mantissas)
        self.step.new_sums.append(y[self.plan.kept_rows])
        self.step.new_scales.append(torch.cat(scales)[self.plan.kept_rows])
        return y

    def previous_key(self, key: Tensor, memory: Memory) -> Tensor:
        return self._previous(self.step.pending_keys[memory, self.layer], key)

    def previous_contribution(self, contribution: Tensor, memory: Memory) -> Tensor:
        self.step.new_contributions.append(contribution[self.plan.kept_rows])
        return self._previous(self.step.contributions[memory, self.layer], contribution)

    def num_visible(self, memory: Memory) -> Tensor:
        return self.step.num_visible[memory]

    def read(self, queries: Tensor, completed_keys: Tensor, completed_values: Tensor, memory: Memory) -> Tensor:
        plan = self.plan.reads[memory]
        store_pairs(self.keys, completed_keys, plan)
        store_pairs(self.values, completed_values, plan)
        return read_pairs(self.keys, self.values, queries, plan)

    def _previous(self, before: Tensor, x: Tensor) -> Tensor:
        """The row of the token before each token; `before` [sequences, heads, dim] precedes the first ones."""
        return before if len(self.plan.step_sizes) == 1 else torch.cat([before, x[self.plan.previous]])
