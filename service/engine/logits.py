"""What requests do to logits before a token is drawn, and what they are told about them."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from model.kernels import cpu_sampling
from service.engine.request import SamplingParams, TokenLogprob
from service.engine.token_counts import TokenCounts


def adjust(
    logits: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int], banned: Sequence[int]
) -> None:
    """Applies to one row of `logits` [vocab], in place: allowed and forbidden tokens, bias.

    In this order, as in vLLM; penalties come after them. Ids beyond the row are ignored, those with a logit of minus
    infinity keep it. Of the others something can always be drawn: where all that is allowed is forbidden too, what is
    allowed wins, and where that is nothing, all is.
    """
    if params.allowed_token_ids is not None:
        _keep_only(logits, _within(params.allowed_token_ids, logits))
    forbidden = [*banned, *(params.bad_words.completing(prompt, output) if params.bad_words else ())]
    if forbidden:
        _forbid(logits, _within(forbidden, logits))
    if params.logit_bias:
        _bias(logits, params.logit_bias)


def needs_adjusting(params: SamplingParams, banned: Sequence[int]) -> bool:
    """Whether `adjust` would change anything."""
    is_limited = params.bad_words is not None or params.allowed_token_ids is not None
    return bool(banned or is_limited or params.logit_bias)


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


def penalise(logits: Tensor, rows: Mapping[int, SamplingParams], counts: Mapping[int, TokenCounts]) -> None:
    """Applies to `rows` of `logits` [rows, vocab], in place, what their parameters make of the tokens so far.

    Ids beyond the row are ignored. All rows at once, since there are a dozen operations whatever the number of tokens.
    """
    all_ids, all_times = array("q"), array("q")
    for each in rows:
        all_ids.extend(counts[each].ids)
        all_times.extend(counts[each].times)
    if not all_ids:
        return
    ids, times = (torch.frombuffer(part, dtype=torch.int64).to(logits.device) for part in (all_ids, all_times))
    sizes = torch.tensor([len(counts[row].ids) for row in rows], device=logits.device)
    row = torch.tensor(list(rows), device=logits.device).repeat_interleave(sizes)
    params = list(rows.values())
    repetition, presence, frequency = (
        torch.tensor(column, dtype=logits.dtype, device=logits.device).repeat_interleave(sizes)
        for column in (
            [p.repetition_penalty for p in params],
            [p.presence_penalty for p in params],
            [p.frequency_penalty for p in params],
        )
    )
    is_known = ids < logits.shape[1]
    if not bool(is_known.all()):
        row, ids, times = row[is_known], ids[is_known], times[is_known]
        repetition, presence, frequency = repetition[is_known], presence[is_known], frequency[is_known]
    values = logits[row, ids]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[row, ids] = values - torch.where(times > 0, frequency * times.to(logits.dtype) + presence, 0.0)


def token_logprobs(
    logits: Tensor, token_ids: list[int], num_top: int, others: Mapping[int, Sequence[int]] | None = None
) -> tuple[TokenLogprob, ...]:
    """What rows of `logits` [rows, vocab] say of one token each, with the `num_top` likeliest; ties to the lower id.

    For a row in `others`, with those tokens instead of the likeliest.
    """
    if not token_ids:
        return ()
    vocab = logits.shape[1]
    scores = cpu_sampling.score(logits, token_ids, min(num_top, vocab))
    chosen: list[float] = (
        logits.gather(1, torch.tensor(token_ids, device=logits.device).unsqueeze(1)).squeeze(1).tolist()
    )
    top_ids: list[list[int]] = scores.top.tolist()
    top_logits: list[list[float]] = logits.gather(1, scores.top).tolist()
    told = []
    for row, (token_id, logit) in enumerate(zip(token_ids, chosen, strict=True)):
        base = scores.base(row)
        if others and row in others:
            known = {i: float(logits[row, i]) for i in others[row] if i < vocab}
            top = tuple((i, known[i] - base if i in known else -math.inf) for i in others[row])
        else:
            top = tuple((i, value - base) for i, value in zip(top_ids[row], top_logits[row], strict=True))
        told.append(TokenLogprob(token_id, logit - base, scores.come_before[row] + 1, top))
    return tuple(told)
