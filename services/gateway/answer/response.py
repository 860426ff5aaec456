"""The answer to one request: sends its prompts to the engines and writes the JSON response, whole or streamed."""

import abc
import contextlib
import hashlib
import itertools
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any, ClassVar

import orjson
from fastapi.responses import JSONResponse
from starlette.requests import Request
from starlette.responses import Response

from services.gateway.answer.choice_decoder import Delta
from services.gateway.answer.choices import decode_choices
from services.gateway.answer.event_stream import EventStream
from services.gateway.answer.merge import merge
from services.gateway.engines.migration import Stream
from services.gateway.engines.model import ServedModel
from services.gateway.engines.pool import EnginePool
from services.gateway.engines.request import PromptEncoder
from services.gateway.middleware.drain import Drain
from services.gateway.middleware.request_log import RequestRecord
from services.gateway.schemas import Body


class Answer(abc.ABC):
    """The answer to one request. All its prompts go to the engines at the same time, each with ``n`` choices.

    Choice ``j`` of prompt ``k`` has the index ``k * n + j``. A subclass for each endpoint writes the choices as JSON.
    """

    id_prefix: ClassVar[str]  # first part of a response's id
    kind: ClassVar[str]  # field "object" of a whole response
    chunk_kind: ClassVar[str]  # field "object" of a streamed chunk
    raw: ClassVar[bool] = False  # whether Python code and its output are shown as text

    def __init__(self, request: Request, pool: EnginePool, body: Body, prompts: Sequence[PromptEncoder]) -> None:
        self.body = body
        self._request = request
        self._record: RequestRecord = request.state.record
        self._pool = pool
        self._prompts = prompts
        self._n = body.n or 1
        # The engine always gets a seed, so that two replicas give the same answer to the same engine request.
        self._seed = secrets.randbits(64) if body.seed is None else body.seed
        self._streams: dict[int, Stream] = {}  # by the prompt's index
        self._id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    @abc.abstractmethod
    def whole(self, index: int, delta: Delta) -> dict[str, Any]:
        """Returns the JSON object of a finished choice. ``delta`` has the whole content of the choice."""

    @abc.abstractmethod
    def pieces(self, index: int, delta: Delta) -> Iterator[dict[str, Any]]:
        """Yields the JSON objects that carry the content of ``delta``, one object for each streamed chunk."""

    def opening(self) -> Iterator[dict[str, Any]]:
        """Yields the JSON objects of choices with which a stream begins."""
        return iter(())

    async def respond(self) -> Response:
        """Returns the response, streamed if the request asks for that."""
        drain: Drain = self._request.app.state.drain
        if self.body.stream:
            heartbeat = self._pool.settings.heartbeat_seconds
            return EventStream(self._events(), drain, self._record, heartbeat, self._placed_at)
        return JSONResponse(await drain.run(self._collect(), self._request.receive, self._record))

    async def _events(self) -> AsyncGenerator[bytes, None]:
        with_usage = self.body.stream_options is not None and self.body.stream_options.include_usage
        # If the request asks for the token counts, OpenAI's API sends ``"usage": null`` in every chunk except the last.
        tail = {"usage": None} if with_usage else {}
        opening = self.opening()  # the generator yields nothing after the first delta
        async with self._deltas() as deltas:
            async for index, delta in deltas:
                choices = itertools.chain(opening, self.pieces(index, delta))
                events = [_event(self._response(self.chunk_kind, index, [choice]) | tail) for choice in choices]
                if events:
                    yield b"".join(events)
        if with_usage:
            yield _event(self._response(self.chunk_kind, 0, []) | {"usage": self._usage()})
        yield b"data: [DONE]\n\n"

    async def _collect(self) -> dict[str, Any]:
        wholes = [Delta() for _ in range(self._n * len(self._prompts))]
        async with self._deltas() as deltas:
            async for index, delta in deltas:
                wholes[index].append(delta)
        choices = [self.whole(index, whole) for index, whole in enumerate(wholes)]
        return self._response(self.kind, 0, choices) | {"usage": self._usage()}

    def _deltas(self) -> contextlib.aclosing[AsyncGenerator[tuple[int, Delta], None]]:
        sources = [self._generate(k) for k in range(len(self._prompts))]
        return contextlib.aclosing(sources[0] if len(sources) == 1 else merge(sources))

    async def _generate(self, k: int) -> AsyncGenerator[tuple[int, Delta], None]:
        body, record, n = self.body, self._record, self._n
        stream = self._streams[k] = Stream(
            self._pool,
            body,
            self._prompts[k],
            caller=_caller(self._request),
            request_id=record.request_id,
            # Each prompt has a seed of its own, so that equal prompts get different answers.
            seed=self._seed + k,
        )
        with contextlib.closing(stream):
            await stream.start()
            deltas = decode_choices(stream, self._pool.metrics, record, n=n, stops=body.stop or (), raw=self.raw)
            async for index, delta in deltas:
                yield k * n + index, delta

    def model(self, index: int) -> ServedModel:
        """Returns the model that writes the choice."""
        return self._streams[index // self._n].model

    def _placed_at(self) -> float | None:
        """Returns the time at which the first prompt reached an engine, or None while all prompts wait."""
        times = [stream.placed_at for stream in self._streams.values()]
        return min((time for time in times if time is not None), default=None)

    def _usage(self) -> dict[str, Any]:
        record = self._record
        return {
            "prompt_tokens": record.prompt_tokens,
            "completion_tokens": record.completion_tokens,
            "total_tokens": record.prompt_tokens + record.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": record.cached_prompt_tokens},
        }

    def _response(self, kind: str, index: int, choices: list[dict[str, Any]]) -> dict[str, Any]:
        model = self.model(index)
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": model.info.name,
            "system_fingerprint": model.fingerprint,
            "choices": choices,
        }


def _caller(request: Request) -> str:
    """Returns an id of the sender: a digest of the API key, or the client's address if there is no key."""
    key = request.headers.get("authorization") or request.headers.get("x-api-key")
    if key:
        return hashlib.sha256(key.encode()).hexdigest()
    return request.client.host if request.client else ""


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"
