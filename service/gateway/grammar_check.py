"""Whether a grammar can be followed, found out in a process of its own before a request is accepted."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import orjson

from service.engine.grammar import Grammar
from service.gateway.errors import ApiError, BadRequestError
from service.gateway.grammar_fields import AskedGrammar

# On a machine with more to do than it has processors, the two seconds of the worker's own time take longer.
_TIMEOUT_S = 20.0
_MAX_REMEMBERED = 256
_MAX_WAITING = 32
# How the worker ends by its own limits. Other ends tell of the machine and not of the grammar.
_ENDINGS: Mapping[int, str] = {
    signal.SIGXCPU: "it takes too long to compile",
    signal.SIGABRT: "it takes too much memory",
    signal.SIGSEGV: "it is nested too deeply",
}


class GrammarChecker:
    """Asks one worker, which is started when the first grammar comes and again whenever one has killed it.

    Verdicts are remembered, so a grammar that is sent again costs nothing; whoever sends one that is being checked
    waits for the same verdict. All methods are called on one asyncio loop.
    """

    def __init__(self, read_tokens: Callable[[], Sequence[bytes]]) -> None:
        """`read_tokens` gives the bytes of every id that may be generated; see `GrammarCompiler`."""
        self._read_tokens = read_tokens
        self._verdicts: OrderedDict[bytes, str | None] = OrderedDict()
        self._pending: dict[bytes, asyncio.Future[str | None]] = {}
        self._worker: _Worker | None = None
        # Its own: in the loop's threads, others would wait for slow grammars.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar-check")

    async def check(self, asked: AskedGrammar) -> None:
        """Raises BadRequestError naming the parameter, or ApiError 503 where no verdict can be had now."""
        param, grammar = asked
        fault = await self._find_out(grammar)
        if fault is not None:
            raise BadRequestError(f"'{param}' cannot be followed: {fault}", param=param, code="invalid_grammar")

    def close(self) -> None:
        """Ends the worker and the thread. For when nobody waits any more."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._worker is not None:
            self._worker.kill()

    async def _find_out(self, grammar: Grammar) -> str | None:
        key = hashlib.blake2b(f"{grammar.kind}:{grammar.source}".encode()).digest()
        if key in self._verdicts:
            self._verdicts.move_to_end(key)
            return self._verdicts[key]
        if key not in self._pending:
            if len(self._pending) >= _MAX_WAITING:
                raise _overloaded(f"{_MAX_WAITING} other grammars wait to be compiled")
            asking = asyncio.get_running_loop().run_in_executor(self._thread, self._ask, grammar)
            self._pending[key] = asking
            asking.add_done_callback(partial(self._remember, key))
        return await asyncio.shield(self._pending[key])

    def _remember(self, key: bytes, asked: asyncio.Future[str | None]) -> None:
        del self._pending[key]
        if asked.cancelled() or asked.exception() is not None:
            return
        self._verdicts[key] = asked.result()
        while len(self._verdicts) > _MAX_REMEMBERED:
            self._verdicts.popitem(last=False)

    def _ask(self, grammar: Grammar) -> str | None:
        """Runs in the thread."""
        if self._worker is None:
            self._worker = _Worker(self._read_tokens())
        try:
            return self._worker.ask(grammar)
        except _WorkerDiedError as death:
            self._worker = None
            return str(death)
        except BaseException:
            self._worker = None
            raise


def _overloaded(message: str) -> ApiError:
    return ApiError(503, message, code="overloaded", headers={"Retry-After": "1"})


def _environment() -> dict[str, str]:
    """What it takes to find this package, and none of the secrets that an environment may hold."""
    kept = {name: value for name, value in os.environ.items() if name == "LD_LIBRARY_PATH"}
    return kept | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


class _WorkerDiedError(Exception):
    """A grammar took the worker to one of its limits; the message says which."""


class _Worker:
    """The process, and a line to it. For one thread at a time, but for `kill`. It ends with this object."""

    def __init__(self, vocabulary: Sequence[bytes]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "service.gateway.grammar_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            start_new_session=True,  # An interrupt is meant for the server, which may still need it.
        )
        weakref.finalize(self, _end, self._process)
        self._send([token.decode("latin-1") for token in vocabulary])

    def ask(self, grammar: Grammar) -> str | None:
        """What is wrong with `grammar`.

        Raises _WorkerDiedError, or where no grammar is to blame ApiError 503 or RuntimeError.
        """
        self._send([grammar.kind, grammar.source])
        line = self._read_line()
        if line is None:
            raise self._find_cause()
        answer = orjson.loads(line)
        return None if answer is None else str(answer)

    def kill(self) -> None:
        """Ends the process; a thread that waits for its answer hears that there is none."""
        self._process.kill()

    def _find_cause(self) -> Exception:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        _end(self._process)
        code = self._process.returncode
        if code >= 0:
            return RuntimeError(f"the process that tries out grammars ended with code {code}")
        if -code in _ENDINGS:
            return _WorkerDiedError(_ENDINGS[-code])
        return _overloaded("the grammar could not be checked in time")

    def _send(self, message: Sequence[str]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # The silence that follows will tell.
            self._process.stdin.write(orjson.dumps(message) + b"\n")
            self._process.stdin.flush()

    def _read_line(self) -> bytes | None:
        """None where the worker has ended, or is silent for too long."""
        assert self._process.stdout is not None
        descriptor, deadline_s, line = self._process.stdout.fileno(), time.monotonic() + _TIMEOUT_S, b""
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(deadline_s - time.monotonic(), 0)):
                    return None
                piece = os.read(descriptor, 65_536)
                if not piece:
                    return None
                line += piece
        return line


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        with contextlib.suppress(BrokenPipeError):
            stream.close()
