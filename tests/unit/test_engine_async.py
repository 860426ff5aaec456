"""The engine on a thread: streams, cancellation, stopping and failing."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator

import pytest

from nanochat_core.constraints.trial import Trial
from nanochat_core.engine import (
    AsyncEngine,
    Completion,
    Constraint,
    ConstraintKind,
    Engine,
    EngineConfig,
    EngineDead,
    QueueFull,
    Request,
    SamplingParams,
    Stream,
    async_engine,
)
from nanochat_core.errors import UserError
from tests.support.engine_models import BYTES, tiny_model

# Answers that last for seconds. Nothing repeats itself in a sampled answer, so drafts save no steps.
CONTEXT = 8192
LONG = SamplingParams(max_tokens=0, temperature=2.0, seed=1)


@pytest.fixture
async def engine() -> AsyncIterator[AsyncEngine]:
    running = AsyncEngine(Engine(tiny_model(context_length=CONTEXT), BYTES, EngineConfig(max_running=4, max_waiting=2)))
    running.start()
    yield running
    await running.stop()


async def read(stream: Stream, n: int = 1) -> list[Completion]:
    completions = [Completion() for _ in range(n)]
    async for output in stream:
        completions[output.index].append(output)
    return completions


async def test_streams_give_the_tokens_of_a_plain_run(engine: AsyncEngine) -> None:
    prompts = [tuple(range(i, i + 20)) for i in range(4)]
    sampling = SamplingParams(max_tokens=25, temperature=0.8, seed=4)
    streams = [await engine.submit(Request(str(i), p, sampling, n=1)) for i, p in enumerate(prompts)]
    got = [c.token_ids for stream in streams for c in await read(stream)]
    plain = Engine(tiny_model(context_length=CONTEXT), BYTES).generate(prompts, sampling)
    assert got == [c.token_ids for [c] in plain]


async def test_a_slow_reader_gets_everything_in_few_pieces(engine: AsyncEngine) -> None:
    stream = await engine.submit(Request("r", (1,), SamplingParams(max_tokens=50, temperature=1.0, seed=1), n=3))
    while not stream.finished:
        await asyncio.sleep(0.01)
    outputs = [output async for output in stream]
    assert len(outputs) == 3
    assert [len(output.tokens) for output in outputs] == [50] * 3


async def test_closing_a_stream_frees_its_cache(engine: AsyncEngine) -> None:
    stream = await engine.submit(Request("r", tuple(range(100)), LONG))
    await anext(stream)
    engine.close_stream("r")
    async with asyncio.timeout(60):
        while engine.load().running or engine.load().blocks_used:
            await asyncio.sleep(0.01)
    await engine.drained()


async def test_an_id_can_be_used_again_after_a_cancellation(engine: AsyncEngine) -> None:
    await engine.submit(Request("r", (1, 2, 3), LONG))
    engine.close_stream("r")
    stream = await engine.submit(Request("r", (1, 2, 3), SamplingParams(max_tokens=3)))
    [completion] = await read(stream)
    assert len(completion.tokens) == 3


async def test_refusals_reach_the_caller(engine: AsyncEngine) -> None:
    with pytest.raises(UserError, match="prompt is empty"):
        await engine.submit(Request("r", ()))
    for i in range(6):
        await engine.submit(Request(str(i), (1,), LONG))
    with pytest.raises(QueueFull):
        await engine.submit(Request("late", (1,), LONG))
    with pytest.raises(UserError, match="in use"):
        await engine.submit(Request("0", (1,), LONG))
    for i in range(6):
        engine.close_stream(str(i))
    await engine.drained()


async def test_drained_waits_for_open_streams(engine: AsyncEngine) -> None:
    stream = await engine.submit(Request("r", (1,), SamplingParams(max_tokens=20)))
    waiter = asyncio.create_task(engine.drained())
    await read(stream)
    assert not waiter.done()
    engine.close_stream("r")
    await asyncio.wait_for(waiter, 30)


class Panic(BaseException):
    """Imitates an exception of a Rust library."""


@pytest.mark.parametrize("kind", [RuntimeError, Panic])
async def test_an_error_in_the_loop_fails_every_stream_and_is_reported(
    kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    core, died = Engine(tiny_model(context_length=CONTEXT), BYTES), asyncio.Event()
    engine = AsyncEngine(core, on_death=died.set)
    engine.start()
    streams = [await engine.submit(Request(str(i), (1,), LONG)) for i in range(2)]
    await anext(streams[0])

    def out_of_memory(*_args: object) -> None:
        raise kind("device on fire")

    core.runner.run = out_of_memory  # type: ignore[method-assign,assignment]
    for stream in streams:
        with pytest.raises(EngineDead, match="device on fire"):
            await read(stream)
    await asyncio.wait_for(died.wait(), 30)
    with pytest.raises(EngineDead):
        await engine.submit(Request("late", (1,), LONG))
    assert "engine_died" in caplog.text
    await engine.stop()


async def test_what_has_finished_can_be_read_after_the_end() -> None:
    engine = AsyncEngine(Engine(tiny_model(), BYTES))
    engine.start()
    stream = await engine.submit(Request("r", (1,), SamplingParams(max_tokens=3)))
    while not stream.finished:
        await asyncio.sleep(0.01)
    await engine.stop()
    [completion] = await read(stream)
    assert len(completion.tokens) == 3


async def test_a_step_that_hangs_is_seen_and_does_not_keep_the_engine_from_stopping(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(async_engine, "STOP_SECONDS", 0.1)
    core, hung, release = Engine(tiny_model(), BYTES), threading.Event(), threading.Event()

    def hang(*_args: object) -> None:
        hung.set()
        release.wait()
        raise RuntimeError("let go")

    core.runner.run = hang  # type: ignore[method-assign,assignment]
    died: list[bool] = []
    engine = AsyncEngine(core, on_death=lambda: died.append(True))
    engine.start()
    assert engine.step_seconds() == 0
    stream = await engine.submit(Request("r", (1,), LONG))
    await asyncio.to_thread(hung.wait)
    await asyncio.sleep(0.05)
    assert engine.step_seconds() >= 0.05
    assert not await engine.stop()
    with pytest.raises(EngineDead, match="hangs"):
        await read(stream)
    release.set()
    while any(thread.name == async_engine.DEVICE_LOOP for thread in threading.enumerate()):
        await asyncio.sleep(0.01)
    await asyncio.sleep(0)
    assert not died, "it had been given up"


async def test_constraints_are_compiled_only_for_requests_that_there_is_room_for() -> None:
    core = Engine(tiny_model(), BYTES, EngineConfig(max_running=1, max_waiting=1))
    compile_, compiled = core.grammars.compile, set()

    def counting(constraint: Constraint, trial: Trial) -> object:
        compiled.add(constraint)
        time.sleep(0.05)
        return compile_(constraint, trial)

    core.grammars.compile = counting  # type: ignore[method-assign,assignment]
    engine = AsyncEngine(core)
    engine.start()

    async def ask(i: int) -> int:
        constraint = Constraint(ConstraintKind.REGEX, f"a{{{i + 1}}}")
        try:
            return len(await read(await engine.submit(Request(str(i), (1,), SamplingParams(constraint=constraint)))))
        finally:
            engine.close_stream(str(i))

    never = Request("many", (1,), SamplingParams(constraint=Constraint(ConstraintKind.REGEX, "a")), n=5)
    with pytest.raises(UserError, match="n is 5"):
        await engine.submit(never)
    results = await asyncio.gather(*map(ask, range(5)), return_exceptions=True)
    assert [type(result) for result in results] == [int, int, QueueFull, QueueFull, QueueFull]
    assert len(compiled) == 2
    await engine.stop()


async def test_stopping_fails_what_still_runs() -> None:
    engine = AsyncEngine(Engine(tiny_model(context_length=CONTEXT), BYTES))
    engine.start()
    stream = await engine.submit(Request("r", (1,), LONG))
    await engine.stop()
    with pytest.raises(EngineDead, match="stopped"):
        await read(stream)
