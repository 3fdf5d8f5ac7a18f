"""A runner without a network: the next token is a pure function of the tokens absorbed so far."""

from __future__ import annotations

import zlib
from collections.abc import Callable

from service.engine.block_manager import BlockManager
from service.engine.engine import Engine
from service.engine.request import Request, SamplingParams
from service.engine.scheduler import Scheduler, SchedulerConfig, SchedulerOutput, StepOutput

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
    """Keeps, per slot, the tokens it was really given: a plan that skips, repeats or mixes up tokens shows."""

    def __init__(self, on_step: Callable[[], None] = lambda: None) -> None:
        self.absorbed: dict[int, list[int]] = {}
        self.max_tokens_seen = 0
        self.on_step = on_step

    def execute(self, plan: SchedulerOutput) -> StepOutput:
        self.on_step()
        self.max_tokens_seen = max(self.max_tokens_seen, plan.num_tokens)
        result: list[int | None] = []
        for item in plan.scheduled:
            sequence = item.sequence
            assert sequence.slot is not None
            if item.start == 0:
                self.absorbed[sequence.slot] = []
            tokens = self.absorbed[sequence.slot]
            assert len(tokens) == item.start
            tokens += sequence.token_ids[item.start : item.start + item.num_tokens]
            result.append(next_token(tokens) if item.is_sampled else None)
        return StepOutput(result)


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
) -> Scheduler:
    config = SchedulerConfig(max_num_seqs, max_num_batched_tokens, max_model_len, VOCAB_SIZE, EOS)
    return Scheduler(config, BlockManager(num_blocks, block_size, max_num_seqs), clock or Clock())


def make_engine(scheduler: Scheduler | None = None, on_step: Callable[[], None] = lambda: None) -> Engine:
    return Engine(scheduler or make_scheduler(), ScriptedRunner(on_step))


def make_request(
    request_id: str, prompt: tuple[int, ...] = (1, 2, 3), max_tokens: int = 8, **sampling: object
) -> Request:
    output = sampling.pop("output_token_ids", ())
    params = SamplingParams(max_tokens=max_tokens, **sampling)  # type: ignore[arg-type]
    return Request(request_id, prompt, params, output)  # type: ignore[arg-type]
