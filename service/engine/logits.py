"""What requests do to logits before a token is drawn, and what they are told about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from service.engine.request import SamplingParams, TokenLogprob


def adjust(
    logits: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int], banned: Sequence[int]
) -> None:
    """Applies to one row of `logits` [vocab], in place: allowed and forbidden tokens, bias, penalties.

    In this order, as in vLLM. Ids beyond the row are ignored: they are never sampled anyway. Something can always be
    drawn: where all that is allowed is forbidden too, what is allowed wins, and where that is nothing, all is.
    """
    vocab = logits.shape[0]
    if params.allowed_token_ids is not None:
        _keep_only(logits, _within(params.allowed_token_ids, logits))
    forbidden = [*banned, *_completing_bad_words(params.bad_words, [*prompt, *output])]
    if forbidden:
        _forbid(logits, _within(forbidden, logits))
    for token_id, bias in params.logit_bias:
        if token_id < vocab:
            logits[token_id] += bias
    if params.has_penalty:
        _penalise(logits, params, prompt, output)


def needs_adjusting(params: SamplingParams, banned: Sequence[int]) -> bool:
    """Whether `adjust` would change anything."""
    return bool(
        banned or params.bad_words or params.logit_bias or params.allowed_token_ids is not None or params.has_penalty
    )


def _within(token_ids: Sequence[int], logits: Tensor) -> Tensor:
    vocab = logits.shape[0]
    return torch.tensor([i for i in token_ids if i < vocab], dtype=torch.int64, device=logits.device)


def _forbid(logits: Tensor, forbidden: Tensor) -> None:
    lost = logits[forbidden]
    logits[forbidden] = -torch.inf
    if logits.max() == -torch.inf:
        logits[forbidden] = lost


def _keep_only(logits: Tensor, allowed: Tensor) -> None:
    if allowed.numel() == 0:
        return
    kept = logits[allowed]
    logits.fill_(-torch.inf)
    logits[allowed] = kept


def _completing_bad_words(words: Sequence[Sequence[int]], tokens: Sequence[int]) -> list[int]:
    """The last token of every word whose other tokens were just written."""
    return [word[-1] for word in words if len(word) == 1 or list(word[:-1]) == list(tokens[1 - len(word) :])]


def _penalise(logits: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> None:
    if params.repetition_penalty != 1:
        seen = _within(sorted({*prompt, *output}), logits)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        counts = Counter(token_id for token_id in output if token_id < logits.shape[0])
        written = _within(list(counts), logits)
        times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
        logits[written] -= params.frequency_penalty * times + params.presence_penalty


def token_logprobs(logits: Tensor, token_ids: Sequence[int], num_top: int) -> tuple[TokenLogprob, ...]:
    """What rows of `logits` [rows, vocab] say of one token each, with the `num_top` likeliest; ties to the lower id."""
    if not token_ids:
        return ()
    logprobs = torch.log_softmax(logits.double(), dim=-1)
    asked = torch.tensor(token_ids, device=logits.device).unsqueeze(1)
    chosen = logprobs.gather(1, asked)
    ids = torch.arange(logits.shape[1], device=logits.device)
    is_before = (logprobs > chosen) | ((logprobs == chosen) & (ids < asked))
    ranks: list[int] = (is_before.sum(dim=-1) + 1).tolist()
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(token_ids)
    if num_top:
        values, indices = logprobs.sort(dim=-1, descending=True, stable=True)
        pairs = zip(indices[:, :num_top].tolist(), values[:, :num_top].tolist(), strict=True)
        tops = [tuple(zip(i, v, strict=True)) for i, v in pairs]
    rows = zip(token_ids, chosen.squeeze(1).tolist(), ranks, tops, strict=True)
    return tuple(TokenLogprob(*row) for row in rows)
