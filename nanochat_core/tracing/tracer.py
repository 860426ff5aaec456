"""Makes a span for each request that a service receives, and exports the sampled spans if there is a collector."""

import contextlib
import dataclasses
import random
import time
from collections.abc import Iterator, Mapping

from nanochat_core.errors import UserError
from nanochat_core.settings import setting
from nanochat_core.tracing.span import Span, current_span


@dataclasses.dataclass(frozen=True)
class TracingSettings:
    """The setting that names the destination of traces. Every service has it."""

    otlp_endpoint: str = setting(
        "",
        "URL of the OpenTelemetry collector that receives traces over OTLP/HTTP, such as http://collector:4318; empty "
        "exports nothing",
        env="OTEL_EXPORTER_OTLP_ENDPOINT",
    )


class Tracer:
    """Makes and exports the spans of one service."""

    def __init__(self, service: str, settings: TracingSettings, ratio: float = 0.0) -> None:
        """A trace that begins in this service is exported with probability ``ratio``. For other traces, callers decide.

        Raises UserError if traces are to be exported and the packages for that are not installed.
        """
        self._ratio = ratio if settings.otlp_endpoint else 0.0
        self._exporter = None
        if settings.otlp_endpoint:
            try:
                from nanochat_core.tracing.otlp import OtlpExporter
            except ImportError as error:
                message = f"--otlp-endpoint needs OpenTelemetry ({error}); install the extra nanochat[tracing]"
                raise UserError(message) from error
            self._exporter = OtlpExporter(f"nanochat-{service}", settings.otlp_endpoint)

    @contextlib.contextmanager
    def request(self, name: str, headers: Mapping[str, str]) -> Iterator[Span]:
        """Set a new span for the current task, which serves one request. The span ends with the ``with`` block.

        Log lines and calls of other services then carry the request's id and trace. The keys of ``headers`` are in
        lower case.
        """
        span = Span.from_headers(name, headers)
        if span.sampled is None:
            span.sampled = random.random() < self._ratio  # noqa: S311 - not a secret
        current_span.set(span)
        started = time.time_ns()
        try:
            yield span
        except BaseException as error:
            span.error = span.error or type(error).__name__
            raise
        finally:
            if self._exporter is not None and span.sampled:
                self._exporter.export(span, started, time.time_ns())

    def close(self) -> None:
        """Send the spans that are not exported yet. Blocks for at most two seconds."""
        if self._exporter is not None:
            self._exporter.close()
