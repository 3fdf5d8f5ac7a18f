"""From logits to token ids. Every row is drawn by its own request's parameters and its own random number."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from model.kernels import cpu_sampling
from model.kernels.sampling import Draws
from service.engine.logits import adjust, needs_adjusting, penalise
from service.engine.request import SamplingParams
from service.engine.token_counts import TokenCounts


class SamplingRow(NamedTuple):
    """How to draw one token: the request's parameters, how many tokens it has, ids it may not draw just now.

    `prompt` and `output` are its tokens so far, for the parameters that look back at them; `counts` are of the same
    tokens, for penalties, where somebody keeps them.
    """

    params: SamplingParams
    position: int
    banned_token_ids: tuple[int, ...] = ()
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()
    counts: TokenCounts | None = None


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
    llama.cpp has it. Ties go to the lower id. What is drawn of a number is said in `model.kernels.sampling`.
    """
    for i, row in enumerate(rows):
        if needs_adjusting(row.params, row.banned_token_ids):
            adjust(logits[i], row.params, row.prompt, row.output, row.banned_token_ids)
    counts = {
        i: row.counts or TokenCounts(row.prompt, row.output) for i, row in enumerate(rows) if row.params.has_penalty
    }
    if counts:
        penalise(logits, {i: rows[i].params for i in counts}, counts)
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if not drawn:
        return cpu_sampling.argmax(logits)
    token_ids = cpu_sampling.argmax(logits) if len(drawn) < len(rows) else [0] * len(rows)
    # Typical-p has a form in torch alone, which the others are not to wait for.
    typical = [i for i in drawn if rows[i].params.typical_p < 1]
    for some in (typical, [i for i in drawn if rows[i].params.typical_p == 1]):
        for i, token_id in zip(some, cpu_sampling.draw(logits, _draws(some, rows)) if some else (), strict=True):
            token_ids[i] = token_id
    return token_ids


def _draws(indices: list[int], rows: Sequence[SamplingRow]) -> Draws:
    params = [rows[i].params for i in indices]
    return Draws(
        rows=indices,
        temperature=[p.temperature for p in params],
        top_k=[p.top_k for p in params],
        typical_p=[p.typical_p for p in params],
        top_p=[p.top_p for p in params],
        min_p=[p.min_p for p in params],
        u=[uniform(p.seed, p.choice_index, rows[i].position) for i, p in zip(indices, params, strict=True)],
    )
