"""Sampling written as plainly as its definition, one row at a time in Python floats."""

from __future__ import annotations

import math

from service.engine.request import SamplingParams
from service.engine.sampler import uniform


def typical(candidates: list[tuple[float, int]], typical_p: float) -> list[tuple[float, int]]:
    """The candidates nearest to the expected information, as few as have `typical_p` of the mass; in their order."""
    if typical_p == 1:
        return candidates
    mass = math.fsum(p for p, _ in candidates)
    information = {i: -math.log(p / mass) if p else math.inf for p, i in candidates}
    expected = math.fsum(p / mass * information[i] for p, i in candidates if p)
    kept, reached = set(), 0.0
    for p, i in sorted(candidates, key=lambda c: abs(information[c[1]] - expected)):
        if reached >= typical_p:
            break
        kept.add(i)
        reached += p / mass
    return [c for c in candidates if c[1] in kept]


def naive_sample(logits: list[float], params: SamplingParams, position: int) -> int:
    if params.temperature == 0:
        return logits.index(max(logits))
    top = max(logits)
    weights = [math.exp((x - top) / params.temperature) for x in logits]
    total = math.fsum(weights)
    candidates = [(w / total, i) for i, w in enumerate(weights)]
    if params.top_k or params.top_p < 1 or params.min_p or params.typical_p < 1:
        candidates.sort(key=lambda c: (-c[0], c[1]))
        best = candidates[0][0]
        candidates = [c for c in candidates if c[0] >= params.min_p * best]
        if params.top_k:
            candidates = candidates[: params.top_k]
        candidates = typical(candidates, params.typical_p)
        mass = math.fsum(p for p, _ in candidates)
        nucleus, reached = [], 0.0
        for candidate in candidates:
            if nucleus and reached >= params.top_p * mass:
                break
            nucleus.append(candidate)
            reached += candidate[0]
        candidates = sorted(nucleus, key=lambda c: c[1])
    target = uniform(params.seed, params.choice_index, position) * math.fsum(p for p, _ in candidates)
    reached = 0.0
    for p, i in candidates:
        reached += p
        if reached > target:
            return i
    return [i for p, i in candidates if p > 0][-1]
