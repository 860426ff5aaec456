"""Engines die, hang and drain in any order, and each client still gets its text exactly once."""

import asyncio
import contextlib
import dataclasses
import functools
from typing import Any
from unittest import mock

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nanochat_core.protos import engine_pb2 as pb
from services.gateway.engines import migration
from services.gateway.engines.channel import open_channel
from services.gateway.engines.migration import Stream
from services.gateway.engines.model import ServedModel
from services.gateway.engines.pool import EnginePool
from services.gateway.metrics import Metrics
from services.gateway.schemas import CompletionRequest
from services.gateway.settings import GatewaySettings
from tests.support.scripted_engine import SPECIAL
from tests.support.story_engine import Step, StoryEngine

ENGINES = 3
LENGTH = 12
ENGINE = st.integers(0, ENGINES - 1)


def story(request: pb.GenerateRequest, index: int) -> list[Step]:
    """An answer with a tool call in the middle. Each token names its request, its choice and its position."""
    seed = request.sampling.seed
    steps = [Step((seed * 31 + index * 17 + k * 7) % 256) for k in range(LENGTH - 1)]
    call = pb.ToolEvent(call=pb.ToolCall(call_index=0, code=f"{seed}/{index}"))
    result = pb.ToolEvent(result=pb.ToolResult(call_index=0, status="ok", output=f"{index}"))
    steps[4] = dataclasses.replace(steps[4], events=(call,))
    steps[5] = dataclasses.replace(steps[5], forced=True, events=(result,))
    return [*steps, Step(SPECIAL["<|assistant_end|>"])]


class Client:
    """Reads one stream and keeps the contents of each choice."""

    def __init__(self, pool: EnginePool, seed: int, n: int) -> None:
        self.request = pb.GenerateRequest(n=n)
        self.request.sampling.seed = seed
        self.steps: list[list[Step]] = [[] for _ in range(n)]
        self.ended = [False] * n
        self._stream = Stream(
            pool,
            CompletionRequest.model_validate({"prompt": "hi", "n": n}),
            self._encode,
            caller=str(seed % 2),
            request_id=str(seed),
            seed=seed,
            sandbox=True,
        )
        self.reading = asyncio.create_task(self._read())

    async def _encode(self, _model: ServedModel) -> list[int]:
        return [1, 2, 3]

    async def _read(self) -> None:
        try:
            await self._stream.start()
            while (chunk := await self._stream.read()) is not None:
                assert not self.ended[chunk.index]
                (token,) = chunk.tokens
                self.steps[chunk.index].append(Step(token.id, token.forced, tuple(chunk.tool_events)))
                self.ended[chunk.index] = chunk.finish_reason == pb.FINISH_REASON_STOP
                if self.ended[chunk.index]:
                    assert chunk.usage.completion_tokens == LENGTH
        finally:
            self._stream.close()

    def check(self) -> None:
        """Fails unless each choice so far is the beginning of its story."""
        if self.reading.done() and not self.reading.cancelled():
            self.reading.result()
        for index, steps in enumerate(self.steps):
            assert steps == story(self.request, index)[: len(steps)]


class Streams(RuleBasedStateMachine):
    """Clients, a pool and three engines. In any order, engines die, hang, drain, come back or send some more tokens."""

    @initialize()
    def begin(self) -> None:
        # No stream may give up here. On a busy machine, an engine may seem to hang again and again.
        self.patches = contextlib.ExitStack()
        self.patches.enter_context(mock.patch.object(migration, "_MOST_FAILURES", 1000))
        self.patches.enter_context(mock.patch.object(migration, "_PAUSE_SECONDS", 1e-6))
        self.runner = asyncio.Runner()
        self.engines = [StoryEngine(story) for _ in range(ENGINES)]
        self.clients: list[Client] = []
        self.pool = self.runner.run(self._start())

    async def _start(self) -> EnginePool:
        for engine in self.engines:
            engine.steps = 0
            await engine.start()
        gateway = GatewaySettings(
            engine_addresses=tuple(engine.address for engine in self.engines),
            poll_seconds=0.05,
            health_timeout_seconds=0.3,
            queue_seconds=60,
            max_failures=1000,
        )
        pool = EnginePool(gateway, Metrics(), functools.partial(open_channel, settings=gateway))
        # Another test checks the budget for retries.
        pool.retries.spend = lambda: True  # type: ignore[method-assign]
        return pool

    @rule(n=st.integers(1, 3))
    @precondition(lambda self: len(self.clients) < 6)
    def ask(self, n: int) -> None:
        async def add() -> None:
            self.clients.append(Client(self.pool, len(self.clients), n))

        self.runner.run(add())

    @rule(engine=ENGINE, steps=st.integers(1, 15))
    def speak(self, engine: int, steps: int) -> None:
        self.engines[engine].allow(steps)

    @rule(engine=ENGINE)
    def kill(self, engine: int) -> None:
        self.runner.run(self.engines[engine].stop())

    @rule(engine=ENGINE)
    def restart(self, engine: int) -> None:
        self.runner.run(self._restart(self.engines[engine]))

    async def _restart(self, engine: StoryEngine) -> None:
        await engine.stop()
        await engine.start()

    @rule(engine=ENGINE)
    def hang(self, engine: int) -> None:
        self.engines[engine].hang()

    @rule(engine=ENGINE)
    def resume(self, engine: int) -> None:
        self.engines[engine].resume()

    @rule(engine=ENGINE)
    def drain(self, engine: int) -> None:
        self.runner.run(self.engines[engine].drain())

    @rule(data=st.data())
    @precondition(lambda self: self.clients)
    def leave(self, data: Any) -> None:
        data.draw(st.sampled_from(self.clients)).reading.cancel()
        self.runner.run(asyncio.sleep(0))

    @rule(seconds=st.sampled_from([0.001, 0.01, 0.05, 0.3, 0.8]))
    def wait(self, seconds: float) -> None:
        self.runner.run(asyncio.sleep(seconds))

    @invariant()
    def nothing_is_said_twice_or_left_out(self) -> None:
        for client in getattr(self, "clients", ()):
            client.check()
        assert not any(engine.wrong for engine in getattr(self, "engines", ()))

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            try:
                self.runner.run(self._end())
            finally:
                self.runner.close()
                self.patches.close()

    async def _end(self) -> None:
        try:
            for engine in self.engines:
                engine.allow(None)
                await self._restart(engine)
            async with asyncio.timeout(60):
                await asyncio.wait(
                    {client.reading for client in self.clients} or {asyncio.create_task(asyncio.sleep(0))}
                )
            for client in self.clients:
                client.check()
                assert client.reading.cancelled() or all(client.ended)
            assert not any(engine.wrong for engine in self.engines)
            assert all(replica.idle for replica in self.pool._replicas.values())
        finally:
            await self.pool.aclose()
            for engine in self.engines:
                engine.resume()
                await engine.stop()


TestStreams = Streams.TestCase
TestStreams.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


async def test_two_hundred_streams_outlive_both_of_their_engines() -> None:
    engines = [StoryEngine(story) for _ in range(2)]
    for engine in engines:
        engine.pause = 0.15
        await engine.start()
    addresses = tuple(engine.address for engine in engines)
    gateway = GatewaySettings(engine_addresses=addresses, health_timeout_seconds=20)  # no engine hangs in this test
    pool = EnginePool(gateway, Metrics(), functools.partial(open_channel, settings=gateway))
    clients = [Client(pool, seed, 1) for seed in range(200)]
    first, second = engines
    for happens in (first.stop, first.start, second.stop, second.start, first.drain):
        await asyncio.sleep(0.4)
        await happens()
    async with asyncio.timeout(60):
        await asyncio.gather(*(client.reading for client in clients))
    for client in clients:
        client.check()
        assert all(client.ended)
    assert not first.wrong
    assert not second.wrong
    await pool.aclose()
    for engine in engines:
        await engine.stop()
