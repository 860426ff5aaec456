"""Answers with a list of choices: the form of OpenAI's chat completions and text completions."""

import abc
import itertools
from collections.abc import AsyncGenerator, Iterator
from typing import Any, ClassVar

from services.gateway.answer.choice_decoder import Delta
from services.gateway.answer.event_stream import DONE, encode_event
from services.gateway.answer.response import Answer
from services.gateway.engines.request import off_loop


class ChoiceAnswer(Answer):
    """Writes the choices of an answer as JSON. Each endpoint has a subclass, whose methods write a single choice."""

    kind: ClassVar[str]  # field "object" of a whole response
    chunk_kind: ClassVar[str]  # field "object" of a streamed chunk

    @abc.abstractmethod
    def choice(self, index: int, delta: Delta) -> dict[str, Any]:
        """Returns the JSON object of a finished choice. ``delta`` contains the whole content of the choice."""

    @abc.abstractmethod
    def pieces(self, index: int, delta: Delta) -> Iterator[dict[str, Any]]:
        """Yields the JSON objects that carry the content of ``delta``, one object for each streamed chunk."""

    def opening(self) -> Iterator[dict[str, Any]]:
        """Yields the choice objects with which a stream begins; none by default."""
        return iter(())

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yields chunks, then the token counts if the request asks for them, then the end of the stream."""
        options = self.body.stream_options
        with_usage = options is not None and options.include_usage
        continuous = with_usage and options is not None and options.continuous_usage_stats
        opening = self.opening()  # an iterator: the first delta consumes it, so the opening is sent once
        async with self.deltas() as deltas:
            async for index, delta in deltas:
                # If the request asks for token counts, every chunk has the field ``usage``. As in OpenAI's API, it is
                # null except in the last chunk, unless the request wants continuous counts.
                tail = {"usage": self._usage() if continuous else None} if with_usage else {}
                choices = itertools.chain(opening, self.pieces(index, delta))
                events = [self._event(self._response(self.chunk_kind, index, [choice]) | tail) for choice in choices]
                if events:
                    yield b"".join(events)
        if with_usage:
            yield self._event(self._response(self.chunk_kind, 0, []) | {"usage": self._usage()})
        yield DONE

    async def whole(self) -> dict[str, Any]:
        wholes = [Delta() for _ in range(self.n * len(self.prompts))]
        async with self.deltas() as deltas:
            async for index, delta in deltas:
                wholes[index].append(delta)
        tokens = sum(len(delta.prompt_tokens) + len(delta.tokens) for delta in wholes)
        choices = await off_loop(tokens, lambda: [self.choice(index, delta) for index, delta in enumerate(wholes)])
        return self._response(self.kind, 0, choices) | {"usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        record = self.record
        return {
            "prompt_tokens": record.prompt_tokens,
            "completion_tokens": record.completion_tokens,
            "total_tokens": record.prompt_tokens + record.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": record.cached_prompt_tokens},
        }

    def _response(self, kind: str, index: int, choices: list[dict[str, Any]]) -> dict[str, Any]:
        model = self.model(index)
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": model.info.name,
            "system_fingerprint": model.fingerprint,
            "choices": choices,
        }

    def _event(self, value: dict[str, Any]) -> bytes:
        return encode_event(self.encode(value))
