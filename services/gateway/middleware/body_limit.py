"""Limits the size of request bodies."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.errors import ApiError, shown
from services.gateway.metrics import Metrics
from services.gateway.settings import GatewaySettings


class BodyLimit:
    """ASGI middleware that answers 413 if a body is over the limit, even without a ``Content-Length`` header.

    A compressed body gets 415: its size after decompression would have no bound. A request gets 503 if its body would
    raise the size of all bodies in memory over ``max_held_bytes``.
    """

    def __init__(self, app: ASGIApp, settings: GatewaySettings, metrics: Metrics) -> None:
        self._app = app
        self._max_bytes = settings.max_body_bytes
        self._max_held_bytes = settings.max_held_bytes
        self._held = 0  # received body bytes of all requests that are being answered
        self._gauge = metrics.held_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        encoding = headers.get("content-encoding", "identity").lower()
        if encoding not in ("", "identity"):
            await _compressed(encoding).response()(scope, receive, send)
            return
        announced = headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self._max_bytes:
            await self._too_large().response()(scope, receive, send)
            return
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            size = len(message.get("body", b""))
            received += size
            self._hold(size)
            if received > self._max_bytes:
                raise self._too_large()
            if self._held > self._max_held_bytes:
                raise _no_memory()
            return message

        try:
            await self._app(scope, receive_limited, send)
        finally:
            self._hold(-received)

    def _hold(self, size: int) -> None:
        self._held += size
        self._gauge.set(self._held)

    def _too_large(self) -> ApiError:
        message = f"The request body is larger than this server accepts ({self._max_bytes} bytes)."
        return ApiError(413, message, code="request_too_large")


def _no_memory() -> ApiError:
    message = "The server holds as many request bodies as it can. Try again shortly."
    return ApiError(503, message, code="gateway_overloaded")


def _compressed(encoding: str) -> ApiError:
    message = f"The request body has the Content-Encoding {shown(encoding)!r}; send the body uncompressed."
    # RFC 7694: this header lists the encodings that the server accepts.
    return ApiError(415, message, code="unsupported_content_encoding", headers={"Accept-Encoding": "identity"})
