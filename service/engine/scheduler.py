"""Which tokens of which sequences the next step absorbs. Integers only: policy never sees a tensor."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from service.engine.block_manager import BlockManager
from service.engine.errors import RequestRejectedError
from service.engine.prefix_cache import CachedPrefix
from service.engine.record import RequestRecord, record_of
from service.engine.request import FinishReason, Request, RequestOutput, TokenLogprob
from service.engine.sequence import RequestStatus, Sequence
from service.engine.step import Draft, ScheduledSequence, SchedulerOutput, StepOutput
from service.engine.waiting_queue import WaitingQueue

# Requests that have ended and are still told of, to whoever looks into the engine.
_MAX_RECORDS = 2048


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one scheduler. `eos_token_id` ends a request unless it says otherwise."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    vocab_size: int
    eos_token_id: int | None = None


class Scheduler:
    """Continuous batching; who is admitted next is the waiting queue's affair.

    Every running sequence that lacks one token decodes; what is left of the token budget goes to prompts, in chunks,
    and then to new sequences. A sequence begins after the longest prefix that is in memory; while another is just
    absorbing what it needs, it holds back, to go on from there. When blocks run out the running sequence admitted last
    is preempted: it lets its memory go, keeps its tokens, and absorbs again later what has been evicted by then, before
    anything new is admitted. So all running sequences were admitted before all preempted ones: the most senior always
    advances, and every request that is admitted ends.
    """

    def __init__(
        self, config: SchedulerConfig, blocks: BlockManager, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if blocks.num_blocks_for(config.max_model_len) > blocks.num_blocks:
            raise ValueError(
                f"{blocks.num_blocks} blocks of {blocks.block_size} pairs cannot hold one sequence of "
                f"max_model_len {config.max_model_len}"
            )
        if config.max_num_batched_tokens < config.max_num_seqs:
            raise ValueError("max_num_batched_tokens must be at least max_num_seqs")
        self.config = config
        self.blocks = blocks
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_resumptions = 0
        self.finished: deque[RequestRecord] = deque(maxlen=_MAX_RECORDS)
        self._clock = clock
        self._timed: dict[str, Sequence] = {}
        # No deadline is earlier; so a step most often asks one number, not every request.
        self._next_deadline_s = math.inf
        # Free blocks that admission leaves alone, so that a newcomer does not at once preempt or get preempted.
        self._watermark = blocks.num_blocks // 100

    @property
    def has_work(self) -> bool:
        return bool(self.running) or len(self.waiting) > 0

    def validate(self, request: Request) -> None:
        """Raises RequestRejectedError when `request` could never run here. Reads constants only: any thread may ask."""
        num_prompt, sampling = len(request.prompt_token_ids), request.sampling
        if num_prompt == 0:
            raise RequestRejectedError("the prompt has no tokens")
        is_scoring = sampling.max_tokens == 0 and not request.output_token_ids
        if sampling.max_tokens <= len(request.output_token_ids) and not is_scoring:
            raise RequestRejectedError(f"max_tokens is {sampling.max_tokens}: nothing is left to generate")
        if num_prompt + sampling.max_tokens > self.config.max_model_len:
            raise RequestRejectedError(
                f"the prompt has {num_prompt} tokens and max_tokens is {sampling.max_tokens}: together they exceed "
                f"the model's limit of {self.config.max_model_len} tokens"
            )
        token_ids = (*request.prompt_token_ids, *request.output_token_ids, *sampling.mentioned_token_ids)
        if min(token_ids) < 0 or max(token_ids) >= self.config.vocab_size:
            raise RequestRejectedError(f"token ids must be in 0..{self.config.vocab_size - 1}")

    def add(self, request: Request) -> None:
        """Queues `request`. Raises RequestRejectedError when it could never run here."""
        self.validate(request)
        sequence = Sequence(request, self._clock())
        self.waiting.append(sequence)
        if request.timeout_s is not None:
            self._timed[request.request_id] = sequence
            self._next_deadline_s = min(self._next_deadline_s, sequence.deadline_s)

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request wherever it is and frees its memory; None when it is not here (any more)."""
        for sequence in (*self.running, *self.waiting):
            if sequence.request_id == request_id:
                self._take_out(sequence)
                return self._finish(sequence, FinishReason.ABORT)
        return None

    def expire(self) -> list[RequestOutput]:
        """Ends the requests whose time is up, running or waiting, and frees their memory."""
        if not self._timed:
            return []
        now_s = self._clock()
        if now_s < self._next_deadline_s:
            return []
        late = [sequence for sequence in self._timed.values() if sequence.deadline_s <= now_s]
        for sequence in late:
            self._take_out(sequence)
        outputs = [self._finish(sequence, FinishReason.DEADLINE) for sequence in late]
        self._next_deadline_s = min((sequence.deadline_s for sequence in self._timed.values()), default=math.inf)
        return outputs

    def _take_out(self, sequence: Sequence) -> None:
        if sequence.status is RequestStatus.RUNNING:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(self) -> SchedulerOutput:
        """Plans the next step: takes memory for it, moves sequences between waiting and running."""
        draft = Draft(self.config.max_num_batched_tokens)
        can_admit = self._schedule_decodes(draft)
        for sequence in self.running:
            if sequence.num_uncomputed_tokens > 1 and draft.budget > 0:
                can_admit &= self._schedule_prompt(draft, sequence)
        if can_admit:
            self._admit(draft)
        return draft.finish(self.blocks.swap_pool)

    def _schedule_decodes(self, draft: Draft) -> bool:
        """False where somebody had to be preempted."""
        has_preempted = False
        for sequence in list(self.running):
            if sequence.num_uncomputed_tokens != 1 or sequence.status is not RequestStatus.RUNNING:
                continue
            while not self.blocks.can_grow(sequence, sequence.num_tokens):
                has_preempted = True
                if self._preempt_last() is sequence:
                    break
            else:
                self.blocks.grow(sequence, sequence.num_tokens)
                self._append_chunk(draft, sequence)
        return not has_preempted

    def _preempt_last(self) -> Sequence:
        # Decodes are planned in the order of admission, so the last is never one already in the plan.
        victim = self.running.pop()
        self.blocks.release(victim)
        victim.rewind()
        self.waiting.put_back(victim)
        victim.num_preemptions += 1
        self.num_preemptions += 1
        return victim

    def _schedule_prompt(self, draft: Draft, sequence: Sequence) -> bool:
        """The next chunk of a running sequence. False where there is no memory for it to begin."""
        if sequence.num_computed_tokens == 0:  # it has held back
            prefix = self.blocks.find(sequence)
            if prefix.is_growing:
                return True
            if not self.blocks.can_begin(sequence, prefix):
                return False
            self._begin(draft, sequence, prefix)
        self._append_chunk(draft, sequence)
        return True

    def _admit(self, draft: Draft) -> None:
        while draft.budget > 0 and len(self.running) < self.config.max_num_seqs and (sequence := self.waiting.head):
            reserve = self._watermark if self.running else 0
            prefix = self.blocks.find(sequence)
            can_begin = prefix.is_growing or self.blocks.can_begin(sequence, prefix, reserve)
            if not (self.blocks.num_free_slots and can_begin):
                return
            self.waiting.take()
            self.blocks.take_slot(sequence)
            sequence.status = RequestStatus.RUNNING
            if sequence.first_scheduled_s is None:
                sequence.first_scheduled_s = self._clock()
            else:
                self.num_resumptions += 1
            self.running.append(sequence)
            if not prefix.is_growing:
                self._begin(draft, sequence, prefix)
                self._append_chunk(draft, sequence)

    def _begin(self, draft: Draft, sequence: Sequence, prefix: CachedPrefix) -> None:
        # All blocks of the tokens known so far are taken at once: a half-begun prompt could deadlock others.
        draft.block_copies += self.blocks.begin(sequence, prefix)
        sequence.skip(prefix.num_tokens)
        if sequence.num_preemptions == 0:
            # All at once, before the next is chosen. What a preemption makes absorb again is not charged again.
            self.waiting.charge(sequence, sequence.num_uncomputed_tokens)
        if prefix.snapshot is not None:
            assert sequence.slot is not None
            draft.slot_copies.append((prefix.snapshot.slot, sequence.slot))

    def _append_chunk(self, draft: Draft, sequence: Sequence) -> None:
        start, num_tokens = sequence.num_computed_tokens, min(sequence.num_uncomputed_tokens, draft.budget)
        is_sampled = num_tokens == sequence.num_uncomputed_tokens
        self.blocks.reach(sequence, start + num_tokens)
        snapshots = self.blocks.prefix_cache.snapshots(sequence, start, start + num_tokens)
        draft.scheduled.append(ScheduledSequence(sequence, start, num_tokens, is_sampled, snapshots))
        draft.budget -= num_tokens
        if start < sequence.num_prompt_tokens:
            draft.num_prompt_tokens += min(num_tokens, sequence.num_prompt_tokens - start)

    def update_from_output(self, plan: SchedulerOutput, step: StepOutput) -> list[RequestOutput]:
        """Books what a step did."""
        now_s = self._clock()
        outputs = []
        for i, (item, token_id) in enumerate(zip(plan.scheduled, step.token_ids, strict=True)):
            sequence = item.sequence
            sequence.num_computed_tokens += item.num_tokens
            self.blocks.book(sequence, item.snapshots)
            if i in step.prompt_logprobs:
                sequence.prompt_logprobs += step.prompt_logprobs[i]
            if i in step.failures:
                outputs.append(self._finish(sequence, FinishReason.ERROR)._replace(error=step.failures[i]))
            elif token_id is not None:
                outputs.append(self._advance(sequence, token_id, step.logprobs.get(i), now_s, i in step.complete))
        if any(output.is_finished for output in outputs):
            self.running = [s for s in self.running if s.status is RequestStatus.RUNNING]
        return outputs

    def _advance(
        self, sequence: Sequence, token_id: int, logprob: TokenLogprob | None, now_s: float, is_complete: bool
    ) -> RequestOutput:
        is_first = sequence.first_token_s is None
        prompt_logprobs = sequence.take_prompt_logprobs() if is_first else None
        if sequence.request.sampling.max_tokens == 0:  # only the prompt was of interest
            end = self._finish(sequence, FinishReason.LENGTH)
            num_cached_tokens = sequence.num_cached_tokens or 0
            return end._replace(prompt_logprobs=prompt_logprobs, num_cached_tokens=num_cached_tokens)
        sequence.append(token_id, now_s, self.config.eos_token_id, is_complete=is_complete)
        self.waiting.charge(sequence, 1)
        output = RequestOutput(
            sequence.request_id,
            (token_id,),
            timing=sequence.timing(now_s) if is_first else None,
            logprobs=() if logprob is None else (logprob,),
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=sequence.num_cached_tokens or 0 if is_first else 0,
        )
        if sequence.finish_reason is None:
            return output
        end = self._finish(sequence, sequence.finish_reason)
        return output._replace(finish_reason=end.finish_reason, stop_token_id=end.stop_token_id, timing=end.timing)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> RequestOutput:
        sequence.status = RequestStatus.FINISHED
        sequence.finish_reason = reason
        self.blocks.release(sequence)
        self.waiting.forget(sequence)
        self._timed.pop(sequence.request_id, None)
        now_s = self._clock()
        self.finished.append(record_of(sequence, now_s))
        return RequestOutput(
            sequence.request_id,
            finish_reason=reason,
            stop_token_id=sequence.stop_token_id,
            timing=sequence.timing(now_s),
        )

    def check_integrity(self) -> None:
        """Raises AssertionError when an invariant of queues or memory is broken. For tests, after every step."""
        self.blocks.check_integrity(self.running)
        assert len(self.running) <= self.config.max_num_seqs
        for sequence in self.running:
            assert sequence.status is RequestStatus.RUNNING
            assert sequence.slot is not None
            assert 0 <= sequence.num_computed_tokens < sequence.num_tokens <= self.config.max_model_len
            assert len(sequence.block_table) >= self.blocks.num_blocks_for(sequence.num_computed_tokens)
            assert len(sequence.block_table) <= self.blocks.num_blocks_for(sequence.num_tokens)
        for sequence in self.waiting:
            assert sequence.status is RequestStatus.WAITING
            assert sequence.num_computed_tokens == 0
            assert not sequence.block_table
            assert sequence.slot is None
        live = {s.request_id for s in (*self.running, *self.waiting) if s.request.timeout_s is not None}
        assert self._timed.keys() == live, "a request outlives its deadline, or its deadline outlives it"
        assert all(s.deadline_s >= self._next_deadline_s for s in self._timed.values()), "a deadline is not waited for"
        self.waiting.check_integrity()
        admitted = [s.seniority for s in (*self.running, *self.waiting) if s.seniority is not None]
        assert len(admitted) >= len(self.running)
        assert admitted == sorted(set(admitted)), "somebody runs who was admitted after somebody preempted"
