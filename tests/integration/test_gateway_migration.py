"""A stream whose engine dies, hangs or drains continues at another engine, and the client notices nothing."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import grpc
import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from nanochat_core.protos import engine_pb2 as pb
from tests.support.scripted_engine import (
    SPECIAL,
    failing,
    http_client,
    ids,
    openai_client,
    running_gateway,
    saying,
    until_ready,
    until_up,
)
from tests.support.story_engine import Step, Story, StoryEngine
from tests.support.waiting import until

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def story(_request: pb.GenerateRequest, index: int) -> list[Step]:
    """Text, a call of the tool with its output, and text. Each choice has its own number."""
    call = pb.ToolCall(call_index=0, code="1+2+3")
    result = pb.ToolResult(call_index=0, status="ok", output="6", duration_seconds=0.5)
    steps = [Step(token) for token in ids(f"{index}: hello world, the sum is ")]
    steps += [Step(token) for token in ids("<|python_start|>", "1+2+3")]
    steps.append(Step(SPECIAL["<|python_end|>"], events=(pb.ToolEvent(call=call),)))
    steps.append(Step(SPECIAL["<|output_start|>"], forced=True, events=(pb.ToolEvent(result=result),)))
    steps += [Step(token, forced=True) for token in ids("6", "<|output_end|>")]
    return steps + [Step(token) for token in ids("6, so stop it here", "<|assistant_end|>")]


class Told:
    """The part of a stream that a client has received."""

    def __init__(self, stream: openai.AsyncStream[ChatCompletionChunk]) -> None:
        self.stream = stream
        self.text: dict[int, str] = {}
        self.events: dict[int, list[Any]] = {}
        self.logprobs: dict[int, list[float]] = {}
        self.reasons: dict[int, str] = {}
        self.usage: Any = None
        self.more = asyncio.Event()

    async def read(self) -> "Told":
        async for chunk in self.stream:
            self.usage = chunk.usage or self.usage
            for choice in chunk.choices:
                k = choice.index
                self.text[k] = self.text.get(k, "") + (choice.delta.content or "")
                extension = (choice.delta.model_extra or {}).get("nanochat") or {}
                self.events.setdefault(k, []).extend(extension.get("tool_events", []))
                if choice.logprobs is not None and choice.logprobs.content:
                    self.logprobs.setdefault(k, []).extend(token.logprob for token in choice.logprobs.content)
                if choice.finish_reason:
                    assert k not in self.reasons, "a choice ended twice"
                    self.reasons[k] = choice.finish_reason
            self.more.set()
        return self

    def facts(self) -> list[Any]:
        return [self.text, self.events, self.logprobs, self.reasons, self.usage and self.usage.completion_tokens]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                self.more.clear()
                await self.more.wait()


async def ask(url: str, **options: Any) -> Told:
    create = openai_client(url).chat.completions.create
    with_usage = {"include_usage": True}
    return Told(await create(model="nano", messages=HELLO, stream=True, stream_options=with_usage, **options))


async def begin(url: str) -> tuple[Told, asyncio.Task[Told]]:
    """Sends a request and waits for the beginning of the answer. Returns this part and the task that reads the rest."""
    told = await ask(url)
    reading = asyncio.create_task(told.read())
    await told.until(lambda: len(told.text.get(0, "")) >= 3)
    return told, reading


@contextlib.asynccontextmanager
async def two_engines(**settings: Any) -> AsyncIterator[tuple[str, StoryEngine, StoryEngine]]:
    """Runs a gateway with two engines. Yields the gateway's URL and the engines."""
    one, two = StoryEngine(story), StoryEngine(story)
    await one.start()
    await two.start()
    async with running_gateway(one.address, two.address, **settings) as url:
        await until_up(url, 2)
        yield url, one, two
    for engine in (one, two):
        engine.resume()
        await engine.stop()


async def kill(engine: StoryEngine) -> None:
    await engine.stop()


async def hang(engine: StoryEngine) -> None:
    engine.hang()


async def drain(engine: StoryEngine) -> None:
    await engine.drain()


TROUBLE = pytest.mark.parametrize(("trouble", "reason"), [(kill, "died"), (hang, "hung"), (drain, "drains")])
Trouble = Callable[[StoryEngine], Coroutine[Any, Any, None]]

KINDS: list[dict[str, Any]] = [
    {},
    {"n": 2},
    {"n": 3, "logprobs": True},
    {"n": 2, "stop": ["so stop it"]},
    {"n": 2, "stop": ["sum is 6, so", "no such text"]},
]


async def metric(url: str, name: str) -> float:
    async with http_client(url) as http:
        lines = (await http.get("/metrics")).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"nanochat_gateway_{name}"))


@TROUBLE
@pytest.mark.parametrize("kind", KINDS)
async def test_a_stream_goes_on_at_the_other_engine_from_any_token(
    trouble: Trouble, reason: str, kind: dict[str, Any]
) -> None:
    # On a busy machine, an engine that runs may answer late. Only an engine that hangs must be noticed soon.
    limits = {"health_timeout_seconds": 0.3} if trouble is hang else {}
    async with two_engines(**limits) as (url, one, two):
        undisturbed = (await (await ask(url, **kind)).read()).facts()
        length = len(story(pb.GenerateRequest(), 0)) * kind.get("n", 1)
        for cut in range(1, length, length // 7):
            for engine in (one, two):
                engine.requests.clear()
                engine.steps = cut
            told = await ask(url, **kind)
            reading = asyncio.create_task(told.read())
            async with asyncio.timeout(60):
                while not (reading.done() or (one.requests and one.steps == 0) or (two.requests and two.steps == 0)):
                    await asyncio.sleep(0.005)
            first, second = (one, two) if one.requests else (two, one)
            await asyncio.sleep(0.02)  # let the tokens that were already sent arrive
            second.allow(None)
            await trouble(first)
            async with asyncio.timeout(60):
                await reading
            assert told.facts() == undisturbed
            assert not one.wrong
            assert not two.wrong
            first.resume()
            await first.stop()
            first.allow(None)
            await first.start()
            await until_up(url, 2)
        assert await metric(url, f'migrations_total{{reason="{reason}"}}') > 3
        assert await metric(url, f'migration_gap_seconds_count{{reason="{reason}"}}') > 3
        assert await metric(url, "streams_lost_total") == 0


async def test_a_hung_engine_is_noticed_within_its_two_checks() -> None:
    async with two_engines(poll_seconds=1.0, health_timeout_seconds=1.0) as (url, one, two):
        for engine in (one, two):
            engine.steps = 3
        told, reading = await begin(url)
        first, second = (one, two) if one.requests else (two, one)
        second.allow(None)
        first.hang()
        began = time.monotonic()
        await reading
        assert time.monotonic() - began < 15
        assert told.text[0].startswith("0: hello world")


class Resuming(StoryEngine):
    """An engine that reports no load after a pause until :attr:`reports` is set. Until then, it counts as hung."""

    def __init__(self, story: Story) -> None:
        super().__init__(story)
        self.reports = asyncio.Event()
        self.reports.set()

    async def GetLoad(self, request: pb.GetLoadRequest, context: Any) -> pb.Load:
        await self.reports.wait()
        return await super().GetLoad(request, context)


async def test_an_engine_that_only_pauses_keeps_its_stream_if_there_is_no_other() -> None:
    engine = Resuming(story)
    await engine.start()
    async with running_gateway(engine.address, health_timeout_seconds=1.0) as url:
        await until_ready(url)
        engine.steps = 3
        told, reading = await begin(url)
        engine.hang()
        engine.reports.clear()
        await until_ready(url, ready=False)
        engine.allow(None)
        engine.resume()
        await reading
        engine.reports.set()
        assert told.text[0].endswith("6, so stop it here")
        assert len(engine.requests) == 1
    await engine.stop()


async def test_a_draining_engine_without_another_keeps_its_streams_to_the_end() -> None:
    engine = StoryEngine(story)
    await engine.start()
    async with running_gateway(engine.address) as url:
        await until_ready(url)
        engine.steps = 3
        told, reading = await begin(url)
        await engine.drain()
        await until_ready(url, ready=False)
        engine.allow(None)
        await reading
        assert told.text[0].endswith("6, so stop it here")
    await engine.stop()


async def test_a_stream_waits_for_its_only_engine_to_come_back() -> None:
    engine = StoryEngine(story)
    await engine.start()
    async with running_gateway(engine.address) as url:
        await until_ready(url)
        engine.steps = 3
        told, reading = await begin(url)
        await engine.stop()
        await until_ready(url, ready=False)
        engine.allow(None)
        await engine.start()
        await reading
        assert told.text[0].endswith("6, so stop it here")
        assert not engine.wrong
    await engine.stop()


async def test_without_any_engine_a_stream_ends_with_words_for_a_person() -> None:
    async with two_engines(queue_seconds=0.3) as (url, one, two):
        for engine in (one, two):
            engine.steps = 3
        _, reading = await begin(url)
        await one.stop()
        await two.stop()
        with pytest.raises(openai.APIError, match="stopped in the middle of the answer; send the request again"):
            await reading
        assert await metric(url, "streams_lost_total") == 1


async def test_an_answer_that_reaches_the_time_limit_is_not_counted_as_lost() -> None:
    async with two_engines(request_timeout_seconds=5.0) as (url, one, two):
        for engine in (one, two):
            engine.steps = 3
        _, reading = await begin(url)
        with pytest.raises(openai.APIError, match="took longer than this server allows"):
            await reading
        assert await metric(url, "streams_lost_total") == 0


async def test_a_stream_never_goes_on_with_other_weights() -> None:
    async with two_engines(queue_seconds=0.3) as (url, one, two):
        two.info.digests["model.safetensors"] = two.info.revision = "other"
        await two.looked_at()
        one.steps = two.steps = 3
        _, reading = await begin(url)
        first, second = (one, two) if one.requests else (two, one)
        second.allow(None)
        await first.stop()
        with pytest.raises(openai.APIError, match="stopped in the middle of the answer"):
            await reading
        assert not second.requests


async def test_a_request_of_which_nothing_was_said_begins_anew_with_other_weights() -> None:
    async with two_engines() as (url, one, two):
        two.info.digests["model.safetensors"] = two.info.revision = "other"
        await two.looked_at()
        one.steps = two.steps = 0
        asking = asyncio.create_task(ask(url))
        await until(lambda: one.requests or two.requests, 30)
        first, second = (one, two) if one.requests else (two, one)
        second.allow(None)
        await first.stop()
        told = await (await asking).read()
        assert told.text[0].endswith("6, so stop it here")
        assert second.requests[0].weights_digest == second.info.digests["model.safetensors"]


async def test_cached_tokens_are_never_more_than_the_prompt() -> None:
    async with two_engines() as (url, one, two):
        one.steps = two.steps = 5
        told = await ask(url, n=2)
        reading = asyncio.create_task(told.read())
        await told.until(lambda: bool(told.text.get(1)))
        first, second = (one, two) if one.requests else (two, one)
        second.allow(None)
        await first.stop()
        await reading
        assert told.usage.prompt_tokens == len(second.requests[-1].prompt_token_ids)
        assert told.usage.prompt_tokens_details.cached_tokens == told.usage.prompt_tokens
        assert told.usage.completion_tokens == 2 * len(story(pb.GenerateRequest(), 0))


async def test_a_request_that_every_engine_fails_on_is_given_up() -> None:
    async with two_engines() as (url, one, two):
        one.script = two.script = failing(grpc.StatusCode.INTERNAL, "a bug")
        with pytest.raises(openai.APIError, match="failed on this request"):
            await (await ask(url)).read()
        assert len(one.requests) == len(two.requests) == 1


async def test_a_request_that_every_engine_drops_after_some_tokens_is_given_up() -> None:
    async with two_engines() as (url, one, two):
        out_of_memory = failing(grpc.StatusCode.RESOURCE_EXHAUSTED, "out of memory", after=saying("hello"))
        one.script = two.script = out_of_memory
        with pytest.raises(openai.APIError, match="as many requests as it can hold"):
            await (await ask(url)).read()
        assert len(one.requests) + len(two.requests) == 16


async def test_a_request_that_ends_every_engine_after_some_tokens_is_given_up() -> None:
    async with two_engines() as (url, one, two):
        one.script = two.script = failing(grpc.StatusCode.INTERNAL, "a bug", after=saying("hello"))
        with pytest.raises(openai.APIError, match="failed on this request"):
            await (await ask(url)).read()
        assert len(one.requests) + len(two.requests) == 16


async def test_an_engine_whose_calls_fail_is_left_out_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a busy machine, the requests take longer than the gateway would leave the engine out.
    monkeypatch.setattr("services.gateway.engines.outlier._FIRST_SECONDS", 600.0)
    async with two_engines() as (url, one, two):
        one.script = failing(grpc.StatusCode.INTERNAL, "a bug")
        two.script = saying("hello")
        for _ in range(40):
            assert (await (await ask(url)).read()).text[0] == "hello"
        assert len(one.requests) == 3
        assert await metric(url, "engine_ejections_total") == 1


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE])
async def test_calls_that_fail_eject_an_engine_even_if_its_health_and_an_old_stream_are_good(
    code: grpc.StatusCode,
) -> None:
    async with two_engines() as (url, one, two):

        async def endless(_request: pb.GenerateRequest, _context: Any) -> AsyncIterator[pb.GenerateChunk]:
            while True:
                yield pb.GenerateChunk(tokens=[pb.Token(id=token) for token in ids("h")])
                await asyncio.sleep(0.005)

        one.script = two.script = endless
        told, reading = await begin(url)
        bad, good = (one, two) if one.requests else (two, one)
        bad.script, good.script = failing(code, "a bug"), saying("hello")
        good.load = pb.Load(running=5)  # so that the other engine is chosen
        await good.looked_at()
        async with asyncio.timeout(60):
            while await metric(url, "engine_ejections_total") == 0:
                assert (await (await ask(url)).read()).text[0] == "hello"
        assert len(bad.requests) == 1 + 3
        reading.cancel()
        await told.stream.close()


async def test_an_engine_that_ends_many_streams_at_once_is_not_ejected() -> None:
    async with two_engines() as (url, one, two):
        one.steps = two.steps = 0
        asking = [asyncio.create_task(ask(url)) for _ in range(8)]
        await until(lambda: len(one.requests) + len(two.requests) >= 8, 30)
        assert len(one.requests) > 3
        two.allow(None)
        await one.stop()
        for told in await asyncio.gather(*asking):
            assert (await told.read()).text[0].endswith("6, so stop it here")
        assert await metric(url, "engine_ejections_total") == 0


async def test_a_stream_that_waits_after_a_refusal_may_still_get_a_status() -> None:
    # While an engine has the request, a heartbeat may go out. On a busy machine, a refusal may take a second or two.
    async with two_engines(heartbeat_seconds=3.0, queue_seconds=4.0) as (url, one, two):
        one.script = two.script = failing(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue is full")
        with pytest.raises(openai.InternalServerError, match="All engines are busy") as error:
            await ask(url)
        assert error.value.status_code == 503
        assert int(error.value.response.headers["retry-after"]) > 0
        assert one.requests


async def test_comments_that_have_begun_go_on_while_the_stream_waits_for_another_engine() -> None:
    async with two_engines(heartbeat_seconds=0.1) as (url, one, two):
        refuse, comments = asyncio.Event(), 0

        async def refusing(_request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateChunk]:
            await refuse.wait()
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue is full")
            yield pb.GenerateChunk()

        one.script = two.script = refusing
        body = {"messages": HELLO, "stream": True}
        async with (
            asyncio.timeout(60),
            http_client(url) as http,
            http.stream("POST", "/v1/chat/completions", json=body) as answer,
        ):
            async for line in answer.aiter_lines():
                comments += line == ": keep-alive"
                if comments == 1:
                    refuse.set()
                if comments == 5:
                    one.script = two.script = saying("hello")
            assert line == ""
            assert comments >= 5


async def test_the_clients_of_moved_streams_can_leave() -> None:
    async with two_engines() as (url, one, two):
        one.steps = two.steps = 3
        told, reading = await begin(url)
        first, second = (one, two) if one.requests else (two, one)
        await first.drain()
        await until(lambda: second.requests, 30)
        reading.cancel()
        await told.stream.close()
        for engine in (first, second):
            engine.allow(None)
        await asyncio.wait_for(second.cancelled.acquire(), 30)
        async with asyncio.timeout(30):
            while await metric(url, "requests_in_flight"):
                await asyncio.sleep(0.01)
