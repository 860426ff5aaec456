"""Sends spans to an OpenTelemetry collector over OTLP/HTTP. This module needs the packages of the extra ``tracing``."""

import threading

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from nanochat_core.tracing.span import Span

# Time limit for sending one batch. A service that shuts down also waits for the collector at most this long.
_SEND_SECONDS = 2.0


class OtlpExporter:
    """Exports spans in batches, on a separate thread. Spans are dropped while the collector does not answer."""

    def __init__(self, service: str, endpoint: str) -> None:
        """``endpoint`` is the collector's URL without a path. OpenTelemetry's SDK also reads other OTEL_* variables."""
        self._resource = Resource.create({"service.name": service})
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=_SEND_SECONDS)
        self._batches = BatchSpanProcessor(exporter)

    def export(self, span: Span, started: int, ended: int) -> None:
        """Queue a finished span. Both times are in nanoseconds since the epoch."""
        self._batches.on_end(
            ReadableSpan(
                name=span.name,
                context=_context(span, span.span_id, is_remote=False),
                parent=_context(span, span.parent_id, is_remote=True) if span.parent_id else None,
                resource=self._resource,
                attributes={"nanochat.request_id": span.request_id, **span.attributes},
                kind=SpanKind.SERVER,
                status=Status(StatusCode.ERROR, span.error) if span.error else Status(StatusCode.UNSET),
                start_time=started,
                end_time=ended,
            )
        )

    def close(self) -> None:
        """Send the queued spans, and stop. Blocks for at most two seconds; the SDK's own limit is half a minute."""
        ending = threading.Thread(target=self._batches.shutdown, daemon=True)
        ending.start()
        ending.join(_SEND_SECONDS)


def _context(span: Span, span_id: str, *, is_remote: bool) -> SpanContext:
    return SpanContext(
        int(span.trace_id, 16),
        int(span_id, 16),
        is_remote=is_remote,
        trace_flags=TraceFlags(TraceFlags.SAMPLED),
        trace_state=TraceState.from_header([span.tracestate]),
    )
