"""A client's connection: HTTP/1.1 with limits on the size of the headers, on times and on the number of connections."""

import asyncio
import socket
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from services.gateway.errors import ApiError, shown
from services.gateway.metrics import Metrics
from services.gateway.middleware.unread_body import DROP_SECONDS, LINGER_SECONDS
from services.gateway.settings import GatewaySettings

# Number of bytes of an answer that may wait unsent in the kernel, and the same number again in the process. The answer
# pauses while more bytes wait in the process. With the kernel's own limit, up to 4 MB of an answer that nobody reads
# would wait in the kernel.
_UNSENT_BYTES = 16_384


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 connection. Its parser, h11, bounds the size of the request line and the headers together.

    This class adds four features that uvicorn lacks: a deadline for the arrival of a request, a deadline for a client
    that does not read its answer, a maximum number of connections, and errors in the API's form.
    """

    def __init__(self, *arguments: Any, settings: GatewaySettings, metrics: Metrics, **options: Any) -> None:
        """``settings`` and ``metrics`` belong to the gateway. uvicorn passes the other arguments."""
        super().__init__(*arguments, **options)
        self._settings = settings
        self._closed = metrics.connections_closed
        self._arrival: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._refused = False  # whether an error was sent, so that the rest of the request is dropped
        self._active = 0.0  # time, on the event loop's clock, at which the client last sent something

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for a request. If there are too many connections, closes the one that was idle for longest."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(_UNSENT_BYTES)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
        self._active = self.loop.time()
        self._expect_request()
        if len(self.connections) > self._settings.max_connections:
            idle = [each for each in self.connections if isinstance(each, Connection) and each.idle]
            min(idle, key=lambda each: each._active)._close("crowded")

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends all timers, even if the client has reset the connection."""
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._request_arrived()
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        """Parses the client's data in pieces.

        h11 checks the size of the headers only while their end is missing. Therefore each piece ends at most one byte
        after the limit, so that h11 refuses headers that are too large before it receives their end.
        """
        self._active = self.loop.time()
        if self._refused:
            self.transport.pause_reading()
            self.loop.call_later(DROP_SECONDS, self.transport.resume_reading)
            return
        largest = self._settings.max_header_bytes + 1
        start = 0
        while start < len(data) and not self._refused and not self.transport.is_closing():
            waiting = len(self.conn.trailing_data[0]) if self.conn.their_state is h11.IDLE else 0
            end = start + max(1, largest - waiting)
            super().data_received(data[start:end])
            start = end

    def handle_events(self) -> None:
        """Handles all complete events. The arrival deadline runs while a part of a request is missing."""
        super().handle_events()
        if self._refused:
            return
        state = self.conn.their_state
        if state is h11.SEND_BODY or (state is h11.IDLE and self.conn.trailing_data[0]):
            self._expect_request()
        else:
            self._request_arrived()

    def pause_writing(self) -> None:
        """Stops the answer until the client has read more. The connection ends if that takes ``stall_seconds``."""
        super().pause_writing()
        if self._stall is None:
            self._stall = self.loop.call_later(self._settings.stall_seconds, self._close, "stalled")

    def resume_writing(self) -> None:
        """Continues the answer, because the client has read a part of it or is gone."""
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def send_400_response(self, msg: str) -> None:
        """Answers a malformed request. uvicorn calls this method while it handles the parser's error."""
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        if status == 431:
            limit = self._settings.max_header_bytes
            message = f"The request line and the headers are larger than this server accepts ({limit} bytes)."
            self._refuse(ApiError(431, message, code="headers_too_large"), "oversized")
        else:
            message = f"The request is not valid HTTP: {shown(str(error or msg))}."
            self._refuse(ApiError(status, message, code="invalid_http"), "malformed")

    def timeout_keep_alive_handler(self) -> None:
        """Closes a connection on which no further request came, even if the client has not read its last answer."""
        if not self.transport.is_closing():
            self._close("idle")

    def _should_upgrade(self) -> bool:
        # A server may ignore a request to upgrade the protocol (RFC 9110, section 7.8). uvicorn would ignore it, too,
        # but would log two warnings.
        return False

    def _expect_request(self) -> None:
        if self._arrival is None:
            self._arrival = self.loop.call_later(self._settings.arrival_seconds, self._late)

    def _request_arrived(self) -> None:
        if self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None

    def _late(self) -> None:
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self._close("silent")
            return
        seconds = self._settings.arrival_seconds
        message = f"The request did not arrive completely within {seconds:g} seconds."
        self._refuse(ApiError(408, message, code="request_timeout"), "late")

    def _refuse(self, error: ApiError, reason: str) -> None:
        """Answers with the error if no answer has begun, and closes the connection."""
        head = not self.idle and self.scope["method"] == "HEAD"  # a response to HEAD has no body for the error
        if head or self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self._close(reason)
            return
        body = error.body
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        # The headers may not have been read, so the page's origin is unknown and the response can allow only `*`.
        if "*" in self._settings.cors_origins:
            headers.append((b"access-control-allow-origin", b"*"))
        status = error.status_code
        response = h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status])
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self._closed.labels(reason).inc()
        if not self.idle:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._refused = True
        self._request_arrived()
        if not self.transport.can_write_eof():
            self.transport.close()
            return
        # Closing immediately would reset the connection while the client is still sending, and the client would not see
        # the error. So the rest of the request is read and dropped until the client closes the connection, but at most
        # for LINGER_SECONDS.
        self.transport.write_eof()
        self._arrival = self.loop.call_later(LINGER_SECONDS, self.transport.abort)

    def _close(self, reason: str) -> None:
        self._closed.labels(reason).inc()
        self._request_arrived()
        self.connections.discard(self)
        # abort() is called instead of close(), which would wait until the client has read everything.
        self.transport.abort()
