"""Sends answers as server-sent events, and sends heartbeats while an answer is silent."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.gateway.errors import ApiError, ClientGone, internal_error
from services.gateway.middleware.drain import Drain, cancel
from services.gateway.middleware.request_log import RequestRecord

logger = logging.getLogger(__name__)

_KEEP_ALIVE = b": keep-alive\n\n"


def encode_event(data: bytes, name: str = "") -> bytes:
    """Encodes an event with one line of data, and with a name if there is one."""
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + data + b"\n\n"


DONE = encode_event(b"[DONE]")
"""The last event of a stream in the form of OpenAI's chat completions."""


class EventStream(Response):
    """A response of server-sent events. Each event is sent as soon as it is ready.

    The response begins with the first event or the first heartbeat, whichever comes earlier. A failure before the
    response begins becomes an ordinary error response with its own status. A later failure becomes the stream's last
    event, ``{"error": ...}``.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        drain: Drain,
        record: RequestRecord,
        heartbeat_seconds: float,
        placed_at: Callable[[], float | None],
        *,
        named: bool = False,
    ) -> None:
        """``events`` yields complete, encoded events. ``named`` says whether an error event has the name ``error``.

        After ``heartbeat_seconds`` of silence, a comment line is sent. ``placed_at()`` returns the time at which an
        engine got the request, or None while the request waits for an engine. Until the first byte is sent, the silence
        is measured from this time.
        """
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]  # the length of a stream is not known
        self._events = events
        self._drain = drain
        self._record = record
        self._heartbeat_seconds = heartbeat_seconds
        self._placed_at = placed_at
        self._named = named
        self._started = False
        self._last_sent = 0.0
        self._sending = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._drain.run(self._write(send), receive, self._record)
        except ClientGone:
            return
        except Exception as error:
            await self._fail(error, scope, receive, send)
        else:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, send: Send) -> None:
        heartbeat = asyncio.create_task(self._beat(send))
        try:
            async with contextlib.aclosing(self._events) as events:
                async for data in events:
                    await self._send(send, data)
        finally:
            await cancel(heartbeat)

    async def _beat(self, send: Send) -> None:
        while True:
            now = time.monotonic()
            # A request that waits for an engine may still fail and need an error status. A heartbeat would send the
            # status 200 before that, so no heartbeat is sent while placed_at() returns None.
            since = self._last_sent if self._started else self._placed_at()
            if since is None:
                since = now
            elif now - since >= self._heartbeat_seconds:
                await self._send(send, _KEEP_ALIVE)
                since = now
            await asyncio.sleep(since + self._heartbeat_seconds - now)

    async def _send(self, send: Send, data: bytes) -> None:
        # The writer and the heartbeat both send; the lock makes sure that the headers go first.
        async with self._sending:
            if not self._started:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                self._started = True
            await send({"type": "http.response.body", "body": data, "more_body": True})
            self._last_sent = time.monotonic()

    async def _fail(self, error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        if not isinstance(error, ApiError):
            logger.error("stream failed", exc_info=error, extra={"request_id": self._record.request_id})
            error = internal_error(self._record.request_id)
        self._record.error = error.code
        if self._started:
            last = encode_event(error.body, "error" if self._named else "")
            await send({"type": "http.response.body", "body": last, "more_body": False})
        else:
            await error.response()(scope, receive, send)
