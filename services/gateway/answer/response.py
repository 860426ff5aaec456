"""Answers one request: sends its prompts to the engines, and responds in one piece or with a stream of events."""

import abc
import contextlib
import functools
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any, ClassVar

import orjson
from starlette.requests import Request
from starlette.responses import Response

from services.gateway.admission.grant import Grant
from services.gateway.admission.keys import Scope
from services.gateway.answer.choice_decoder import Delta
from services.gateway.answer.choices import decode_choices
from services.gateway.answer.event_stream import EventStream
from services.gateway.answer.merge import merge
from services.gateway.engines.migration import Stream
from services.gateway.engines.model import ServedModel
from services.gateway.engines.pool import EnginePool
from services.gateway.engines.request import PromptEncoder, most_answer_tokens
from services.gateway.middleware.drain import Drain
from services.gateway.middleware.request_log import RequestRecord
from services.gateway.schemas import Body, ChatParameters


class Answer(abc.ABC):
    """The answer to one request. All its prompts go to the engines at the same time, each with ``n`` choices.

    Choice ``j`` of prompt ``k`` has the index ``k * n + j``. Subclasses write the choices in the form of an API.
    """

    id_prefix: ClassVar[str]  # first part of a response's id
    named_events: ClassVar[bool] = False  # whether streamed events have names
    raw: ClassVar[bool] = False  # whether Python code and its output are shown as text

    def __init__(self, request: Request, pool: EnginePool, body: Body, prompts: Sequence[PromptEncoder]) -> None:
        self.body = body
        self.record: RequestRecord = request.state.record
        self.id = f"{self.id_prefix}{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.n = body.n or 1
        self.prompts = prompts
        self._request = request
        self._grant: Grant = request.state.grant
        self._charged: set[int] = set()  # indices of the prompts whose tokens are reserved
        self._pool = pool
        # The engine always gets a seed, so that a second replica that repeats or continues an answer writes the same
        # tokens as the first replica would, apart from rounding differences.
        self._seed = secrets.randbits(64) if body.seed is None else body.seed
        self._streams: dict[int, Stream] = {}  # the stream of each prompt, by the prompt's index

    @abc.abstractmethod
    def events(self) -> AsyncGenerator[bytes, None]:
        """Yields the encoded events of the streamed response."""

    @abc.abstractmethod
    async def whole(self) -> dict[str, Any]:
        """Returns the response in one piece."""

    async def respond(self) -> Response:
        """Returns the HTTP response, which is a stream of events if the request asks for a stream."""
        drain: Drain = self._request.app.state.drain
        if self.body.stream:
            heartbeat = self._pool.settings.heartbeat_seconds
            return EventStream(self.events(), drain, self.record, heartbeat, self._placed_at, named=self.named_events)
        whole = await drain.run(self.whole(), self._request.receive, self.record)
        return Response(self.encode(whole), media_type="application/json")

    @staticmethod
    def encode(value: dict[str, Any]) -> bytes:
        """Returns an object of the response as JSON.

        orjson is used, because FastAPI's own encoder would take seconds for the log probabilities of many prompts.
        orjson refuses huge integers, so the object must contain no numbers that the client sent.
        """
        return orjson.dumps(value)

    def deltas(self) -> contextlib.aclosing[AsyncGenerator[tuple[int, Delta], None]]:
        """Returns an async generator of ``(choice index, delta)`` pairs of all choices, in the order of arrival.

        The generator is the value of a context manager, which closes the generator.
        """
        sources = [self._generate(k) for k in range(len(self.prompts))]
        return contextlib.aclosing(sources[0] if len(sources) == 1 else merge(sources))

    async def _generate(self, k: int) -> AsyncGenerator[tuple[int, Delta], None]:
        body = self.body
        stream = self._streams[k] = Stream(
            self._pool,
            body,
            functools.partial(self._encode, k),
            caller=self._grant.caller.id,
            request_id=self.record.request_id,
            # Each prompt has a seed of its own, so that equal prompts get different answers.
            seed=self._seed + k,
            sandbox=Scope.SANDBOX in self._grant.caller.scopes,
        )
        with contextlib.closing(stream):
            await stream.start()
            deltas = decode_choices(
                stream,
                self._pool.metrics,
                self.record,
                n=self.n,
                stops=body.stop or (),
                raw=self.raw,
                calls=isinstance(body, ChatParameters) and bool(body.offered_tools),
                prompt_only=body.limit == 0,
            )
            async for index, delta in deltas:
                yield k * self.n + index, delta

    @property
    def temperature(self) -> float:
        """The temperature with which the answer is sampled."""
        default = self._pool.settings.default_temperature
        return default if self.body.temperature is None else self.body.temperature

    async def _encode(self, k: int, model: ServedModel) -> list[int]:
        """Returns the token ids of prompt ``k``.

        The first successful call for a prompt also reserves the tokens of the prompt and of its answers.
        """
        ids = await self.prompts[k](model)
        if k not in self._charged:
            answer = most_answer_tokens(self.body, model, len(ids), self._pool.settings)
            await self._grant.charge(len(ids), self.n * answer)
            self._charged.add(k)
        return ids

    def model(self, index: int) -> ServedModel:
        """Returns the model that writes the choice with the index ``index``."""
        return self._streams[index // self.n].model

    def _placed_at(self) -> float | None:
        """Returns the time at which the first prompt reached an engine, or None while all prompts wait for engines."""
        times = [stream.placed_at for stream in self._streams.values()]
        return min((time for time in times if time is not None), default=None)
