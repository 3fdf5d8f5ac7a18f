"""The tokens that an engine has still to compute for what it has accepted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from service.engine.record import RequestRecord
from service.engine.request import Request

# Requests that ended, of which is learnt how much of what was allowed is used.
NUM_RECORDS = 64


@dataclass(frozen=True, slots=True)
class Backlog:
    """Tokens still to be computed, of requests that wait and of requests that run, prompts and completions apart.

    Completions count as long as requests that ended lately have become, in proportion to what they were allowed: many
    are allowed far more than they use.
    """

    queued_prompt: float = 0.0
    queued_generation: float = 0.0
    running_prompt: float = 0.0
    running_generation: float = 0.0

    @property
    def queued(self) -> int:
        return round(self.queued_prompt + self.queued_generation)

    @property
    def running(self) -> int:
        return round(self.running_prompt + self.running_generation)

    @property
    def prompt(self) -> float:
        return self.queued_prompt + self.running_prompt

    @property
    def generation(self) -> float:
        return self.queued_generation + self.running_generation


def measure(live: Iterable[Request], computed: Mapping[str, int], used_share: float) -> Backlog:
    """Of the requests accepted and not ended; `computed` has the tokens absorbed of each that runs, by its id.

    `used_share` is how much of its allowance a completion comes to.
    """
    queued_prompt = queued_generation = running_prompt = running_generation = 0.0
    for request in live:
        num_prompt = len(request.prompt_token_ids) + len(request.output_token_ids)
        num_allowed = request.sampling.max_tokens - len(request.output_token_ids)
        num_expected = num_allowed * used_share
        num_computed = computed.get(request.request_id)
        if num_computed is None:
            queued_prompt += num_prompt
            queued_generation += num_expected
            continue
        running_prompt += max(num_prompt - num_computed, 0)
        # One that has outlived what was expected of it is about to end, as far as anybody knows.
        num_generated = max(num_computed - num_prompt, 0)
        running_generation += max(num_expected - num_generated, min(num_allowed - num_generated, 1), 0)
    return Backlog(queued_prompt, queued_generation, running_prompt, running_generation)


def used_share(records: Iterable[RequestRecord]) -> float:
    """How much of the completions they were allowed requests that ended have used, 0 to 1; 1 where none has."""
    allowed = used = 0
    for record in records:
        allowed += record.max_tokens
        used += record.num_output_tokens
    return used / allowed if allowed else 1.0
