"""`/v1/completions`: a request read, planned, generated and answered, its memory given back whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from functools import partial

from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.engine.errors import EngineError
from service.engine.request import FinishReason
from service.gateway import streaming
from service.gateway.answer import AnswerWriter
from service.gateway.answer_schema import Completion
from service.gateway.body import read_json_object
from service.gateway.choice import Delta
from service.gateway.errors import DrainingError, to_api_error
from service.gateway.exchange import Exchange, exchange_of
from service.gateway.gateway import Gateway, gateway_of
from service.gateway.grammar_fields import AskedGrammar
from service.gateway.heartbeat import Heartbeat
from service.gateway.merge import OutputMerge
from service.gateway.openapi import BODY_ERRORS, errors, json_body
from service.gateway.plan import CompletionPlan, make_plan
from service.gateway.quota import claim
from service.gateway.rate_limit import Reservation
from service.gateway.responses import json_response
from service.gateway.run import CompletionRun, whole_choices
from service.gateway.schema import CompletionRequest
from service.gateway.session import session_of
from service.gateway.streaming import ChunkEncoder
from service.gateway.validation import parse_completion

logger = logging.getLogger(__name__)
router = APIRouter()

_STREAM_DOC = {"text/event-stream": {"schema": {"type": "string", "description": "`data: {Completion}` events."}}}


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


@router.post(
    "/v1/completions",
    response_model=None,
    openapi_extra=json_body(CompletionRequest),
    responses={200: {"model": Completion, "content": _STREAM_DOC}, **errors(*BODY_ERRORS, 503)},
)
async def create_completion(request: Request) -> Response:
    """Continue one or several prompts."""
    gateway, exchange = gateway_of(request), exchange_of(request.scope)
    with _count_rejection(gateway, exchange):
        gateway.drain.check()
        gateway.limiter.check(exchange.key)
        body = await read_json_object(request, gateway.settings)
        exchange.rename(body.get("request_id"))
        params = parse_completion(body)
        plan = await make_plan(params, gateway.served, gateway.settings, exchange.request_id, exchange.started_s)
        session_id = session_of(request.headers, params, gateway.settings.max_user_chars)
        if exchange.trace_context or session_id:
            requests = tuple(
                replace(each, trace_context=exchange.trace_context, session_id=session_id) for each in plan.requests
            )
            plan = replace(plan, requests=requests)
        plan, reservation = claim(plan, exchange.key, gateway.served.info, gateway.limiter)
        if plan.asked_grammar is not None:
            plan = await _with_checked_grammar(plan, plan.asked_grammar, gateway, exchange, reservation)
    exchange.headers |= reservation.headers()
    exchange.fields |= {"model": plan.model, "stream": plan.is_stream, "seed": plan.seed}
    if params.user is not None:
        exchange.fields["user"] = params.user
    return CompletionResponse(gateway, plan, exchange, reservation)


async def _with_checked_grammar(
    plan: CompletionPlan, asked: AskedGrammar, gateway: Gateway, exchange: Exchange, reservation: Reservation
) -> CompletionPlan:
    """`plan` with the time left that this took. Raises ApiError; the request then counts, its tokens do not.

    It comes last before the engine, because it costs time.
    """
    started_s = time.perf_counter()
    try:
        await gateway.grammars.check(asked)
    except BaseException:
        reservation.settle(0)
        raise
    elapsed_s = time.perf_counter() - started_s
    exchange.fields["grammar_ms"] = round(elapsed_s * 1000, 1)
    return replace(plan, requests=tuple(request.later(elapsed_s) for request in plan.requests))


class CompletionResponse(Response):
    """Generates while it answers.

    The status is sent once the engine has given its first output, so that what goes wrong until then has a status of
    its own. A stream for which that takes longer than `keep_alive_s` begins before, with a comment.
    """

    def __init__(self, gateway: Gateway, plan: CompletionPlan, exchange: Exchange, reservation: Reservation) -> None:
        super().__init__()
        self._gateway = gateway
        self._plan = plan
        self._exchange = exchange
        self._reservation = reservation
        self._writer = AnswerWriter(plan, gateway.served.tokenizer, self._system_fingerprint)
        self._run: CompletionRun | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway, plan = self._gateway, self._plan
        sources = [partial(gateway.engine.deliver, request) for request in plan.requests]
        merge = OutputMerge(sources, gateway.settings.abort_timeout_s)
        run = CompletionRun(plan, merge, gateway.served.tokenizer, gateway.metrics, self._exchange.started_s)
        self._run = run
        with self._recorded(run):
            async with contextlib.AsyncExitStack() as stack:
                with _count_rejection(gateway, self._exchange):
                    stack.enter_context(gateway.drain.flight(merge.fail))
                    await stack.enter_async_context(merge)
                    await stack.enter_async_context(_watched(receive, merge.fail))
                    heartbeat = stack.enter_context(self._heartbeat(merge.poke))
                    first = await run.next()
                    while not (run.is_accepted or heartbeat.is_due):
                        first = await run.next()
                if plan.is_stream:
                    # In a task of its own a token wakes this coroutine alone, not all that lie around it; and what is
                    # sent after the head goes to the server at once, since nothing between looks at it.
                    await send({"type": "http.response.start", "status": 200, "headers": streaming.HEADERS})
                    await asyncio.create_task(self._stream(first, run, heartbeat, self._exchange.send or send))
                else:
                    await (await self._whole(first, run))(scope, receive, send)

    def _system_fingerprint(self) -> str:
        """Of the engine that answers: while a cluster is updated, they may differ."""
        told = self._run.system_fingerprint if self._run else ""
        return told or self._gateway.served.system_fingerprint

    async def _whole(self, deltas: list[Delta], run: CompletionRun) -> Response:
        while not run.is_finished:
            deltas += await run.next()
        self._pay(run)
        whole = whole_choices(deltas, len(self._plan.requests))
        choices = [self._writer.whole(delta, run.choices[delta.choice_index]) for delta in whole]
        return json_response({**self._writer.head(), "choices": choices, "usage": run.usage()})

    def _heartbeat(self, wake: Callable[[], None]) -> Heartbeat:
        return Heartbeat(self._gateway.settings.keep_alive_s if self._plan.is_stream else None, wake)

    async def _stream(self, deltas: list[Delta], run: CompletionRun, heartbeat: Heartbeat, send: Send) -> None:
        encoder = ChunkEncoder(self._plan, self._writer)
        try:
            while not run.is_finished:
                if deltas:
                    body = encoder.events(deltas, self._usage_so_far(run))
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                    run.delivered()
                    heartbeat.sent()
                elif heartbeat.is_due:
                    await send({"type": "http.response.body", "body": streaming.KEEP_ALIVE, "more_body": True})
                    heartbeat.sent()
                deltas = await run.next()
            self._pay(run)
            last = encoder.events(deltas, self._usage_so_far(run))
            last += encoder.usage(run.usage()) if self._plan.include_usage else b""
            last += streaming.DONE
        except ClientGoneError:
            raise
        except Exception as error:
            last = self._failure(error, run)
        await send({"type": "http.response.body", "body": last, "more_body": False})

    def _pay(self, run: CompletionRun) -> None:
        """Before the answer's end, so that a client that comes back at once finds what it did not use."""
        self._reservation.settle(run.num_tokens)

    def _usage_so_far(self, run: CompletionRun) -> dict[str, object] | None:
        return run.usage() if self._plan.continuous_usage else None

    def _failure(self, error: Exception, run: CompletionRun) -> bytes:
        told = to_api_error(error)
        if isinstance(error, EngineError) and not run.is_accepted:  # After a comment or two.
            self._gateway.metrics.rejected(told.code)
            self._reservation.cancel()
        elif told is not error:
            logger.error("request %s failed in its stream", self._plan.request_id, exc_info=error)
        run.settle(_end_reason(error))
        self._exchange.fields["error"] = told.code
        return streaming.error_event(told)

    @contextlib.contextmanager
    def _recorded(self, run: CompletionRun) -> Iterator[None]:
        """Leaves behind counts and log fields however the run ends. A client that went away is no error."""
        try:
            yield
            run.delivered()
        except ClientGoneError:
            self._gateway.metrics.cancelled.inc()
            run.settle(FinishReason.ABORT)
        except BaseException as error:
            if isinstance(error, EngineError) and not run.is_accepted:
                self._reservation.cancel()
            run.settle(_end_reason(error))
            raise
        finally:
            self._pay(run)
            self._exchange.fields.update(run.log_fields())


@contextlib.contextmanager
def _count_rejection(gateway: Gateway, exchange: Exchange) -> Iterator[None]:
    try:
        yield
    except (ClientGoneError, ClientDisconnect):
        raise
    except Exception as error:
        gateway.metrics.rejected(to_api_error(error).code, exchange.key.id if exchange.key else "")
        raise


@contextlib.asynccontextmanager
async def _watched(receive: Receive, fail: Callable[[Exception], None]) -> AsyncIterator[None]:
    """While inside, `fail` hears when the client goes away."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        fail(ClientGoneError())

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()


def _end_reason(error: BaseException) -> FinishReason:
    """What the choices that an error cut short are counted as."""
    return FinishReason.ABORT if isinstance(error, DrainingError | asyncio.CancelledError) else FinishReason.ERROR
