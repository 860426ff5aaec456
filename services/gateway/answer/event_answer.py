"""Answers that stream named events: the form of OpenAI's Responses API and of Anthropic's Messages API."""

import abc
import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any

from services.gateway.answer.event_stream import encode_event
from services.gateway.answer.response import Answer

Event = dict[str, Any]


class EventAnswer(Answer):
    """Writes an answer as events. A client that asks for no stream gets one JSON object with the same content."""

    named_events = True

    @abc.abstractmethod
    def write(self) -> AsyncGenerator[list[Event], None]:
        """Yields all events of the answer. Events that come from the same chunk of the engine are in one list."""

    @abc.abstractmethod
    def result(self) -> dict[str, Any]:
        """Returns the JSON object of the answer so far. After the last event, the object is complete."""

    async def whole(self) -> dict[str, Any]:
        async with contextlib.aclosing(self.write()) as written:
            async for _ in written:
                pass
        return self.result()

    async def events(self) -> AsyncGenerator[bytes, None]:
        async with contextlib.aclosing(self.write()) as written:
            async for events in written:
                if events:
                    yield b"".join(map(self._encode_event, events))

    @staticmethod
    def encode(value: dict[str, Any]) -> bytes:
        """Returns an object as JSON.

        The object may contain huge integers from the client's parameters or from a call's arguments. orjson refuses
        these integers, so this method uses the standard library's encoder.
        """
        return json.dumps(value).encode()

    def _encode_event(self, event: Event) -> bytes:
        return encode_event(self.encode(event), event["type"])
