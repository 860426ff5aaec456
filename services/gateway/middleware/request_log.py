"""One log event, one span and a few metrics for each HTTP request."""

import dataclasses
import logging
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat_core.tracing.span import REQUEST_ID, Span
from nanochat_core.tracing.tracer import Tracer
from services.gateway.metrics import Metrics

logger = logging.getLogger(__name__)

# Requests to these paths are logged only at the level debug, and are not traced. Kubernetes, Prometheus and open chat
# pages send such requests every few seconds, so their log events would hide the other events.
_QUIET_PATHS = frozenset({"/healthz", "/health", "/readyz", "/metrics", "/progress"})


@dataclasses.dataclass(slots=True)
class RequestRecord:
    """Facts about one request, which its handler fills in. The facts never contain text of a conversation."""

    request_id: str
    started: float = dataclasses.field(default_factory=time.perf_counter)  # seconds, on the clock of time.perf_counter
    status: int = 0  # 499 if the client left before the end, 0 until there is a status
    key: str | None = None  # id of the API key, or "anonymous"; None if the path needs no key
    model: str | None = None
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_seconds: float | None = None  # time from the request's arrival to the first token
    sent_bytes: int = 0  # bytes of the answer's body that were sent
    error: str | None = None  # code of the error that the client got, in the response or at the end of a stream


class RequestLog:
    """ASGI middleware that logs, traces and counts each request.

    It puts a :class:`RequestRecord` into ``scope["state"]["record"]`` and returns the request's id to the client.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, tracer: Tracer) -> None:
        self._app = app
        self._metrics = metrics
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with self._tracer.request(scope["method"], Headers(scope=scope)) as span:
            await self._serve(scope, receive, send, span)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, span: Span) -> None:
        record = RequestRecord(span.request_id)
        scope.setdefault("state", {})["record"] = record

        async def send_observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = record.status or message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = record.request_id
            record.sent_bytes += len(message.get("body", b""))
            await send(message)

        quiet = scope["path"] in _QUIET_PATHS
        if quiet:
            span.sampled = False
        else:
            self._metrics.in_flight.inc()
        try:
            await self._app(scope, receive, send_observed)
        finally:
            if not quiet:
                self._metrics.in_flight.dec()
            self._finish(scope, record, span, logging.DEBUG if quiet else logging.INFO)

    def _finish(self, scope: Scope, record: RequestRecord, span: Span, level: int) -> None:
        seconds = time.perf_counter() - record.started
        # The label is the route's pattern, because the number of different paths is unbounded.
        route = getattr(scope.get("route"), "path", None) or "other"
        self._metrics.requests.labels(route, str(record.status)).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)
        facts = {
            "request_id": record.request_id,
            "client": (scope.get("client") or ("",))[0],
            "method": scope["method"],
            "path": scope["path"],
            "status": record.status,
            "duration_seconds": round(seconds, 6),
            "sent_bytes": record.sent_bytes,
        }
        if record.first_token_seconds is not None:
            facts["first_token_seconds"] = round(record.first_token_seconds, 6)
        if record.key is not None:
            facts["key"] = record.key
        if record.model is not None:
            facts |= {name: getattr(record, name) for name in ("model", "prompt_tokens", "completion_tokens")}
        if record.error is not None:
            facts["error"] = record.error
        logger.log(level, "request", extra=facts)
        span.name = f"{scope['method']} {route}"
        span.attributes |= {"http.request.method": scope["method"], "http.response.status_code": record.status}
        if record.model is not None:
            span.attributes |= {
                "gen_ai.request.model": record.model,
                "gen_ai.usage.input_tokens": record.prompt_tokens,
                "gen_ai.usage.output_tokens": record.completion_tokens,
            }
        if record.status >= 500 or record.error is not None:
            span.error = record.error or str(record.status)
