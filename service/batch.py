"""Answers a file of requests with an engine in this process. What was answered before is not asked again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from starlette.types import ASGIApp

from service.batch_file import BatchInput, BatchLine, BatchOutput
from service.engine.async_engine import AsyncEngine
from service.engine.local_client import LocalEngineClient
from service.errors import EngineStartError, InterruptedCommandError, UsageError
from service.gateway.app import create_app
from service.gateway.call import Answer, post_json
from service.gateway.http_server import ShutdownSignals
from service.interrupt import interruptible
from service.launcher import run_loop
from service.logs import configure_logging
from service.progress import Progress
from service.settings import ServeSettings
from service.startup import require_model, served_model, start_engine

# Requests in flight for each sequence that can run: so that one is always there to take a place that becomes free.
_REQUESTS_PER_SEQUENCE = 2
_REPORT_PERIOD_S = 10.0


@dataclass(slots=True)
class _Tally:
    """What was done so far, by this run."""

    num_requests: int = 0
    num_refused: int = 0
    num_tokens: int = 0

    def count(self, answer: Answer) -> None:
        self.num_requests += 1
        if answer.status == 200:
            self.num_tokens += orjson.loads(answer.body)["usage"]["completion_tokens"]
        else:
            self.num_refused += 1


def run_batch(settings: ServeSettings, source: Path, target: Path, progress: Progress) -> None:
    """Answers the requests of `source` that have no answer in `target`, and appends the answers there.

    A request that is wrong in itself is answered with its error, like any other. When the server is at fault, or the
    command is interrupted, nothing is written for what was not finished. Raises CommandError.
    """
    configure_logging("warning", settings.log_format)
    config = settings.engine_config()
    require_model(settings.model)
    requests = BatchInput(source)
    if target.exists() and source.samefile(target):
        raise UsageError(f"{target} is the file of requests: give another one for the answers")
    with BatchOutput(target) as answers:
        strange = answers.custom_ids - requests.custom_ids
        if strange:
            raise UsageError(f"{target} holds answers to other requests, such as {min(strange)!r}: choose another file")
        num_left = len(requests) - len(answers.custom_ids)
        if answers.custom_ids:
            progress.say(f"{len(answers.custom_ids)} of {len(requests)} requests are answered already.")
        if not num_left:
            return
        with interruptible(), progress.step(f"Loading {settings.model_name}"):
            engine = start_engine(config)
        run_loop(_answer_all(settings, engine, requests, answers, num_left, progress))


async def _answer_all(
    settings: ServeSettings,
    engine: AsyncEngine,
    requests: BatchInput,
    answers: BatchOutput,
    num_left: int,
    progress: Progress,
) -> None:
    engine.start()
    client = LocalEngineClient(engine)
    app = create_app(client, served_model(settings, engine.info), settings.gateway_settings())
    tally, started_s = _Tally(), time.monotonic()
    lines = requests.lines(without=set(answers.custom_ids))
    try:
        with ShutdownSignals() as signals, _shown(tally, num_left, progress) as show:
            workers = [
                asyncio.create_task(_work(app, lines, answers, tally, show))
                for _ in range(min(_REQUESTS_PER_SEQUENCE * settings.max_num_seqs, num_left))
            ]
            stop = asyncio.create_task(signals.stop.wait())
            await _until_done(workers, stop)
    finally:
        app.state.gateway.grammars.close()
        await client.close()
    seconds = time.monotonic() - started_s
    refused = f", {tally.num_refused} of them refused" if tally.num_refused else ""
    progress.say(
        f"{tally.num_requests} requests answered{refused}: {tally.num_tokens} tokens in {seconds:.1f} s "
        f"({tally.num_tokens / seconds:.0f} a second)."
    )
    if signals.stop.is_set():
        message = f"interrupted: {num_left - tally.num_requests} requests are left; the same command goes on with them"
        raise InterruptedCommandError(message)


async def _until_done(workers: list[asyncio.Task[None]], stop: asyncio.Task[bool]) -> None:
    """Waits for all workers, for one to fail, or for the signal to stop; then none runs any more."""
    everything = asyncio.gather(*workers)
    try:
        futures: list[asyncio.Future[Any]] = [everything, stop]
        await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
        if everything.done():
            stop.cancel()
            await everything
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(everything, *workers, return_exceptions=True)


async def _work(
    app: ASGIApp, lines: Iterator[BatchLine], answers: BatchOutput, tally: _Tally, show: Callable[[], None]
) -> None:
    # The iterator is shared: each line goes to whoever is free first.
    for line in lines:
        answer = await _ask(app, line)
        answers.write(line.custom_id, answer.status, answer.headers["x-request-id"], answer.body)
        tally.count(answer)
        show()


async def _ask(app: ASGIApp, line: BatchLine) -> Answer:
    """The answer to one request, asked again while the queue is full. Raises EngineStartError when the engine fails."""
    body = orjson.dumps(line.body)
    while True:
        answer = await post_json(app, line.url, body)
        if answer.status < 500:
            return answer
        error = orjson.loads(answer.body)["error"]
        if error["code"] != "overloaded":
            raise EngineStartError(f"request {line.custom_id!r} failed: {error['message']}")
        await asyncio.sleep(float(answer.headers.get("retry-after", 1)))


@contextlib.contextmanager
def _shown(tally: _Tally, total: int, progress: Progress) -> Iterator[Callable[[], None]]:
    """Yields what is to be called after every request: a bar on a terminal, else a line now and then."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield _Reporter(tally, total, progress).report
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("requests, {task.fields[tokens]} tokens"))
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total, tokens=0)
        yield lambda: bar.update(task, completed=tally.num_requests, tokens=tally.num_tokens)


class _Reporter:
    """Says at most once in a while how far it is."""

    def __init__(self, tally: _Tally, total: int, progress: Progress) -> None:
        self._tally, self._total, self._progress = tally, total, progress
        self._said_s = time.monotonic()

    def report(self) -> None:
        if time.monotonic() - self._said_s >= _REPORT_PERIOD_S:
            self._said_s = time.monotonic()
            self._progress.say(f"{self._tally.num_requests} of {self._total} requests, {self._tally.num_tokens} tokens")
