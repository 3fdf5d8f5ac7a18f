"""Drawing tokens from logits in plain torch: the reference of cpu/sampling.cpp, operation by operation.

Sums are taken in one order, of 8 lanes in blocks of 256 ids, and the exponential is made of products and sums alone, so
that both draw the same token from the same number. Knows no requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LANES, BLOCK, BUCKETS = 8, 256, 256
_LOWEST = -700.0
_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.4426950408889634, 0.6931471805582987, 1.6465949582897082e-12
_ROUNDER = 6755399441055744.0  # 1.5 * 2^52: adding it rounds to the nearest integer
_TAYLOR = [1 / math.factorial(k) for k in range(13, -1, -1)]
_BUCKET_SHIFT = 50
_ONE = 0x3FF << 52


@dataclass(frozen=True, slots=True)
class Draws:
    """How to draw one token for each of some rows.

    `temperature` is above 0. `top_k` 0, `typical_p` 1, `top_p` 1 and `min_p` 0 switch the respective filter off; `u` is
    a number in [0, 1).
    """

    rows: list[int]
    temperature: list[float]
    top_k: list[int]
    typical_p: list[float]
    top_p: list[float]
    min_p: list[float]
    u: list[float]


class Scores(NamedTuple):
    """What rows of logits say of one token each.

    `largest` of each row, the `total` of exp(logit - largest) over it, and how many ids `come_before` the token: with a
    higher logit, or the same and a lower id. `top` [rows, num_top] are the ids that come first in that order.
    """

    largest: list[float]
    total: list[float]
    come_before: list[int]
    top: Tensor

    def base(self, row: int) -> float:
        """What a logit of that row exceeds its log probability by, in nats."""
        return self.largest[row] + math.log(self.total[row])


def argmax(logits: Tensor) -> list[int]:
    """The id of the largest of each row of `logits` [rows, vocab], the lowest of equals; never one that is no number,
    if there is another.
    """
    clean = torch.where(logits.isnan(), -torch.inf, logits)
    is_largest = (logits == clean.amax(dim=-1, keepdim=True)).to(torch.uint8)
    token_ids: list[int] = is_largest.argmax(dim=-1).tolist()
    return token_ids


def draw(logits: Tensor, draws: Draws) -> list[int]:
    """A token for each of the rows of `logits` [rows, vocab] that `draws` name.

    The likeliest token has weight 1. Tokens whose weight is below min-p have none; then all but the top-k; all but the
    typical ones; all but the nucleus, the fewest that reach top-p of what is left. Of equals the lower id is kept. Of
    what remains, ids in their order, the first is drawn at which the sum so far exceeds u times the sum of all.
    """
    kept = weights(logits[draws.rows], draws.temperature)
    kept = keep_above(kept, _column(draws.min_p, kept))
    kept = keep_most(kept, torch.tensor(draws.top_k, device=kept.device).unsqueeze(1))
    kept = keep_typical(kept, _column(draws.typical_p, kept))
    kept = keep_nucleus(kept, _column(draws.top_p, kept))
    return invert(kept, _column(draws.u, kept))


def _column(numbers: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=like.dtype, device=like.device).unsqueeze(1)


def score(logits: Tensor, token_ids: list[int], num_top: int) -> Scores:
    """What rows of `logits` [rows, vocab] say of one of `token_ids` each, with the `num_top` likeliest, at most all."""
    asked = torch.tensor(token_ids, device=logits.device).unsqueeze(1)
    chosen = logits.gather(1, asked)
    ids = torch.arange(logits.shape[1], device=logits.device)
    come_before: list[int] = ((logits > chosen) | ((logits == chosen) & (ids < asked))).sum(dim=-1).tolist()
    top = _likeliest(logits, num_top)
    totals = block_sums(weights(logits, [1.0] * len(token_ids))).cumsum(dim=-1)[:, -1]
    return Scores(logits.double().amax(dim=-1).tolist(), totals.tolist(), come_before, top)


def _likeliest(logits: Tensor, num_top: int) -> Tensor:
    """The ids [rows, num_top] of the highest `logits` [rows, vocab], in order, ties to the lower id.

    Sorting whole rows would take fifty times as long; only where the last place is a tie must it be done.
    """
    if not num_top:
        return torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device)
    values, ids = logits.topk(num_top, dim=-1)
    ids = ids.sort(dim=-1).values
    order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True).indices
    ids = ids.gather(1, order)
    is_tied = (logits >= values[:, -1:]).sum(dim=-1) > num_top
    if bool(is_tied.any()):
        ids[is_tied] = logits[is_tied].sort(dim=-1, descending=True, stable=True).indices[:, :num_top]
    return ids


def weights(logits: Tensor, temperature: list[float]) -> Tensor:
    """exp((logit - largest) / temperature) [rows, vocab] in float64, 1 for the largest. 0 where it is below 1e-304, or
    where a logit is no number.
    """
    values = logits.double()
    largest = torch.where(values.isnan(), -torch.inf, values).amax(dim=-1, keepdim=True)
    distance = torch.where(values == largest, 0.0, values - largest)
    scaled = distance / _column(temperature, distance)
    is_kept = scaled > _LOWEST
    y = torch.where(is_kept, scaled, _LOWEST)
    rounded = y * _LOG2_E + _ROUNDER
    exponent = rounded - _ROUNDER
    r = (y - exponent * _LN2_HIGH) - exponent * _LN2_LOW
    p = torch.full_like(r, _TAYLOR[0])
    for term in _TAYLOR[1:]:
        p.mul_(r).add_(term)
    power = ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)
    return torch.where(is_kept, p * power, 0.0)


def block_sums(kept: Tensor) -> Tensor:
    """The sums of `kept` [rows, vocab] over blocks of ids, [rows, blocks]."""
    padded = torch.nn.functional.pad(kept, (0, -kept.shape[1] % BLOCK))
    lanes = padded.view(kept.shape[0], -1, BLOCK // LANES, LANES)
    sums = lanes[:, :, 0].clone()
    for i in range(1, lanes.shape[2]):
        sums += lanes[:, :, i]
    while sums.shape[2] > 1:
        half = sums.shape[2] // 2
        sums = sums[:, :, :half] + sums[:, :, half:]
    return sums.squeeze(2)


def keep_above(kept: Tensor, min_p: Tensor) -> Tensor:
    """`kept` [rows, vocab] with zeros for what is below `min_p` [rows, 1]."""
    return kept.where(kept >= min_p, 0.0)


def keep_most(kept: Tensor, top_k: Tensor) -> Tensor:
    """`kept` [rows, vocab] with zeros for all but the `top_k` [rows, 1] largest; 0 keeps all."""
    if not bool((top_k > 0).any()):
        return kept
    top_k = top_k.clamp(max=kept.shape[1])
    values = kept.topk(int(top_k.max()), dim=-1).values
    least = values.gather(1, (top_k - 1).clamp(min=0))
    is_above, is_least = kept > least, kept == least
    num_left = top_k - is_above.sum(dim=-1, keepdim=True)
    return kept.where(is_above | (is_least & (is_least.cumsum(dim=-1) <= num_left)) | (top_k == 0), 0.0)


def keep_typical(kept: Tensor, typical_p: Tensor) -> Tensor:
    """Locally typical sampling (Meister et al. 2023, section 4): `kept` [rows, vocab] with zeros for all but the tokens
    whose information is closest to what is expected, as few as reach `typical_p` [rows, 1] of the mass; 1 keeps all.
    """
    if not bool((typical_p < 1).any()):
        return kept
    values, ids = kept.sort(dim=-1, descending=True, stable=True)
    p = values / values.cumsum(dim=-1)[:, -1:]
    information = -p.log()
    entropy = torch.where(p > 0, p * information, 0.0).cumsum(dim=-1)[:, -1:]
    order = (information - entropy).abs().sort(dim=-1, stable=True).indices
    sorted_p = p.gather(1, order)
    before = sorted_p.cumsum(dim=-1) - sorted_p
    is_kept = torch.zeros_like(kept, dtype=torch.bool).scatter_(1, order, (before < typical_p) | (typical_p >= 1))
    return torch.zeros_like(kept).scatter_(1, ids, values.where(is_kept, 0.0))


def keep_nucleus(kept: Tensor, top_p: Tensor) -> Tensor:
    """`kept` [rows, vocab] with zeros for all but the fewest of the largest that reach `top_p` [rows, 1] of their sum.

    Sums are taken over buckets of weights, each in the order of its ids, and from the largest bucket on; in the bucket
    where the nucleus ends over parts of it, and in the part where it ends one by one. 1 keeps all.
    """
    if not bool((top_p < 1).any()):
        return kept
    bits, none = kept.view(torch.int64), torch.zeros_like(top_p)
    bucket = ((_ONE >> _BUCKET_SHIFT) - (bits >> _BUCKET_SHIFT)).clamp(max=BUCKETS - 1)
    reached = _reached(bucket, kept, none)
    wanted = top_p * reached[:, -1:]
    last, before = _crossed(reached, wanted)
    # The last bucket, which has many octaves, is one part.
    part = torch.where(last == BUCKETS - 1, 0, 255 - (bits >> (_BUCKET_SHIFT - 8) & 255))
    inside = kept.where(bucket == last, 0.0)
    last_part, before = _crossed(_reached(part, inside, before), wanted)
    is_before = (bucket < last) | ((bucket == last) & (part < last_part))
    inside = inside.where(part == last_part, 0.0)
    values = inside.topk(int((inside > 0).sum(dim=-1).max().clamp(min=1)), dim=-1).values
    sums = torch.cat([before, values], dim=-1).cumsum(dim=-1)[:, :-1]
    num_kept = (sums < wanted).sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.where(is_before | (top_p >= 1), kept, keep_most(inside, num_kept))


def _reached(place: Tensor, sizes: Tensor, before: Tensor) -> Tensor:
    """`before` [rows, 1], and it with the `sizes` [rows, vocab] that are in the first, the first two, ... places added:
    [rows, 1 + BUCKETS].
    """
    sums = torch.zeros(len(sizes), BUCKETS, dtype=sizes.dtype, device=sizes.device).scatter_add_(1, place, sizes)
    return torch.cat([before, sums], dim=-1).cumsum(dim=-1)


def _crossed(reached: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The place in which `reached` comes to `wanted` [rows, 1], the last if in none, and what it was before that."""
    place = (reached[:, 1:] < wanted).sum(dim=-1, keepdim=True).clamp(max=BUCKETS - 1)
    return place, reached.gather(1, place)


def invert(kept: Tensor, u: Tensor) -> list[int]:
    """The first id of each row of `kept` [rows, vocab] at which the sum so far exceeds `u` [rows, 1] times all."""
    sums = block_sums(kept)
    reached = sums.cumsum(dim=-1)
    target = u * reached[:, -1:]
    # The product can round up to all there is: then the last that carries weight is meant.
    block = torch.minimum((reached <= target).sum(dim=-1, keepdim=True), _last(sums))
    before = torch.where(block > 0, reached.gather(1, (block - 1).clamp(min=0)), 0.0)
    padded = torch.nn.functional.pad(kept, (0, -kept.shape[1] % BLOCK)).view(kept.shape[0], -1, BLOCK)
    inside = padded.gather(1, block.unsqueeze(2).expand(-1, 1, BLOCK)).squeeze(1)
    reached = torch.cat([before, inside], dim=-1).cumsum(dim=-1)[:, 1:]
    place = torch.minimum((reached <= target).sum(dim=-1, keepdim=True), _last(inside))
    token_ids: list[int] = (block * BLOCK + place).squeeze(1).tolist()
    return token_ids


def _last(values: Tensor) -> Tensor:
    """The last index [rows, 1] of each row of `values` that is not zero; 0 where all are."""
    places = torch.arange(values.shape[1], device=values.device)
    return torch.where(values > 0, places, 0).amax(dim=-1, keepdim=True)
