"""Executes a plan: gathers its tokens, runs the network over the memory cache, samples. Decides nothing."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from model.cache import MemoryBatch, MemoryCache
from model.config import MosaicV2Config, NetworkConfig
from model.kernels import cpu_sampling
from model.kernels.kernel import Kernel
from service.engine.constraints import Constraints, Restriction
from service.engine.logits import token_logprobs
from service.engine.request import SamplingParams, TokenLogprob
from service.engine.sampler import SamplingRow, sample
from service.engine.sequence import Sequence as SequenceState
from service.engine.step import ScheduledSequence, SchedulerOutput, StepOutput


class ModelRunner:
    """A network, as a kernel, with its memory cache.

    Ids at or beyond `tokenizer_vocab_size` of the model's config are padding of its embedding: never sampled.
    Without `constraints` no request may have a grammar. Blocks swap out of `cache` into `swap`, with their snapshots.
    """

    def __init__(
        self,
        kernel: Kernel,
        cache: MemoryCache,
        config: NetworkConfig,
        constraints: Constraints | None = None,
        swap: MemoryCache | None = None,
    ) -> None:
        self.kernel = kernel
        self.cache = cache
        self.swap = swap
        self._has_short_term = isinstance(config, MosaicV2Config)
        self._constraints = constraints
        self._num_sampled_ids = config.num_sampled_tokens
        self._eos_token_id = config.eos_token_id

    @torch.inference_mode()
    def execute(self, plan: SchedulerOutput, on_start: Callable[[], None] = lambda: None) -> StepOutput:
        """Absorbs the plan's tokens into the cache and samples where a sequence's last known token was among them.

        Calls `on_start` as the network begins to run.
        """
        self._move(plan)
        if not any(item.sequence.wants_prompt_logprobs for item in plan.scheduled):
            return self._sample(plan, self.kernel.step(self._token_ids(plan), self._batch(plan), on_start=on_start))
        # Of a sequence whose prompt is asked about the logits after every token, of the others those after the last.
        rows: list[int] = []
        starts, ends, first = [], [], 0
        for item in plan.scheduled:
            after = first + item.num_tokens
            starts.append(len(rows))
            rows += range(first if item.sequence.wants_prompt_logprobs else after - 1, after)
            ends.append(len(rows))
            first = after
        wanted = torch.tensor(rows)
        logits = self.kernel.step(self._token_ids(plan), self._batch(plan), rows=wanted, on_start=on_start)
        result = self._sample(plan, logits[[end - 1 for end in ends]])
        prompt_logprobs = {
            i: _prompt_logprobs(item, logits[start:end])
            for i, (item, start, end) in enumerate(zip(plan.scheduled, starts, ends, strict=True))
            if item.sequence.wants_prompt_logprobs
        }
        return replace(result, prompt_logprobs=prompt_logprobs)

    def _move(self, plan: SchedulerOutput) -> None:
        """Swaps and copies. Whatever is read is read before anything of the same kind is written."""
        leaving = None
        if plan.swap_outs:
            blocks, slots, out_places = zip(*plan.swap_outs, strict=True)
            leaving = self.cache.read(blocks, slots)
        if plan.block_copies:
            self.cache.copy_blocks(*zip(*plan.block_copies, strict=True))
        if plan.swap_ins and self.swap is not None:
            blocks, slots, places = zip(*plan.swap_ins, strict=True)
            self.cache.write(blocks, slots, self.swap.read(places, places))
        if leaving is not None and self.swap is not None:
            self.swap.write(out_places, out_places, leaving)
        if plan.slot_copies:
            self.cache.copy_slots(*zip(*plan.slot_copies, strict=True))

    def _sample(self, plan: SchedulerOutput, logits: Tensor) -> StepOutput:
        """`logits` [scheduled, vocab_size] after the last token of each scheduled sequence."""
        sampled = [i for i, item in enumerate(plan.scheduled) if item.is_sampled]
        token_ids: list[int | None] = [None] * len(plan.scheduled)
        if not sampled:
            return StepOutput(token_ids)
        # Where all sample, which is what decoding is, nothing is copied.
        logits = (
            logits[:, : self._num_sampled_ids]
            if len(sampled) == len(logits)
            else logits[sampled, : self._num_sampled_ids]
        )
        if all(plan.scheduled[i].sequence.is_plainly_greedy for i in sampled):
            for i, token_id in zip(sampled, cpu_sampling.argmax(logits), strict=True):
                token_ids[i] = token_id
            return StepOutput(token_ids)
        rows = [self._sampling_row(plan.scheduled[i]) for i in sampled]
        told = [n for n, row in enumerate(rows) if row.params.num_logprobs is not None]
        untouched = logits[told] if told else None
        restriction = self._restrict(logits, [plan.scheduled[i].sequence for i in sampled])
        drawn = sample(logits, rows)
        for i, token_id in zip(sampled, drawn, strict=True):
            token_ids[i] = token_id
        result = StepOutput(token_ids)
        if untouched is not None:
            logprobs = _logprobs(untouched, [drawn[n] for n in told], [rows[n].params for n in told])
            result = replace(result, logprobs={sampled[n]: p for n, p in zip(told, logprobs, strict=True)})
        if restriction is None:
            return result
        complete = {sampled[n] for n in restriction.advance(drawn)}
        failures = {sampled[n]: reason for n, reason in restriction.failures.items()}
        return replace(result, complete=complete, failures=failures)

    def _restrict(self, logits: Tensor, sequences: Sequence[SequenceState]) -> Restriction | None:
        """Holds the rows of `logits` to the grammars of their sequences, where any has one."""
        held = {n: s for n, s in enumerate(sequences) if s.request.sampling.grammar is not None}
        if not held:
            return None
        assert self._constraints is not None
        return self._constraints.restrict(logits, held)

    def _token_ids(self, plan: SchedulerOutput) -> Tensor:
        token_ids: list[int] = []
        for item in plan.scheduled:
            if item.num_tokens == 1:
                token_ids.append(item.sequence.token_ids[item.start])
            else:
                token_ids += item.sequence.token_ids[item.start : item.start + item.num_tokens]
        return self._tensor(token_ids)

    def _batch(self, plan: SchedulerOutput) -> MemoryBatch:
        sequences = [item.sequence for item in plan.scheduled]
        width = max(len(sequence.block_table) for sequence in sequences)
        return MemoryBatch(
            cache=self.cache,
            slots=self._tensor([sequence.slot or 0 for sequence in sequences]),
            block_tables=self._tables([s.block_table for s in sequences], width),
            num_computed=tuple(item.start for item in plan.scheduled),
            num_new=tuple(item.num_tokens for item in plan.scheduled),
            snapshots=self._snapshots(plan),
            short_tables=self._tables([s.short_table for s in sequences], width) if self._has_short_term else None,
        )

    def _tables(self, tables: Sequence[Sequence[int | None]], width: int) -> Tensor:
        """[sequences, width], with any block where there is none."""
        blocks: list[int] = []
        for table in tables:
            blocks += table if None not in table else [block or 0 for block in table]  # type: ignore[arg-type]
            blocks += (0,) * (width - len(table))
        return self._tensor(blocks).view(len(tables), width)

    def _tensor(self, numbers: list[int]) -> Tensor:
        if not numbers:
            return torch.empty(0, dtype=torch.int64, device=self.cache.device)
        # By way of an array, because torch looks at each item of a list.
        return torch.frombuffer(array("q", numbers), dtype=torch.int64).to(self.cache.device)

    def _snapshots(self, plan: SchedulerOutput) -> Tensor | None:
        if not any(item.snapshots for item in plan.scheduled):
            return None
        slots = [-1] * plan.num_tokens
        first = 0
        for item in plan.scheduled:
            for snapshot in item.snapshots:
                slots[first + snapshot.num_tokens - item.start - 1] = snapshot.slot
            first += item.num_tokens
        return self._tensor(slots)

    def _sampling_row(self, item: ScheduledSequence) -> SamplingRow:
        sequence = item.sequence
        params, position = sequence.request.sampling, sequence.num_output_tokens
        banned: tuple[int, ...] = ()
        if position + 1 < params.min_tokens:
            banned = params.stop_token_ids
            if self._eos_token_id is not None and not params.ignore_eos:
                banned = (*banned, self._eos_token_id)
        counts = sequence.counts() if params.has_penalty else None
        if params.bad_words is None:
            return SamplingRow(params, position, banned, counts=counts)
        prompt, output = sequence.request.prompt_token_ids, sequence.output_token_ids
        return SamplingRow(params, position, banned, prompt, output, counts)


def _prompt_logprobs(item: ScheduledSequence, logits: Tensor) -> tuple[TokenLogprob, ...]:
    """What `logits` [new tokens, vocab_size] say of the prompt tokens that the new tokens predict."""
    sequence = item.sequence
    last = min(item.start + item.num_tokens, sequence.num_prompt_tokens - 1)
    predicted = sequence.token_ids[item.start + 1 : last + 1]
    # A prompt may name ids that are never sampled: what the network thinks of them counts here.
    return token_logprobs(logits[: len(predicted)], predicted, sequence.request.sampling.num_prompt_logprobs or 0)


def _logprobs(logits: Tensor, token_ids: list[int], params: Sequence[SamplingParams]) -> list[TokenLogprob]:
    """What `logits` [rows, vocab] say of the drawn tokens, each with the alternatives that its request asked for."""
    others = {i: p.logprob_token_ids for i, p in enumerate(params) if p.logprob_token_ids}
    counts = [len(p.logprob_token_ids) or p.num_logprobs or 0 for p in params]
    most = max((n for i, n in enumerate(counts) if i not in others), default=0)
    told = token_logprobs(logits, token_ids, most, others)
    return [TokenLogprob(t.token_id, t.logprob, t.rank, t.top[:n]) for t, n in zip(told, counts, strict=True)]
