"""Executes a plan: gathers its tokens, runs the network over the memory cache, samples. Decides nothing."""

from __future__ import annotations

import torch

from model.cache import MemoryBatch, MemoryCache
from model.config import MosaicConfig
from model.kernels.kernel import Kernel
from service.engine.sampler import SamplingRow, sample
from service.engine.scheduler import ScheduledSequence, SchedulerOutput


class ModelRunner:
    """A network, as a kernel, with its memory cache.

    Ids at or beyond `tokenizer_vocab_size` of the model's config are padding of its embedding: never sampled.
    """

    def __init__(self, kernel: Kernel, cache: MemoryCache, config: MosaicConfig) -> None:
        self.kernel = kernel
        self.cache = cache
        self._num_sampled_ids = config.num_sampled_tokens
        self._eos_token_id = config.eos_token_id

    @torch.inference_mode()
    def execute(self, plan: SchedulerOutput) -> list[int | None]:
        """Absorbs the plan's tokens into the cache; returns the token sampled per scheduled sequence, or None."""
        logits = self.kernel.step(self._token_ids(plan), self._batch(plan))
        sampled = [i for i, item in enumerate(plan.scheduled) if item.is_sampled]
        result: list[int | None] = [None] * len(plan.scheduled)
        if sampled:
            rows = [self._sampling_row(plan.scheduled[i]) for i in sampled]
            for i, token_id in zip(sampled, sample(logits[sampled, : self._num_sampled_ids], rows), strict=True):
                result[i] = token_id
        return result

    def _token_ids(self, plan: SchedulerOutput) -> torch.Tensor:
        token_ids: list[int] = []
        for item in plan.scheduled:
            token_ids += item.sequence.token_ids[item.start : item.start + item.num_tokens]
        return torch.tensor(token_ids, device=self.cache.device)

    def _batch(self, plan: SchedulerOutput) -> MemoryBatch:
        sequences = [item.sequence for item in plan.scheduled]
        width = max(len(sequence.block_table) for sequence in sequences)
        tables = [s.block_table + [0] * (width - len(s.block_table)) for s in sequences]
        return MemoryBatch(
            cache=self.cache,
            slots=torch.tensor([sequence.slot for sequence in sequences], device=self.cache.device),
            block_tables=torch.tensor(tables, dtype=torch.int64, device=self.cache.device),
            num_computed=tuple(item.start for item in plan.scheduled),
            num_new=tuple(item.num_tokens for item in plan.scheduled),
        )

    def _sampling_row(self, item: ScheduledSequence) -> SamplingRow:
        params, position = item.sequence.request.sampling, item.sequence.num_output_tokens
        banned: tuple[int, ...] = ()
        if position + 1 < params.min_tokens:
            banned = params.stop_token_ids
            if self._eos_token_id is not None and not params.ignore_eos:
                banned = (*banned, self._eos_token_id)
        return SamplingRow(params, position, tuple(i for i in banned if i < self._num_sampled_ids))
