"""Lets a client see an answer that is complete before the whole request has arrived."""

import asyncio
import contextlib

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Time for a client to read an early answer before the gateway closes the connection. Meanwhile, the rest of the request
# is read and dropped.
LINGER_SECONDS = 5
# Pause between two reads of the rest of a request. It limits the reading to about 12 MB a second for each connection.
DROP_SECONDS = 0.02
# The gateway does not read on for a body of at most this size, because such a body usually arrives together with the
# headers.
_SMALL_BYTES = 65_536


class UnreadBody:
    """ASGI middleware that, after an early answer such as 413, reads and drops the rest of the request for a while.

    Closing the connection immediately would reset it while the client is still sending, and the client would not see
    the answer. The rest is read slowly, so that many large bodies do not delay other requests. After
    :data:`LINGER_SECONDS` or the end of the request, the connection is closed.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _is_large(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        arrived = held = False

        async def receive_observed() -> Message:
            nonlocal arrived
            message = await receive()
            arrived = not message.get("more_body", False)  # also true if the client has left
            return message

        async def send_without_end(message: Message) -> None:
            nonlocal held
            if message["type"] == "http.response.start" and not arrived:
                MutableHeaders(scope=message)["connection"] = "close"
            elif message["type"] == "http.response.body" and not message.get("more_body", False) and not arrived:
                held = True
                message = {**message, "more_body": True}
            await send(message)

        await self._app(scope, receive_observed, send_without_end)
        if not held:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while not arrived:
                    await asyncio.sleep(DROP_SECONDS)
                    await receive_observed()
        await send({"type": "http.response.body"})


def _is_large(headers: Headers) -> bool:
    announced = headers.get("content-length", "")
    return "transfer-encoding" in headers or (announced.isdecimal() and int(announced) > _SMALL_BYTES)
