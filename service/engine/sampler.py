"""From logits to token ids. Every row is drawn by its own request's parameters and its own random number."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.engine.logits import adjust, needs_adjusting
from service.engine.request import SamplingParams

HEAD = 256
"""Of each row so many likeliest tokens are sorted first; what filters keep is most often among them."""
_GROWTH = 16
_MAX_VALUES_AT_ONCE = 2**16


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """How to draw one token: the request's parameters, how many tokens it has, ids it may not draw just now.

    `prompt` and `output` are its tokens so far, for the parameters that look back at them.
    """

    params: SamplingParams
    position: int
    banned_token_ids: tuple[int, ...] = ()
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()


def uniform(seed: int, choice_index: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments alone: a counter-based generator with 53 random bits.

    No state is shared between requests or steps, so a request draws the same tokens whatever runs beside it, after
    preemption and on another replica.
    """
    key = struct.pack("<QQQ", seed & 0xFFFF_FFFF_FFFF_FFFF, choice_index, position)
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return float(int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """Draws one token per row of `logits` [rows, vocab] (float, modified in place).

    Adjusted logits go through temperature, min-p, top-k, typical-p and top-p: vLLM's order, with typical-p where
    llama.cpp has it. Ties go to the lower id.
    """
    for i, row in enumerate(rows):
        if needs_adjusting(row.params, row.banned_token_ids):
            adjust(logits[i], row.params, row.prompt, row.output, row.banned_token_ids)
    token_ids: list[int] = logits.argmax(dim=-1).tolist()
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    typical = [i for i in drawn if rows[i].params.typical_p < 1]
    filtered = [i for i in drawn if _has_filter(rows[i].params) and rows[i].params.typical_p == 1]
    plain = [i for i in drawn if not _has_filter(rows[i].params)]
    # As many rows at a time as stay in the processor's caches.
    step = max(_MAX_VALUES_AT_ONCE // logits.shape[-1], 1)
    groups = ((plain, _draw_plain), (filtered, _draw_filtered), (typical, _draw_typical))
    for indices, draw in groups:
        for start in range(0, len(indices), step):
            some = indices[start : start + step]
            for i, token_id in zip(some, draw(logits[some], [rows[i] for i in some]), strict=True):
                token_ids[i] = token_id
    return token_ids


def _has_filter(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0 or params.typical_p < 1


def _probabilities(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    # float64 keeps the cumulative sums below exact enough for vocabularies of any size.
    temperature = torch.tensor([row.params.temperature for row in rows], dtype=torch.float64)
    # Against the maximum, so that a temperature however small sharpens and never overflows.
    logits = logits.double() - logits.amax(dim=-1, keepdim=True)
    return torch.softmax(logits / temperature.to(logits.device).unsqueeze(1), dim=-1)


def _draw_plain(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    return _invert(_probabilities(logits, rows).cumsum(dim=-1), rows)


@dataclass(frozen=True, slots=True)
class _Filters:
    """Each row's filters, [rows, 1]. A row without top-k has the size of the vocabulary there."""

    min_p: Tensor
    top_k: Tensor
    typical_p: Tensor
    top_p: Tensor

    @classmethod
    def of(cls, rows: Sequence[SamplingRow], values: Tensor) -> _Filters:
        params, vocab = [row.params for row in rows], values.shape[-1]
        columns = (
            [p.min_p for p in params],
            [float(p.top_k or vocab) for p in params],
            [p.typical_p for p in params],
            [p.top_p for p in params],
        )
        return cls(*(torch.tensor(c, dtype=torch.float64, device=values.device).unsqueeze(1) for c in columns))


def _draw_filtered(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    return _draw_from_head(_probabilities(logits, rows), rows, HEAD)


def _draw_typical(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    # What is typical depends on all that is there.
    return _draw_from_head(_probabilities(logits, rows), rows, logits.shape[-1])


def _draw_from_head(probabilities: Tensor, rows: Sequence[SamplingRow], size: int) -> list[int]:
    """Sorts `size` of each row's `probabilities` [rows, vocab] first, and more where the filters reach further down."""
    filters, vocab = _Filters.of(rows, probabilities), probabilities.shape[-1]
    if size >= vocab:
        values, ids = probabilities.sort(dim=-1, descending=True, stable=True)
        return _pick(_filtered(values, filters, torch.zeros_like(values[:, :1])), ids, rows)
    values, ids = _head(probabilities, size)
    last, mass = values[:, -1:], probabilities.cumsum(dim=-1)[:, -1:]
    # Either nothing below the head passes min-p or top-k, or there is neither and the nucleus lies within the head.
    is_cut = (filters.top_k <= size) | (last < filters.min_p * values[:, :1]) | (last == 0)
    is_free = (filters.top_k >= vocab) & (filters.min_p == 0)
    is_within = is_free & (values.cumsum(dim=-1)[:, -1:] >= filters.top_p * mass)
    is_clear = ((probabilities >= last).sum(dim=-1, keepdim=True) <= size) | (last == 0)
    picked = _pick(_filtered(values, filters, mass.where(~is_cut, 0.0)), ids, rows)
    left = (~(is_clear & (is_cut | is_within))).squeeze(1).nonzero().flatten().tolist()
    if left:
        others = _draw_from_head(probabilities[left], [rows[i] for i in left], size * _GROWTH)
        for i, token_id in zip(left, others, strict=True):
            picked[i] = token_id
    return picked


def _head(probabilities: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The highest `probabilities` [rows, size] in order, ties by id, and their ids: what sorting all would put first.

    Except where the last of them has its equal outside. Sorting all takes ten to fifty times as long.
    """
    ids = probabilities.topk(size, dim=-1).indices.sort(dim=-1).values
    values, order = probabilities.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order)


def _filtered(values: Tensor, filters: _Filters, mass: Tensor) -> Tensor:
    """Sorted `values` [rows, n] with zeros for what the filters drop.

    `mass` [rows, 1] is what top-p is a part of where that is more than is left here.
    """
    rank = torch.arange(values.shape[1], device=values.device)
    kept = values.where((values >= filters.min_p * values[:, :1]) & (rank < filters.top_k), 0.0)
    if bool((filters.typical_p < 1).any()):
        kept = _keep_typical(kept, filters.typical_p)
    # The nucleus: the fewest tokens whose mass, among those still there, reaches top_p. The first always stays.
    reached = kept.cumsum(dim=-1)
    before = reached - kept
    return kept.where((before < filters.top_p * torch.maximum(reached[:, -1:], mass)) | (before == 0), 0.0)


def _keep_typical(kept: Tensor, typical_p: Tensor) -> Tensor:
    """Locally typical sampling (Meister et al. 2023, section 4): of each row of `kept` [rows, n] the tokens whose
    information is closest to what is expected, as few as reach `typical_p` [rows, 1] of the row's mass.
    """
    p = kept / kept.cumsum(dim=-1)[:, -1:]
    information = -p.log()
    entropy = torch.where(p > 0, p * information, 0.0).cumsum(dim=-1)[:, -1:]
    order = (information - entropy).abs().sort(dim=-1, stable=True).indices
    sorted_p = p.gather(1, order)
    before = sorted_p.cumsum(dim=-1) - sorted_p
    is_kept = torch.zeros_like(kept, dtype=torch.bool).scatter_(1, order, (before < typical_p) | (typical_p >= 1))
    return kept.where(is_kept, 0.0)


def _pick(kept: Tensor, ids: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """Draws from sorted probabilities `kept` [rows, n] of `ids`."""
    ranks = torch.tensor(_invert(kept.cumsum(dim=-1), rows), device=kept.device)
    picked: list[int] = ids.gather(1, ranks.unsqueeze(1)).squeeze(1).tolist()
    return picked


def _invert(cumulative: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """The first index whose cumulative mass exceeds u times the total: never one of zero probability."""
    draws = [uniform(row.params.seed, row.params.choice_index, row.position) for row in rows]
    u = torch.tensor(draws, dtype=torch.float64, device=cumulative.device).unsqueeze(1)
    total = cumulative[:, -1:].contiguous()
    indices = torch.searchsorted(cumulative, u * total, right=True)
    # u * total can round up to the total: then the last index that carries mass is meant.
    last = torch.searchsorted(cumulative, total, right=False)
    result: list[int] = torch.minimum(indices, last).squeeze(1).tolist()
    return result
