"""Requests on their way into the engine: those with a grammar wait here, at nobody's cost, until it is compiled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from service.engine.errors import RequestRejectedError
from service.engine.grammar import FAULT, Grammar
from service.engine.grammar_compiler import GrammarCompiler, GrammarError, Matcher
from service.engine.request import FinishReason, Request, RequestOutput


class Preparation:
    """Compiles in one thread of its own. All methods are called on one asyncio loop, and call back on it."""

    def __init__(
        self,
        compiler: GrammarCompiler | None,
        on_ready: Callable[[Request], None],
        on_end: Callable[[RequestOutput], None],
    ) -> None:
        self._compiler = compiler
        self._on_ready = on_ready
        self._on_end = on_end
        self._waiting: dict[str, asyncio.Future[Matcher]] = {}
        self._held: dict[str, Grammar] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    def check(self, request: Request) -> None:
        """Raises RequestRejectedError where nothing here can compile grammars."""
        if request.sampling.grammar is not None and self._compiler is None:
            raise RequestRejectedError("this model has no tokenizer, so its output cannot be held to a grammar")

    def start(self, request: Request) -> None:
        """Hands `request` on once it is ready, at once where it can; with a grammar that is no good, it ends.

        Its grammar stays ready until `release`, so that no step ever compiles.
        """
        grammar, compiler = request.sampling.grammar, self._compiler
        if grammar is None or compiler is None:
            self._on_ready(request)
            return
        compiler.hold(grammar)
        self._held[request.request_id] = grammar
        if compiler.is_ready(grammar):
            self._on_ready(request)
            return
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        compiling = loop.run_in_executor(self._thread, compiler.matcher, grammar)
        self._waiting[request.request_id] = compiling
        compiling.add_done_callback(lambda done: self._finish(request.later(loop.time() - started_s), done))
        if request.timeout_s is not None:
            timer = loop.call_later(request.timeout_s, self._end, request.request_id, FinishReason.DEADLINE)
            compiling.add_done_callback(lambda _: timer.cancel())

    def cancel(self, request_id: str) -> bool:
        """Ends a request that waits here; False where none does."""
        return self._end(request_id, FinishReason.ABORT)

    def release(self, request_id: str) -> None:
        """Lets go of a request that has ended: of its grammar, if it has one, and of its wait for it."""
        waiting = self._waiting.pop(request_id, None)
        if waiting is not None:
            waiting.cancel()
        grammar = self._held.pop(request_id, None)
        if grammar is not None and self._compiler is not None:
            self._compiler.release(grammar)

    def _end(self, request_id: str, reason: FinishReason) -> bool:
        waiting = self._waiting.pop(request_id, None)
        if waiting is None:
            return False
        waiting.cancel()
        self._on_end(RequestOutput(request_id, finish_reason=reason))
        return True

    def close(self) -> None:
        """Forgets who waits here; their ends are the caller's to tell."""
        self._waiting.clear()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _finish(self, request: Request, done: asyncio.Future[Matcher]) -> None:
        if self._waiting.pop(request.request_id, None) is None:
            return
        error = done.exception()
        if error is None:
            self._on_ready(request)
            return
        reason = FAULT + (str(error) if isinstance(error, GrammarError) else "it could not be compiled")
        self._on_end(RequestOutput(request.request_id, finish_reason=FinishReason.ERROR, error=reason))
