"""Spans for OpenTelemetry of the completions that a gateway answers, by the semantic conventions for generative AI."""

from __future__ import annotations

from collections.abc import Mapping

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from starlette.datastructures import Headers
from starlette.types import Scope

from service.gateway.exchange import Exchange
from service.tracing import PROPAGATOR

_OPERATION = "text_completion"

# From a log line's fields to the semantic conventions for generative AI, or to names of our own.
_ATTRIBUTES: Mapping[str, str] = {
    "model": "gen_ai.response.model",
    "seed": "gen_ai.request.seed",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "error": "error.type",
    "key": "tessera.key.id",
    "stream": "tessera.stream",
    "ttft_ms": "tessera.time_to_first_token_ms",
}


class GatewayTracer:
    """Implements the gateway's `ExchangeTracer`: one server span for each completion asked for."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("tessera")
        self._spans: dict[int, Span] = {}

    def begin(self, scope: Scope, exchange: Exchange) -> None:
        """Begins a span below the one that the client names in `traceparent`, if any."""
        if scope["method"] != "POST" or not scope["path"].endswith("/completions"):
            return
        parent = PROPAGATOR.extract(dict(Headers(scope=scope)))
        attributes = {"gen_ai.operation.name": _OPERATION, "gen_ai.provider.name": "tessera"}
        span = self._tracer.start_span(_OPERATION, parent, SpanKind.SERVER, attributes)
        self._spans[id(exchange)] = span
        context = span.get_span_context()
        if context.trace_flags.sampled:
            exchange.trace_context = f"00-{context.trace_id:032x}-{context.span_id:016x}-01"

    def end(self, exchange: Exchange, status: int) -> None:
        """Ends the span of an exchange that has one."""
        span = self._spans.pop(id(exchange), None)
        if span is None:
            return
        fields = exchange.fields
        span.set_attribute("http.response.status_code", status)
        span.set_attribute("gen_ai.response.id", exchange.request_id)
        for name, attribute in _ATTRIBUTES.items():
            if (value := fields.get(name)) is not None:
                span.set_attribute(attribute, value)  # type: ignore[arg-type]
        if "finish" in fields:
            span.set_attribute("gen_ai.response.finish_reasons", str(fields["finish"]).split(","))
        if "model" in fields:
            span.set_attribute("gen_ai.request.model", str(fields["model"]))
            span.update_name(f"{_OPERATION} {fields['model']}")
        if status >= 500 or "error" in fields:
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    def close(self) -> None:
        """Sends what has not been sent."""
        self._provider.shutdown()
