"""What one engine step is to do, and what came of it: all that scheduler and runner tell each other."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import NamedTuple

from service.engine.prefix_cache import StateSnapshot
from service.engine.request import TokenLogprob
from service.engine.sequence import Sequence
from service.engine.swap_pool import Swap, SwapPool


class ScheduledSequence(NamedTuple):
    """Tokens [start, start + num_tokens) of `sequence`; `is_sampled` when the last known token is among them.

    `snapshots` are states on the way that are to be kept. A tuple, because one is made for every token.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    is_sampled: bool
    snapshots: tuple[StateSnapshot, ...] = ()


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """The plan of one step, at most `max_num_batched_tokens` tokens, each sequence at most once. Of its `num_tokens`,
    `num_prompt_tokens` are of prompts.

    Before anything else, blocks are swapped out and in, and blocks and state slots are copied (from, to). All this
    reads blocks as they were before it, and slots as they are after the swaps.
    """

    scheduled: tuple[ScheduledSequence, ...]
    num_tokens: int
    num_prompt_tokens: int
    swap_outs: tuple[Swap, ...] = ()
    swap_ins: tuple[Swap, ...] = ()
    block_copies: tuple[tuple[int, int], ...] = ()
    slot_copies: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What executing a plan gave, by index into `scheduled`.

    `token_ids` are the sampled tokens, None where none was; `logprobs` and `prompt_logprobs` are there where asked for,
    the latter for the prompt tokens that this step's tokens predicted. With its token, a text in `complete` is all that
    its grammar allows; for one in `failures` nothing could be drawn, for the reason given.
    """

    token_ids: SequenceOf[int | None]
    logprobs: Mapping[int, TokenLogprob] = field(default_factory=dict)
    prompt_logprobs: Mapping[int, tuple[TokenLogprob, ...]] = field(default_factory=dict)
    complete: AbstractSet[int] = frozenset()
    failures: Mapping[int, str] = field(default_factory=dict)


@dataclass(slots=True)
class Draft:
    """A plan in the making, of `limit` tokens at most, and the `budget` that is left of them."""

    limit: int
    budget: int = field(init=False)
    num_prompt_tokens: int = 0
    scheduled: list[ScheduledSequence] = field(default_factory=list)
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    slot_copies: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.budget = self.limit

    def finish(self, swap_pool: SwapPool) -> SchedulerOutput:
        # A plan without sequences is not executed: what is to be swapped then waits for the next.
        outs, ins = swap_pool.take() if self.scheduled else ((), ())
        return SchedulerOutput(
            tuple(self.scheduled),
            self.limit - self.budget,
            self.num_prompt_tokens,
            outs,
            ins,
            tuple(self.block_copies),
            tuple(self.slot_copies),
        )
