"""A runner without a network: the next token is a pure function of the tokens absorbed so far."""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from service.engine.block_manager import BlockManager
from service.engine.engine import Engine
from service.engine.request import Request, RequestOutput, SamplingParams
from service.engine.scheduler import Scheduler, SchedulerConfig
from service.engine.sequence import Sequence
from service.engine.short_term import ShortTermBlocks
from service.engine.step import ScheduledSequence, SchedulerOutput, StepOutput

VOCAB_SIZE = 50
EOS = 0


def next_token(token_ids: list[int]) -> int:
    return zlib.crc32(bytes(token_ids)) % VOCAB_SIZE


def continuation(request: Request, eos: int | None = EOS) -> list[int]:
    """What the scripted runner must produce for `request`, worked out alone and in one go."""
    tokens = [*request.prompt_token_ids, *request.output_token_ids]
    sampling, generated = request.sampling, list(request.output_token_ids)
    while len(generated) < sampling.max_tokens:
        token = next_token(tokens)
        tokens.append(token)
        generated.append(token)
        is_stop = (token == eos and not sampling.ignore_eos) or token in sampling.stop_token_ids
        if is_stop and len(generated) >= sampling.min_tokens:
            break
    return generated[len(request.output_token_ids) :]


class ScriptedRunner:
    """Keeps, per slot, the tokens it was really given, and, per place in a block, the text whose pair lies there.

    A plan that skips, repeats or mixes up tokens shows, and so does one that shares, copies or reuses what it may not.
    With a `window` it has a short-term memory too.
    """

    def __init__(
        self, block_size: int = 4, on_step: Callable[[], None] = lambda: None, window: int | None = None
    ) -> None:
        self.block_size = block_size
        self.window = window
        self.absorbed: dict[int, list[int]] = {}
        self.pairs: dict[int, dict[int, list[int]]] = defaultdict(dict)
        self.swapped: dict[int, tuple[dict[int, list[int]], list[int]]] = {}
        self.num_computed: Counter[str] = Counter()
        self.max_tokens_seen = 0
        self.on_step = on_step

    def execute(self, plan: SchedulerOutput, on_start: Callable[[], None] = lambda: None) -> StepOutput:
        on_start()
        self.on_step()
        self.max_tokens_seen = max(self.max_tokens_seen, plan.num_tokens)
        leaving = {s.place: (dict(self.pairs[s.block]), list(self.absorbed[s.slot])) for s in plan.swap_outs}
        self.pairs.update({target: dict(self.pairs[source]) for source, target in plan.block_copies})
        for swap in plan.swap_ins:
            pairs, absorbed = self.swapped[swap.place]
            self.pairs[swap.block], self.absorbed[swap.slot] = dict(pairs), list(absorbed)
        self.swapped.update(leaving)
        self.absorbed.update({target: list(self.absorbed[source]) for source, target in plan.slot_copies})
        for item in plan.scheduled:
            self._absorb(item)
        for item in plan.scheduled:  # after all have written, so that nobody wrote into what another reads
            self._check_pairs(item)
        ends = [self.absorbed[item.sequence.slot or 0] if item.is_sampled else None for item in plan.scheduled]
        return StepOutput([None if tokens is None else next_token(tokens) for tokens in ends])

    def _absorb(self, item: ScheduledSequence) -> None:
        sequence = item.sequence
        assert sequence.slot is not None
        if item.start == 0:
            self.absorbed[sequence.slot] = []
        tokens = self.absorbed[sequence.slot]
        assert tokens == sequence.token_ids[: item.start]
        kept = {snapshot.num_tokens: snapshot.slot for snapshot in item.snapshots}
        assert len(kept) == len(item.snapshots)
        for token in sequence.token_ids[item.start : item.start + item.num_tokens]:
            tokens.append(token)
            if len(tokens) > 1:
                for table in self._tables(sequence):
                    block, place = self._place(table, len(tokens) - 2)
                    self.pairs[block][place] = list(tokens)
            if (slot := kept.pop(len(tokens), None)) is not None:
                self.absorbed[slot] = list(tokens)
        assert not kept, "snapshots of tokens that were not absorbed"
        self.num_computed[sequence.request_id] += item.num_tokens

    def _check_pairs(self, item: ScheduledSequence) -> None:
        tokens, end = item.sequence.token_ids, item.start + item.num_tokens - 1
        for table in self._tables(item.sequence):
            is_short = table is item.sequence.short_table
            for pair in range(max(item.start - self.window, 0) if is_short and self.window else 0, end):
                block, place = self._place(table, pair)
                assert self.pairs[block][place] == tokens[: pair + 2], "another text's pair"

    def _tables(self, sequence: Sequence) -> list[SequenceOf[int | None]]:
        return [sequence.block_table] if self.window is None else [sequence.block_table, sequence.short_table]

    def _place(self, table: SequenceOf[int | None], pair: int) -> tuple[int, int]:
        index, place = divmod(pair, self.block_size)
        block = table[index]
        assert block is not None, "a block that was let go"
        return block, place


class Clock:
    """A clock that moves only when told."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1e-6
        return self.now_s


def make_scheduler(
    *,
    num_blocks: int = 16,
    block_size: int = 4,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 16,
    max_model_len: int = 32,
    clock: Callable[[], float] | None = None,
    has_prefix_cache: bool = True,
    window: int | None = None,
    spare_short_blocks: int = 0,
    num_swap_blocks: int = 0,
) -> Scheduler:
    """With a `window` there are short-term blocks as well: as many as any step needs, and some to spare."""
    config = SchedulerConfig(max_num_seqs, max_num_batched_tokens, max_model_len, VOCAB_SIZE, EOS)
    short_term = None
    if window is not None:
        needed = ShortTermBlocks.num_needed(
            window, block_size, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens
        )
        short_term = ShortTermBlocks(num_blocks, needed + spare_short_blocks, block_size, window)
    blocks = BlockManager(
        num_blocks,
        block_size,
        max_num_seqs,
        has_prefix_cache=has_prefix_cache,
        short_term=short_term,
        num_swap_blocks=num_swap_blocks,
    )
    return Scheduler(config, blocks, clock or Clock())


def make_engine(scheduler: Scheduler | None = None, on_step: Callable[[], None] = lambda: None) -> Engine:
    scheduler = scheduler or make_scheduler()
    short_term = scheduler.blocks.short_term
    window = None if short_term is None else short_term.window
    return Engine(scheduler, ScriptedRunner(scheduler.blocks.block_size, on_step, window))


def make_request(
    request_id: str, prompt: tuple[int, ...] = (1, 2, 3), max_tokens: int = 8, **sampling: object
) -> Request:
    output = sampling.pop("output_token_ids", ())
    params = SamplingParams(max_tokens=max_tokens, **sampling)  # type: ignore[arg-type]
    return Request(request_id, prompt, params, output)  # type: ignore[arg-type]


def run(engine: Engine, *requests: Request) -> dict[str, list[RequestOutput]]:
    """Adds them all at once and steps until everything has ended."""
    for request in requests:
        engine.add_request(request)
    outputs: dict[str, list[RequestOutput]] = defaultdict(list)
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
        engine.scheduler.check_integrity()
    for request in requests:
        ids = [token for output in outputs[request.request_id] for token in output.new_token_ids]
        assert ids == continuation(request)
    return outputs
