"""Continues one text on the terminal, with an engine in this process."""

from __future__ import annotations

import asyncio
import math
import os
import secrets
import sys
from contextlib import aclosing
from dataclasses import dataclass, replace

from model.detokenizer import IncrementalDetokenizer
from model.tokenizer import Tokenizer
from service.engine.async_engine import AsyncEngine
from service.engine.local_client import LocalEngineClient
from service.engine.request import Request, SamplingParams
from service.errors import CommandError, EngineStartError, ModelNotFoundError, UsageError
from service.interrupt import interruptible
from service.progress import Progress
from service.settings import ServeSettings, flag
from service.startup import check_tokenizer, explained, require_model, start_engine


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to continue, as asked on the command line."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int | None
    ignore_eos: bool

    def params(self, room: int) -> SamplingParams:
        """As the engine wants it. `room` is how many tokens the model still has place for. Raises UsageError."""
        for name in ("temperature", "top_p", "min_p"):
            if not math.isfinite(getattr(self, name)):
                raise UsageError(f"{flag(name)}: must be a finite number")
        return SamplingParams(
            max_tokens=min(self.max_tokens, room),
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=secrets.randbits(63) if self.seed is None else self.seed,
            ignore_eos=self.ignore_eos,
        )


def generate_text(settings: ServeSettings, prompt: str, sampling: Sampling) -> None:
    """Writes the continuation of `prompt` to stdout as it comes; on a terminal, after the prompt itself.

    Raises CommandError.
    """
    config = replace(settings.engine_config(), max_num_seqs=1, max_num_waiting=0)
    require_model(settings.model)
    tokenizer, prompt_ids = _tokenize(settings, prompt)
    with interruptible(), Progress(is_quiet=not sys.stderr.isatty()).step(f"Loading {settings.model_name}"):
        engine = start_engine(config)
        with explained():
            check_tokenizer(tokenizer, engine.info)
    room = engine.info.max_model_len - len(prompt_ids)
    if room < 1:
        raise UsageError(
            f"the prompt has {len(prompt_ids)} tokens and the model's limit is {engine.info.max_model_len}: "
            "shorten it, or raise --max-model-len"
        )
    request = Request("terminal", tuple(prompt_ids), sampling.params(room))
    try:
        _write(prompt if sys.stdout.isatty() else "")
        asyncio.run(_stream(engine, request, IncrementalDetokenizer(tokenizer)))
        _write("\n")
    except BrokenPipeError:
        # The reader has seen enough. What is still buffered must not fail again when the interpreter exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tokenize(settings: ServeSettings, prompt: str) -> tuple[Tokenizer, list[int]]:
    try:
        tokenizer = Tokenizer.load(settings.model)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"cannot load the tokenizer: {error}") from error
    if tokenizer is None:
        raise CommandError(f"{settings.model} has no tokenizer.json: it can be served for token ids, not for text")
    try:
        prompt_ids = tokenizer.encode(prompt)
    except ValueError as error:
        raise UsageError(f"the prompt cannot be encoded: {error}") from error
    if not prompt_ids:
        raise UsageError("the prompt is empty: the model needs at least one token to continue")
    return tokenizer, prompt_ids


async def _stream(engine: AsyncEngine, request: Request, detokenizer: IncrementalDetokenizer) -> None:
    engine.start()
    client = LocalEngineClient(engine)
    try:
        async with aclosing(client.generate(request)) as outputs:
            async for output in outputs:
                if output.error:
                    raise EngineStartError(output.error)
                _write(detokenizer.push(output.new_token_ids))
        _write(detokenizer.flush())
    finally:
        await client.close()


def _write(text: str) -> None:
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()
