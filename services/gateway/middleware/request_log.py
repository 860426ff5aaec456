"""What is known of each request: its id, its log event, its metrics."""

from __future__ import annotations

import dataclasses
import logging
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.errors import ApiError, error_response
from services.gateway.metrics import Metrics

logger = logging.getLogger(__name__)

MAX_REQUEST_ID = 128
# Asked by machines every few seconds; a line for each would bury the rest.
_QUIET = frozenset({"/healthz", "/readyz", "/metrics"})


@dataclasses.dataclass(slots=True)
class RequestRecord:
    """One request's facts, filled in by whoever learns them. Never any content.

    Attributes:
        started: when it arrived, by ``time.perf_counter``.
        status: HTTP status; 499 if the client left before the end, 0 while there is none.
        error: code of the error that the client got, in the response or at the end of a stream.
    """

    request_id: str
    started: float = dataclasses.field(default_factory=time.perf_counter)
    status: int = 0
    model: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_seen: bool = False
    error: str | None = None


def request_id_from(headers: Headers) -> str:
    """The client's ``x-request-id`` if it is one, a new one otherwise."""
    given = headers.get("x-request-id", "")
    if given and len(given) <= MAX_REQUEST_ID and given.isascii() and given.isprintable() and given == given.strip():
        return given
    return uuid.uuid4().hex


class Observe:
    """ASGI middleware: gives each request a :class:`RequestRecord` in ``scope["state"]["record"]``, returns its id to
    the client, counts it, logs it, and answers 500 where nothing else caught an error."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(request_id_from(Headers(scope=scope)))
        scope.setdefault("state", {})["record"] = record
        began = False

        async def send_observed(message: Message) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                record.status = record.status or message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.request_id
            await send(message)

        quiet = scope["path"] in _QUIET
        if not quiet:
            self._metrics.in_flight.inc()
        try:
            await self._app(scope, receive, send_observed)
        except Exception:
            logger.exception("request failed", extra={"request_id": record.request_id})
            record.error = "internal_error"
            if not began:
                message = f"The gateway failed on this request; its id in the log is {record.request_id}."
                await error_response(ApiError(500, message, code="internal_error"))(scope, receive, send_observed)
        finally:
            if not quiet:
                self._metrics.in_flight.dec()
            self._finish(scope, record, quiet)

    def _finish(self, scope: Scope, record: RequestRecord, quiet: bool) -> None:
        seconds = time.perf_counter() - record.started
        # The route's pattern: paths themselves are unbounded.
        route = getattr(scope.get("route"), "path", None) or "other"
        self._metrics.requests.labels(route, str(record.status)).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)
        facts = {
            "request_id": record.request_id,
            "method": scope["method"],
            "path": scope["path"],
            "status": record.status,
            "duration_seconds": round(seconds, 6),
        }
        if record.model is not None:
            facts |= {
                "model": record.model,
                "prompt_tokens": record.prompt_tokens,
                "completion_tokens": record.completion_tokens,
            }
        if record.error is not None:
            facts["error"] = record.error
        logger.log(logging.DEBUG if quiet else logging.INFO, "request", extra=facts)
