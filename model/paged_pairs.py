"""Pairs in a cache's blocks, written and read as a plan says. Pools are [num_blocks, heads, block_size, dim]."""

from __future__ import annotations

import torch
from torch import Tensor

from model.arithmetic import read
from model.step_plan import ReadGroup, ReadPlan


def store_pairs(pool: Tensor, completed: Tensor, plan: ReadPlan) -> None:
    """Writes the keys, or the values, [tokens, heads, dim] of the pairs that tokens in packed order complete."""
    if plan.completing is not None:
        completed = completed[plan.completing]
    # A pair that is not finite would spoil, through 0 * inf, whoever is given the block later.
    rows = completed.reshape(-1, pool.shape[-1]).nan_to_num(0.0, 0.0, 0.0).to(pool.dtype)
    pool.view(-1, pool.shape[-1]).index_copy_(0, plan.pairs, rows)


def read_pairs(keys: Tensor, values: Tensor, queries: Tensor, plan: ReadPlan) -> Tensor:
    """What tokens in packed order read, [tokens, heads, dim] like their queries; 0 where they see nothing."""
    parts = [_read_group(keys, values, queries, group) for group in plan.groups]
    y = parts[0] if len(parts) == 1 else torch.cat(parts)
    if plan.unpad is not None:
        y = y[plan.unpad]
    return y if plan.blind is None else y.index_fill_(0, plan.blind, 0)


def _read_group(keys: Tensor, values: Tensor, queries: Tensor, group: ReadGroup) -> Tensor:
    """[sequences * asked, heads, dim]."""
    asked = queries.unsqueeze(2) if group.queries is None else queries[group.queries].transpose(1, 2)
    if group.blocks.numel() == 0:
        y = torch.zeros_like(asked)
    else:
        y = read(asked, _gather(keys, group.blocks, asked), _gather(values, group.blocks, asked), group.mask)
    return y.transpose(1, 2).flatten(0, 1)


def _gather(pool: Tensor, blocks: Tensor, asked: Tensor) -> Tensor:
    """[sequences, heads, pairs, dim]."""
    sequences, heads, _, dim = asked.shape
    rows = pool.view(-1, pool.shape[2] * dim).index_select(0, blocks)
    return rows.view(sequences, heads, -1, dim).to(asked.dtype)
