"""Answers that take time: server-sent events, heartbeats, and clients that leave before the end."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.gateway.errors import ApiError, ClientGone, internal_error, shutting_down
from services.gateway.middleware.drain import Drain
from services.gateway.middleware.request_log import RequestRecord

logger = logging.getLogger(__name__)

T = TypeVar("T")

_KEEP_ALIVE = b": keep-alive\n\n"


async def supervise(work: Coroutine[Any, Any, T], receive: Receive, drain: Drain, record: RequestRecord) -> T:
    """Runs ``work`` until it is done, and cancels it if the client leaves or the gateway has to end.

    Args:
        receive: the request's ASGI ``receive``; the body must have been read already.

    Raises:
        ClientGone: the client left first.
        ApiError: 503 if the gateway is shutting down.
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
            await _cancel(task, gone, over)


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response of server-sent events. Each event is sent as soon as it is ready.

    The response begins with the first event, or with the first heartbeat if that is earlier. A failure before that is
    an ordinary error response with its own status. A later failure is an event ``{"error": ...}`` that ends the stream.
    """

    def __init__(
        self, events: AsyncGenerator[bytes, None], drain: Drain, record: RequestRecord, heartbeat_seconds: float
    ) -> None:
        """
        Args:
            events: complete, encoded events; the stream closes the generator when the client leaves.
            heartbeat_seconds: longest silence; after that the stream sends a comment line.
        """
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]  # a stream does not know its length
        self._events = events
        self._drain = drain
        self._record = record
        self._heartbeat_seconds = heartbeat_seconds
        self._started = False
        self._last_sent = 0.0
        self._sending = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await supervise(self._write(send), receive, self._drain, self._record)
        except ClientGone:
            return
        except Exception as error:
            await self._fail(error, scope, receive, send)
        else:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, send: Send) -> None:
        heartbeat = asyncio.ensure_future(self._beat(send))
        try:
            async with contextlib.aclosing(self._events) as events:
                async for data in events:
                    await self._send(send, data)
        finally:
            await _cancel(heartbeat)

    async def _beat(self, send: Send) -> None:
        self._last_sent = time.monotonic()
        while True:
            quiet = time.monotonic() - self._last_sent
            if quiet >= self._heartbeat_seconds:
                await self._send(send, _KEEP_ALIVE)
                quiet = 0.0
            await asyncio.sleep(self._heartbeat_seconds - quiet)

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
            last = b"data: " + error.body + b"\n\n"
            await send({"type": "http.response.body", "body": last, "more_body": False})
        else:
            await error.response()(scope, receive, send)
