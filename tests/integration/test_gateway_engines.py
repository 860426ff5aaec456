"""Engines start, stop, change their model and share the load. Each request reaches an engine that can answer."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
from grpc_health.v1 import health_pb2

from nanochat_core.protos import engine_pb2 as pb
from nanochat_core.tokenizer import Tokenizer
from services.gateway.admission.file_store import FileStore
from services.gateway.admission.keys import id_of
from services.gateway.routing import Router
from tests.support.api_keys import created
from tests.support.scripted_engine import (
    TOKENIZER,
    Script,
    ScriptedEngine,
    failing,
    http_client,
    openai_client,
    running_engine,
    running_gateway,
    saying,
    until_queued,
    until_ready,
    until_up,
)
from tests.support.waiting import until

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


async def ask(url: str, **options: Any) -> str:
    answer = await openai_client(url).chat.completions.create(**{"model": "nano", "messages": HELLO, **options})
    return answer.choices[0].message.content or ""


async def test_a_gateway_starts_without_an_engine_and_finds_it_later() -> None:
    engine = ScriptedEngine()
    await engine.start()
    await engine.stop()
    async with running_gateway(engine.address, queue_seconds=0.5) as url, http_client(url) as http:
        assert (await http.get("/healthz")).status_code == 200
        ready = await http.get("/readyz")
        assert ready.status_code == 200
        assert ready.json()["models"] == []
        assert ready.json()["waits_for"]
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError, match="No engine is ready") as error:
                await ask(url, stream=stream)
            assert error.value.status_code == 503
            assert int(error.value.response.headers["retry-after"]) > 0
        assert (await http.get("/v1/models")).json() == {"object": "list", "data": []}
        assert (await http.get("/v1/models/nano")).status_code == 503
        await engine.start()
        await until_ready(url)
        assert await ask(url) == "hello"
    await engine.stop()


async def test_an_engine_that_comes_back_is_used_again() -> None:
    async with running_engine() as engine, running_gateway(engine.address) as url:
        await until_ready(url)
        await engine.stop()
        await until_ready(url, ready=False)
        await engine.start()
        await until_ready(url)
        assert await ask(url) == "hello"


async def test_checks_go_on_after_an_unexpected_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_router: Router, _replica: str) -> None:
        raise MemoryError

    async with running_engine() as engine, running_gateway(engine.address) as url:
        await until_ready(url)
        with monkeypatch.context() as patch:
            patch.setattr(Router, "left", fail)
            await engine.stop()
            await until_ready(url, ready=False)
            await until(lambda: "engine check failed" in [record.getMessage() for record in caplog.records], 30)
        await engine.start()
        await until_ready(url)
        assert await ask(url) == "hello"


async def test_a_request_waits_for_an_engine_to_come_back() -> None:
    async with running_engine() as engine, running_gateway(engine.address) as url:
        await until_ready(url)
        await engine.stop()
        await until_ready(url, ready=False)
        asking = [asyncio.create_task(ask(url, stream=False)) for _ in range(3)]
        await until_queued(url, 3)
        await engine.start()
        assert await asyncio.gather(*asking) == ["hello"] * 3


async def test_a_request_goes_to_the_other_engine_when_one_is_dead() -> None:
    async with (
        running_engine() as one,
        running_engine() as two,
        # The gateway polls rarely. It can therefore notice the failure only in the request itself.
        running_gateway(one.address, two.address, poll_seconds=60) as url,
    ):
        await until_up(url, 2)
        one.script, two.script = saying("one"), saying("two")
        assert {await ask(url) for _ in range(20)} == {"one", "two"}
        await one.stop()
        assert [await ask(url) for _ in range(4)] == ["two"] * 4


async def test_a_full_engine_passes_the_request_on() -> None:
    async with (
        running_engine() as full,
        running_engine() as other,
        running_gateway(full.address, other.address, queue_seconds=0.5) as url,
    ):
        await until_ready(url)
        full.script = failing(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue is full")
        other.script = saying("other")
        await until_up(url, 2)
        assert [await ask(url) for _ in range(4)] == ["other"] * 4
        other.script = full.script
        with pytest.raises(openai.InternalServerError, match="All engines are busy") as error:
            await ask(url)
        assert error.value.status_code == 503
        assert int(error.value.response.headers["retry-after"]) > 0


async def test_a_caller_with_too_many_constraints_gets_429_and_the_engine_does_not_count_as_full() -> None:
    async def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateChunk]:
        if request.sampling.regex:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, "4 answers of this client wait", (("caller-limit", "constraints"),)
            )
        async for part in saying("hello")(request, context):
            yield part

    async with running_engine() as engine, running_gateway(engine.address) as url:
        await until_ready(url)
        engine.script = script
        with pytest.raises(openai.RateLimitError, match="4 answers of this client wait") as error:
            await ask(url, extra_body={"regex": "a"})
        assert error.value.code == "rate_limit_exceeded"
        assert error.value.response.headers["retry-after"] == "1"
        assert await asyncio.gather(*(ask(url) for _ in range(20))) == ["hello"] * 20
        assert len(engine.requests) == 21  # the refused request was not sent again
        assert {request.caller for request in engine.requests} == {"address:127.0.0.1"}


async def test_requests_wait_while_all_engines_are_full_and_callers_take_turns(tmp_path: Path) -> None:
    keys = FileStore(str(tmp_path / "keys.json"))
    secrets = {name: await created(keys, name) for name in "ab"}
    async with (
        running_engine() as engine,
        running_gateway(engine.address, keys_file=str(tmp_path / "keys.json")) as url,
    ):
        await until_ready(url)
        room, order = asyncio.Semaphore(0), list[str]()

        async def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateChunk]:
            if room.locked():
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue is full")
            await room.acquire()
            order.append(request.request_id[0])
            async for part in saying("hello")(request, context):
                yield part

        engine.script = script

        async def post(name: str) -> int:
            headers = {"authorization": f"Bearer {secrets[name[0]]}", "x-request-id": name}
            async with http_client(url) as http:
                body = {"messages": HELLO}
                return (await http.post("/v1/chat/completions", json=body, headers=headers, timeout=30)).status_code

        asking = [asyncio.create_task(post(f"a{k}")) for k in range(6)]
        await until_queued(url, 6)
        asking += [asyncio.create_task(post(f"b{k}")) for k in range(2)]
        await until_queued(url, 8)
        for _ in asking:
            room.release()
        assert await asyncio.gather(*asking) == [200] * 8
        assert order[:7].count("b") == 2
        # The sandbox, too, takes turns between callers, so each request tells the engine the id of the caller's key.
        assert {(request.request_id[0], request.caller) for request in engine.requests} == {
            (name, f"key:{id_of(secret)}") for name, secret in secrets.items()
        }


async def test_more_requests_than_the_queue_holds_are_refused() -> None:
    limits = {"max_engine_sequences": 1, "queue_size": 1}
    async with running_engine() as engine, running_gateway(engine.address, **limits) as url:
        await until_ready(url)
        free = asyncio.Event()
        engine.script = saying("hello", until=free)
        running = asyncio.create_task(ask(url))
        while not engine.requests:
            await asyncio.sleep(0.01)
        waiting = asyncio.create_task(ask(url))
        await until_queued(url, 1)
        with pytest.raises(openai.RateLimitError, match="Too many requests are waiting") as error:
            await ask(url)
        assert int(error.value.response.headers["retry-after"]) > 0
        free.set()
        assert [await running, await waiting] == ["hello", "hello"]


async def test_a_more_urgent_request_goes_first() -> None:
    async with running_engine() as engine, running_gateway(engine.address, max_engine_sequences=1) as url:
        await until_ready(url)
        free = asyncio.Event()
        engine.script = saying("hello", until=free)
        asking = [asyncio.create_task(ask(url))]
        while not engine.requests:
            await asyncio.sleep(0.01)
        engine.requests.clear()
        for count, priority in enumerate((9, 0, 5), start=1):
            asking.append(asyncio.create_task(ask(url, extra_body={"priority": priority})))
            await until_queued(url, count)
        free.set()
        await asyncio.gather(*asking)
        assert [request.priority for request in engine.requests] == [0, 5, 9]


async def test_a_gateway_sends_an_engine_no_more_than_its_limit() -> None:
    async with (
        running_engine() as engine,
        running_gateway(engine.address, max_engine_sequences=2) as url,
    ):
        await until_ready(url)
        running = most = 0
        both = asyncio.Event()

        async def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateChunk]:
            nonlocal running, most
            running += 1
            most = max(most, running)
            if running == 2:
                both.set()
            await both.wait()
            async for part in saying("hello", pause=0.01)(request, context):
                if part.finish_reason:
                    running -= 1  # the gateway may send the next request as soon as it has this part
                yield part

        engine.script = script
        assert await asyncio.gather(*(ask(url) for _ in range(7))) == ["hello"] * 7
        assert most == 2


async def test_the_engine_with_less_to_do_gets_the_request() -> None:
    async with (
        running_engine() as busy,
        running_engine() as idle,
        running_gateway(busy.address, idle.address) as url,
    ):
        busy.load = pb.Load(running=3, waiting=4)
        busy.script, idle.script = saying("busy"), saying("idle")
        await until_up(url, 2)
        await busy.looked_at()
        assert [await ask(url) for _ in range(5)] == ["idle"] * 5


async def test_an_engine_that_drains_gets_nothing_new() -> None:
    async with (
        running_engine() as draining,
        running_engine() as other,
        running_gateway(draining.address, other.address) as url,
    ):
        await until_up(url, 2)
        await draining.health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        await until_up(url, 1)
        assert [await ask(url) for _ in range(3)] == ["hello"] * 3
        assert not draining.requests
        await other.health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        await until_ready(url, ready=False)


async def test_a_new_revision_is_taken_up_with_its_tokenizer() -> None:
    async with running_engine() as engine, running_gateway(engine.address) as url:
        await until_ready(url)
        client = openai_client(url)
        before = await client.chat.completions.create(model="nano", messages=HELLO)
        other = Tokenizer([bytes([i]) for i in range(256)] + [b"lo"])
        engine.info.revision = "rl/step_20"
        engine.info.tokenizer_json = other.to_json().encode()
        async with http_client(url) as http, asyncio.timeout(30):
            while (await http.get("/v1/models/nano")).json()["nanochat"]["revision"] != "rl/step_20":
                await asyncio.sleep(0.02)
        engine.requests.clear()
        engine.script = saying(b"hello", finish=pb.FINISH_REASON_LENGTH)
        after = await client.chat.completions.create(model="nano", messages=HELLO)
        assert list(engine.requests[0].prompt_token_ids)[2:-2] == [*b"hel", 256]
        assert before.system_fingerprint != after.system_fingerprint


async def test_during_a_rolling_update_each_engine_is_spoken_to_in_its_own_tokens() -> None:
    other = Tokenizer([bytes([i]) for i in range(256)] + [b"lo"])
    async with running_engine() as old, running_engine(tokenizer=other) as new:
        old.script = new.script = saying(b"hi", finish=pb.FINISH_REASON_LENGTH)
        async with running_gateway(old.address, new.address) as url:
            await until_up(url, 2)
            for _ in range(20):
                assert await ask(url) == "hi"
            assert list(old.requests[0].prompt_token_ids)[2:-2] == TOKENIZER.encode("hello")
            assert list(new.requests[0].prompt_token_ids)[2:-2] == other.encode("hello")


def refusing_other_tokenizers(engine: ScriptedEngine, then: Script) -> Script:
    """A script that refuses prompts of a wrong tokenizer, as a real engine does."""

    async def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateChunk]:
        if request.tokenizer_digest != engine.info.digests["tokenizer.json"]:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the prompt was made with another tokenizer")
        async for part in then(request, context):
            yield part

    return script


async def test_a_promotion_that_the_gateway_has_not_seen_yet_gets_a_prompt_in_its_own_tokens() -> None:
    other = Tokenizer([bytes([i]) for i in range(256)] + [b"lo"])
    async with running_engine() as engine:
        engine.info.digests["tokenizer.json"] = "before"
        engine.script = refusing_other_tokenizers(engine, saying(b"hello", finish=pb.FINISH_REASON_LENGTH))
        # The gateway polls rarely. It can therefore notice the new model only when the engine refuses a prompt.
        async with running_gateway(engine.address, poll_seconds=60, model_poll_seconds=60) as url:
            await until_ready(url)
            assert await ask(url) == "hello"
            engine.info.revision = "rl/step_20"
            engine.info.tokenizer_json = other.to_json().encode()
            engine.info.digests["tokenizer.json"] = "after"
            for stream in (False, True):
                engine.requests.clear()
                answer = await openai_client(url).chat.completions.create(model="nano", messages=HELLO, stream=stream)
                if stream:
                    assert [chunk.choices[0].finish_reason async for chunk in answer][-1] == "length"
                assert list(engine.requests[-1].prompt_token_ids)[2:-2] == [*b"hel", 256]
                assert len(engine.requests) == (1 if stream else 2)


async def test_an_engine_that_refuses_its_own_tokenizer_is_given_up() -> None:
    async with (
        running_engine() as odd,
        running_engine() as other,
        running_gateway(odd.address, other.address) as url,
    ):
        await until_up(url, 2)
        odd.script = failing(grpc.StatusCode.FAILED_PRECONDITION, "another tokenizer")
        other.script = saying("other")
        assert [await ask(url) for _ in range(4)] == ["other"] * 4
        other.script = odd.script
        with pytest.raises(openai.InternalServerError, match="replaced while the request was on its way") as error:
            await ask(url)
        assert error.value.status_code == 503


async def test_a_new_revision_is_seen_with_the_load() -> None:
    async with running_engine() as engine, running_gateway(engine.address, model_poll_seconds=60) as url:
        await until_ready(url)
        engine.info.revision = engine.load.revision = "rl/step_20"
        async with http_client(url) as http, asyncio.timeout(30):
            while (await http.get("/v1/models/nano")).json()["nanochat"]["revision"] != "rl/step_20":
                await asyncio.sleep(0.02)


async def test_a_damaged_tokenizer_keeps_the_engine_out() -> None:
    async with running_engine() as engine:
        engine.info.tokenizer_json = b"{}"
        async with running_gateway(engine.address) as url, http_client(url) as http:
            await engine.looked_at()
            assert (await http.get("/readyz")).json()["models"] == []
            engine.info.tokenizer_json = TOKENIZER.to_json().encode()
            await until_ready(url)


async def test_a_model_whose_engine_is_loading_is_waited_for() -> None:
    async with running_engine(name="small") as small, running_engine(name="large") as large:
        await large.health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        large.script = saying("large")
        async with (
            running_gateway(small.address, large.address, queue_seconds=0.5) as url,
            http_client(url) as http,
        ):
            await until_ready(url)
            for stream in (False, True):
                with pytest.raises(openai.InternalServerError, match="No engine is ready") as error:
                    await ask(url, model="large", stream=stream)
                assert error.value.status_code == 503
                assert int(error.value.response.headers["retry-after"]) > 0
            assert (await http.get("/v1/models/large")).status_code == 503
        async with (
            running_gateway(small.address, large.address) as url,
            http_client(url) as http,
        ):
            await until_ready(url)
            asking = asyncio.create_task(ask(url, model="large"))
            hoping = asyncio.create_task(ask(url, model="huge"))
            await until_queued(url, 2)
            await large.health.set("", health_pb2.HealthCheckResponse.SERVING)
            assert await asking == "large"
            with pytest.raises(openai.NotFoundError, match="large, small"):
                await hoping
            assert (await http.get("/v1/models/huge")).status_code == 404


async def test_several_models_are_told_apart_by_name() -> None:
    async with running_engine(name="small") as small, running_engine(name="large") as large:
        small.script, large.script = saying("small"), saying("large")
        changes: dict[str, Any] = {"model_aliases": ("any",), "queue_seconds": 0.5}
        async with running_gateway(small.address, large.address, **changes) as url:
            await until_up(url, 2)
            client = openai_client(url)
            assert sorted([model.id async for model in await client.models.list()]) == ["any", "large", "small"]
            assert [await ask(url, model=name) for name in ("small", "large", "small")] == ["small", "large", "small"]
            assert await ask(url, model="any") in ("small", "large")
            with pytest.raises(openai.NotFoundError, match="large, small"):
                await ask(url, model="huge")
            async with http_client(url) as http:
                answer = await http.post("/v1/chat/completions", json={"messages": HELLO})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
            await large.stop()
            # The gateway knows this model, but no engine serves it now.
            with pytest.raises(openai.InternalServerError) as error:
                await ask(url, model="large")
            assert error.value.status_code == 503


CANARY = "nano/sft/step_20"


async def metric(url: str, name: str) -> float:
    async with http_client(url) as http:
        lines = (await http.get("/metrics")).text.splitlines()
    return next(float(line.partition(" ")[2]) for line in lines if line.startswith(f"{name} "))


@contextlib.asynccontextmanager
async def old_and_new() -> AsyncIterator[tuple[ScriptedEngine, ScriptedEngine]]:
    """Engines with two revisions of one model; each answers with its own text."""
    async with running_engine() as old, running_engine() as new:
        new.info.revision = "sft/step_20"
        new.info.digests["model.safetensors"] = "01"
        old.script, new.script = saying("old"), saying("new")
        yield old, new


async def test_a_canary_gets_its_share_of_the_requests() -> None:
    async with (
        old_and_new() as (old, new),
        running_gateway(old.address, new.address, canary=CANARY, canary_percent=50) as url,
    ):
        await until_up(url, 2)
        answers = [await ask(url) for _ in range(60)]
        assert 10 < answers.count("new") < 50
        assert await metric(url, "nanochat_gateway_canary_percent") == 50
    async with old_and_new() as (old, new), running_gateway(old.address, new.address, canary=CANARY) as url:
        await until_up(url, 2)
        await old.stop()
        await until_up(url, 1)
        assert [await ask(url) for _ in range(5)] == ["new"] * 5, "if the canary alone is up, it answers everything"


async def until_described(http: httpx.AsyncClient, revision: str) -> None:
    """Wait until the gateway describes this revision as its model."""
    async with asyncio.timeout(10):
        while (await http.get("/v1/models/nano")).json()["nanochat"]["revision"] != revision:
            await asyncio.sleep(0.02)


async def test_a_promotion_reaches_the_engines_beside_the_canary_and_the_canary_keeps_its_share() -> None:
    async with (
        old_and_new() as (old, new),
        running_gateway(old.address, new.address, canary=CANARY, canary_percent=50, poll_seconds=0.05) as url,
        http_client(url) as http,
    ):
        await until_up(url, 2)
        old.info.revision = old.load.revision = "lesson/step_1"  # the engine has loaded a promoted model
        old.info.digests["model.safetensors"] = "02"
        old.script = saying("taught")
        await until_described(http, "lesson/step_1")
        answers = [await ask(url) for _ in range(60)]
        assert set(answers) == {"taught", "new"}
        assert 10 < answers.count("new") < 50

        old.info.revision = old.load.revision = "sft/step_20"  # the revision of the canary is promoted
        old.info.digests["model.safetensors"] = "01"
        old.script = saying("new")
        await until_described(http, "sft/step_20")
        assert [await ask(url) for _ in range(20)] == ["new"] * 20
        assert await metric(url, "nanochat_gateway_canary_returned") == 0


@pytest.mark.parametrize("hurt", ["fails", "is slow"])
async def test_a_canary_that_does_worse_loses_its_share_and_no_client_sees_an_error(hurt: str) -> None:
    longest = 0.0  # seconds of the longest answer of the old revision

    async def late(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateChunk]:
        # On a busy machine, the old revision may be slow too.
        await asyncio.sleep(max(0.5, 2 * longest))
        async for part in saying("new")(request, context):
            yield part

    async with (
        old_and_new() as (old, new),
        running_gateway(old.address, new.address, canary=CANARY, canary_percent=30) as url,
    ):
        await until_up(url, 2)
        new.script = late if hurt == "is slow" else failing(grpc.StatusCode.INTERNAL, "NaN")
        # Three failures in a row eject an engine for five seconds, so the fourth failure may have to wait.
        async with asyncio.timeout(200):
            while not await metric(url, "nanochat_gateway_canary_returned"):
                began = time.monotonic()
                answer = await ask(url)
                assert answer in (("old", "new") if hurt == "is slow" else ("old",))
                if answer == "old":
                    longest = max(longest, time.monotonic() - began)
        assert await metric(url, "nanochat_gateway_canary_percent") == 0
        before = len(new.requests)
        assert [await ask(url) for _ in range(20)] == ["old"] * 20
        assert len(new.requests) == before
