"""Parses JSON request bodies without delaying other requests, and reports the error in a malformed body."""

import asyncio
import concurrent.futures
import gc
import re
import time
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from nanochat_core.fair_slots import FairSlots
from services.gateway.admission.caller import Caller
from services.gateway.errors import ClientGone, bad_request

# A body of more bytes than this is parsed in a thread, so that it does not delay the event loop. Parsing a body of this
# size takes at most about 2 ms, whatever the body contains; parsing 1 MB takes up to 25 ms.
_INLINE_BYTES = 65_536
# After each large body, the parsing thread rests for this many times the duration of the parsing.
_REST = 9
# An escape in a JSON string: a surrogate pair, half of a pair that stands alone (group "half"), or any other escape.
_ESCAPE = re.compile(rb"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(?P<half>u[dD][89a-fA-F]..)|.)", re.DOTALL)


class Parser:
    """Parses large bodies one after the other in one thread, which rests after each body. Callers take turns.

    While a JSON parser works, it holds Python's global lock, and the event loop waits. With several
    threads, or without these rests, the loop would get the lock too seldom while many large bodies arrive.
    """

    def __init__(self) -> None:
        self._turn = FairSlots(1)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "json")
        self._rest_ends = 0.0  # on the monotonic clock

    async def parse(self, body: bytes, caller: str) -> Any:
        """Parses a body that the caller with the id ``caller`` sent. Result and errors are those of :func:`parse`."""
        await self._turn.acquire(caller)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._parse, body)
        finally:
            self._turn.release()

    def _parse(self, body: bytes) -> Any:
        time.sleep(max(0.0, self._rest_ends - time.monotonic()))
        began = time.monotonic()
        # The garbage collector is off during the parsing, because it would visit the parsed objects, perhaps a million,
        # many times. Only this one thread switches the collector, so no other call switches it on again too early.
        gc.disable()
        try:
            return parse(body)
        finally:
            gc.enable()
            ended = time.monotonic()
            self._rest_ends = ended + _REST * (ended - began)


_PARSER = Parser()


class JsonRoute(APIRoute):
    """A route that parses request bodies with :func:`parse`. Large bodies are parsed outside the event loop."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Returns a handler that passes each request to FastAPI's handler as a :class:`_JsonRequest`."""
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return handle_json


class _JsonRequest(Request):
    async def body(self) -> bytes:
        try:
            return await super().body()
        except ClientDisconnect as error:
            raise ClientGone from error

    async def json(self) -> Any:
        body = await self.body()
        if len(body) <= _INLINE_BYTES:
            return parse(body)
        caller: Caller = self.scope["state"]["caller"]
        return await _PARSER.parse(body, caller.id)


def parse(body: bytes) -> Any:
    """Returns the JSON value of a body, or raises an :class:`ApiError` with status 400 that says what is wrong.

    A half of a surrogate pair without its other half is read as U+FFFD, because UTF-8 cannot express it. Clients send a
    single half if they cut text in the middle of a pair.
    """
    try:
        try:
            return from_json(body)
        except ValueError as error:
            if "hex escape" not in str(error):
                raise
            return from_json(_ESCAPE.sub(_mended, body))
    except ValueError as error:
        message = f"The request body is not valid JSON: {error}."
        raise bad_request(message, None, "invalid_json") from error


def _mended(escape: re.Match[bytes]) -> bytes:
    return rb"\ufffd" if escape["half"] else escape[0]
