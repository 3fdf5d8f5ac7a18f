"""What the holder of a key may ask of an engine that others share: priorities, sizes and rates."""

from __future__ import annotations

from dataclasses import replace

from service.engine.stats import EngineInfo
from service.gateway.api_keys import ApiKey
from service.gateway.errors import BadRequestError
from service.gateway.plan import CompletionPlan
from service.gateway.rate_limit import RateLimiter, Reservation


def claim(
    plan: CompletionPlan, key: ApiKey | None, info: EngineInfo, limiter: RateLimiter
) -> tuple[CompletionPlan, Reservation]:
    """`plan` in the name of `key`, and what it takes of the key's allowance.

    Raises BadRequestError for what this key may never ask, ApiError 429 for what it may not ask now.
    """
    _check_size(plan, key, info)
    if key is not None:
        _check_priority(plan, key)
        requests = tuple(replace(request, key_id=key.id, weight=key.weight) for request in plan.requests)
        plan = replace(plan, requests=requests)
    return plan, limiter.reserve(key, plan.num_prompt_tokens + sum(r.sampling.max_tokens for r in plan.requests))


def _check_priority(plan: CompletionPlan, key: ApiKey) -> None:
    priority = plan.requests[0].priority
    if priority < key.min_priority:
        message = f"'priority' must be at least {key.min_priority} with this API key, got {priority}"
        raise BadRequestError(message, param="priority")
    if priority > key.max_priority:
        message = f"'priority' must be at most {key.max_priority} with this API key, got {priority}"
        raise BadRequestError(message, param="priority")


def _check_size(plan: CompletionPlan, key: ApiKey | None, info: EngineInfo) -> None:
    """Refuses for good what the engine's queue could not hold even when empty; a key may have half of it."""
    if len(plan.requests) == 1:
        return
    part = 1 if key is None else 2
    if len(plan.requests) > info.max_num_requests // part:
        message = f"'n' times the number of prompts must be at most {info.max_num_requests // part}"
        raise BadRequestError(message, param="n")
    num_tokens = sum(request.max_num_tokens for request in plan.requests)
    if num_tokens > info.max_num_waiting_tokens // part:
        message = (
            f"the choices may come to {num_tokens} tokens, prompts and longest completions together; "
            f"at most {info.max_num_waiting_tokens // part} fit the queue"
        )
        raise BadRequestError(message, param="n")
