"""Where spans for OpenTelemetry go, and those of an engine: its requests and their phases.

Imported only where tracing is asked for. Sampling and resources are OpenTelemetry's own settings (`OTEL_...`).
"""

from __future__ import annotations

import time

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.engine.request import FinishReason, Request, RequestOutput
from service.version import package_version

# A replica that Ray ends has no time to say goodbye: what it knows should be out soon.
_EXPORT_PERIOD_MS = 1000
PROPAGATOR = TraceContextTextMapPropagator()


def make_provider(endpoint: str, role: str, instance: str) -> TracerProvider:
    """Sends spans to the OTLP/HTTP collector at `endpoint`, such as http://127.0.0.1:4318, from a thread of its own."""
    resource = Resource.create(
        {
            "service.name": f"tessera-{role}",
            "service.instance.id": instance,
            "service.version": package_version(),
        }
    )
    provider = TracerProvider(resource=resource)
    exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces", timeout=5)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=_EXPORT_PERIOD_MS))
    return provider


class EngineTracer:
    """A span for each traced request of an engine, with its phases below it."""

    def __init__(self, provider: TracerProvider, replica: str) -> None:
        self._tracer = provider.get_tracer("tessera")
        self._replica = replica

    def ended(self, request: Request, output: RequestOutput) -> None:
        """A request has just ended, whose `trace_context` names the span above it."""
        parent = PROPAGATOR.extract({"traceparent": request.trace_context})
        end_ns = time.time_ns()
        timing = output.timing
        total_s = timing.queued_s + timing.prefill_s + timing.decode_s if timing else 0.0
        start_ns = end_ns - round(total_s * 1e9)
        attributes: dict[str, str | int] = {
            "tessera.replica": self._replica,
            "tessera.request.id": request.request_id,
            "tessera.finish_reason": str(output.finish_reason),
            "tessera.prompt_tokens": len(request.prompt_token_ids),
        }
        span = self._tracer.start_span("engine", parent, SpanKind.SERVER, attributes, start_time=start_ns)
        if output.finish_reason is FinishReason.ERROR:
            span.set_status(Status(StatusCode.ERROR, output.error))
        if timing is not None:
            self._phases(span, start_ns, end_ns, (timing.queued_s, timing.prefill_s))
        span.end(end_ns)

    def _phases(self, span: Span, start_ns: int, end_ns: int, spent_s: tuple[float, float]) -> None:
        context = set_span_in_context(span)
        begun_ns = start_ns
        ends_ns = [start_ns + round(spent_s[0] * 1e9), start_ns + round(sum(spent_s) * 1e9), end_ns]
        for phase, ended_ns in zip(("queue", "prefill", "decode"), ends_ns, strict=True):
            self._tracer.start_span(phase, context, start_time=begun_ns).end(ended_ns)
            begun_ns = ended_ns
