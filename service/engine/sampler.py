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
    filtered = [i for i in drawn if _has_filter(rows[i].params)]
    plain = [i for i in drawn if not _has_filter(rows[i].params)]
    for indices, draw in ((plain, _draw_plain), (filtered, _draw_filtered)):
        if indices:
            drawn_ids = draw(logits[indices], [rows[i] for i in indices])
            for i, token_id in zip(indices, drawn_ids, strict=True):
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


def _draw_filtered(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    probabilities, order = _probabilities(logits, rows).sort(dim=-1, descending=True, stable=True)
    vocab = probabilities.shape[-1]
    device = logits.device
    min_p = torch.tensor([row.params.min_p for row in rows], dtype=torch.float64, device=device).unsqueeze(1)
    top_k = torch.tensor([row.params.top_k or vocab for row in rows], device=device).unsqueeze(1)
    top_p = torch.tensor([row.params.top_p for row in rows], dtype=torch.float64, device=device).unsqueeze(1)
    rank = torch.arange(vocab, device=device)
    keep = (probabilities >= min_p * probabilities[:, :1]) & (rank < top_k)
    kept = probabilities.where(keep, 0.0)
    if any(row.params.typical_p < 1 for row in rows):
        kept = _keep_typical(kept, rows)
    # The nucleus: the fewest tokens whose mass, among those still there, reaches top_p. The first always stays.
    before = kept.cumsum(dim=-1) - kept
    kept = kept.where((before < top_p * kept.sum(dim=-1, keepdim=True)) | (before == 0), 0.0)
    ranks = torch.tensor(_invert(kept.cumsum(dim=-1), rows), device=device)
    picked: list[int] = order.gather(1, ranks.unsqueeze(1)).squeeze(1).tolist()
    return picked


def _keep_typical(kept: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Locally typical sampling (Meister et al. 2023, section 4): of each row of `kept` [rows, vocab] the tokens whose
    information is closest to what is expected, as few as reach `typical_p` of the row's mass.
    """
    typical_p = torch.tensor([row.params.typical_p for row in rows], dtype=torch.float64, device=kept.device)
    p = kept / kept.cumsum(dim=-1)[:, -1:]
    information = -p.log()
    entropy = torch.where(p > 0, p * information, 0.0).cumsum(dim=-1)[:, -1:]
    order = (information - entropy).abs().sort(dim=-1, stable=True).indices
    sorted_p = p.gather(1, order)
    before = sorted_p.cumsum(dim=-1) - sorted_p
    is_kept = torch.zeros_like(kept, dtype=torch.bool)
    is_kept.scatter_(1, order, (before < typical_p.unsqueeze(1)) | (typical_p.unsqueeze(1) >= 1))
    return kept.where(is_kept, 0.0)


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
