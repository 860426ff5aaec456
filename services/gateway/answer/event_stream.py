"""Answers that take their time: server-sent events, heartbeats, and clients that leave."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.gateway.errors import ApiError, ClientGone, error_response, shutting_down
from services.gateway.middleware.drain import Drain
from services.gateway.middleware.request_log import RequestRecord

logger = logging.getLogger(__name__)

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": keep-alive\n\n"


def dumps(value: Any) -> str:
    """Compact JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def event(value: Any) -> bytes:
    """One server-sent event with ``value`` as JSON."""
    return f"data: {dumps(value)}\n\n".encode()


async def supervise(work: Coroutine[Any, Any, T], receive: Receive, drain: Drain, record: RequestRecord) -> T:
    """Run ``work`` until it is done, the client leaves, or the time to drain is over; then it is cancelled.

    Args:
        receive: of a request whose body has been read.

    Raises:
        ClientGone: the client left first.
        ApiError: 503, the gateway is shutting down; or what ``work`` raised.
    """
    if drain.draining:
        work.close()
        raise shutting_down()
    with drain.answering():
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_disconnected(receive))
        over = asyncio.ensure_future(drain.expired.wait())
        try:
            await asyncio.wait({task, gone, over}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                record.status = 499
                raise ClientGone
            raise shutting_down()
        finally:
            await _stop(task, gone, over)


async def _stop(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends events as they come.

    Nothing is sent before the first event, or the first heartbeat if that is earlier: a failure until then is an
    ordinary error response with its status. A later one is an event ``{"error": ...}`` that ends the stream.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        drain: Drain,
        record: RequestRecord,
        heartbeat_seconds: float,
    ) -> None:
        """
        Args:
            events: complete events, encoded; closed when the client leaves.
            heartbeat_seconds: longest silence.
        """
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        # The length isn't known.
        del self.headers["content-length"]
        self._events = events
        self._drain = drain
        self._record = record
        self._heartbeat_seconds = heartbeat_seconds
        self._started = False
        self._last_sent = 0.0
        self._sending = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        heartbeat = asyncio.ensure_future(self._beat(send))
        try:
            await supervise(self._write(send), receive, self._drain, self._record)
        except ClientGone:
            return
        except Exception as error:
            await _stop(heartbeat)
            await self._fail(error, scope, receive, send)
        else:
            await _stop(heartbeat)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await _stop(heartbeat)
            await self._events.aclose()

    async def _write(self, send: Send) -> None:
        async for data in self._events:
            await self._send(send, data)

    async def _beat(self, send: Send) -> None:
        self._last_sent = time.monotonic()
        while True:
            quiet = time.monotonic() - self._last_sent
            if quiet >= self._heartbeat_seconds:
                await self._send(send, _KEEP_ALIVE)
                quiet = 0.0
            await asyncio.sleep(self._heartbeat_seconds - quiet)

    async def _send(self, send: Send, data: bytes) -> None:
        # The writer and the heartbeat must not overtake each other before the headers are out.
        async with self._sending:
            if not self._started:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                self._started = True
            await send({"type": "http.response.body", "body": data, "more_body": True})
            self._last_sent = time.monotonic()

    async def _fail(self, error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        if not isinstance(error, ApiError):
            logger.error("stream failed", exc_info=error, extra={"request_id": self._record.request_id})
            message = f"The gateway failed on this request; its id in the log is {self._record.request_id}."
            error = ApiError(500, message, code="internal_error")
        self._record.error = error.code
        if not self._started:
            await error_response(error)(scope, receive, send)
            return
        await send({"type": "http.response.body", "body": event(error.body), "more_body": False})
