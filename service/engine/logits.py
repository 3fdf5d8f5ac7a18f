"""What requests do to logits before a token is drawn, and what they are told about them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from service.engine.request import SamplingParams, TokenLogprob


def adjust(
    logits: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int], banned: Sequence[int]
) -> None:
    """Applies to one row of `logits` [vocab], in place: allowed and forbidden tokens, bias, penalties.

    In this order, as in vLLM. Ids beyond the row are ignored, and those with a logit of minus infinity keep it. Of the
    others something can always be drawn: where all that is allowed is forbidden too, what is allowed wins, and where
    that is nothing, all is.
    """
    if params.allowed_token_ids is not None:
        _keep_only(logits, _within(params.allowed_token_ids, logits))
    forbidden = [*banned, *(params.bad_words.completing(prompt, output) if params.bad_words else ())]
    if forbidden:
        _forbid(logits, _within(forbidden, logits))
    if params.logit_bias:
        _bias(logits, params.logit_bias)
    if params.has_penalty:
        _penalise(logits, params, prompt, output)


def needs_adjusting(params: SamplingParams, banned: Sequence[int]) -> bool:
    """Whether `adjust` would change anything."""
    is_limited = params.bad_words is not None or params.allowed_token_ids is not None
    return bool(banned or is_limited or params.logit_bias or params.has_penalty)


def _within(token_ids: Sequence[int], logits: Tensor) -> Tensor:
    vocab = logits.shape[0]
    return torch.tensor([i for i in token_ids if i < vocab], dtype=torch.int64, device=logits.device)


def _forbid(logits: Tensor, forbidden: Tensor) -> None:
    lost = logits[forbidden]
    logits[forbidden] = -torch.inf
    if logits.max() == -torch.inf:
        logits[forbidden] = lost


def _keep_only(logits: Tensor, allowed: Tensor) -> None:
    kept = logits[allowed]
    if allowed.numel() == 0 or kept.max() == -torch.inf:
        return
    logits.fill_(-torch.inf)
    logits[allowed] = kept


def _bias(logits: Tensor, bias: Sequence[tuple[int, float]]) -> None:
    within = [(token_id, value) for token_id, value in bias if token_id < logits.shape[0]]
    ids = torch.tensor([token_id for token_id, _ in within], dtype=torch.int64, device=logits.device)
    values = torch.tensor([value for _, value in within], dtype=logits.dtype, device=logits.device)
    logits.index_add_(0, ids, values)


def _penalise(logits: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> None:
    if params.repetition_penalty != 1:
        seen = _within(list({*prompt, *output}), logits)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        counts = Counter(token_id for token_id in output if token_id < logits.shape[0])
        written = _within(list(counts), logits)
        times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
        logits[written] -= params.frequency_penalty * times + params.presence_penalty


def token_logprobs(
    logits: Tensor, token_ids: Sequence[int], num_top: int, others: Mapping[int, Sequence[int]] | None = None
) -> tuple[TokenLogprob, ...]:
    """What rows of `logits` [rows, vocab] say of one token each, with the `num_top` likeliest; ties to the lower id.

    For a row in `others`, with those tokens instead of the likeliest.
    """
    if not token_ids:
        return ()
    logprobs = torch.log_softmax(logits.double(), dim=-1)
    asked = torch.tensor(token_ids, device=logits.device).unsqueeze(1)
    chosen = logits.gather(1, asked)
    ids = torch.arange(logits.shape[1], device=logits.device)
    is_before = (logits > chosen) | ((logits == chosen) & (ids < asked))
    ranks: list[int] = (is_before.sum(dim=-1) + 1).tolist()
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(token_ids)
    if num_top:
        likeliest = _likeliest(logits, min(num_top, logits.shape[1]))
        pairs = zip(likeliest.tolist(), logprobs.gather(1, likeliest).tolist(), strict=True)
        tops = [tuple(zip(i, v, strict=True)) for i, v in pairs]
    for row, asked_ids in (others or {}).items():
        known = logprobs[row, [i for i in asked_ids if i < logits.shape[1]]].tolist()
        tops[row] = tuple((i, known.pop(0) if i < logits.shape[1] else -math.inf) for i in asked_ids)
    rows = zip(token_ids, logprobs.gather(1, asked).squeeze(1).tolist(), ranks, tops, strict=True)
    return tuple(TokenLogprob(*row) for row in rows)


def _likeliest(logits: Tensor, num_top: int) -> Tensor:
    """The ids [rows, num_top] of the highest `logits` [rows, vocab], in order, ties to the lower id.

    Sorting whole rows would take fifty times as long; only where the last place is a tie must it be done.
    """
    values, ids = logits.topk(num_top, dim=-1)
    ids = ids.sort(dim=-1).values
    order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True).indices
    ids = ids.gather(1, order)
    is_tied = (logits >= values[:, -1:]).sum(dim=-1) > num_top
    if bool(is_tied.any()):
        ids[is_tied] = logits[is_tied].sort(dim=-1, descending=True, stable=True).indices[:, :num_top]
    return ids
