"""The Responses API as OpenAI's own client sees it, with a scripted engine behind the real gateway."""

import asyncio
import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
from pydantic import BaseModel

from nanochat_core.protos import engine_pb2 as pb
from services.gateway.admission.redis_link import RedisLink
from services.gateway.api.responses.kept import KeptResponses, MemoryValues
from services.gateway.api.responses.redis_values import RedisValues
from services.gateway.errors import ApiError
from tests.support.redis_server import RedisServer, needs_redis
from tests.support.scripted_engine import (
    TOKENIZER,
    ScriptedEngine,
    chunk,
    http_client,
    ids,
    openai_client,
    running_engine,
    running_gateway,
    saying,
    until_ready,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

CALL = '{"name": "get_weather", "arguments": {"city": "Oslo"}}'
TOOL: Any = {"type": "function", "name": "get_weather", "parameters": {"type": "object"}, "strict": True}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served() -> AsyncIterator[tuple[ScriptedEngine, str]]:
    async with running_engine(context_length=1024) as engine, running_gateway(engine.address) as url:
        await until_ready(url)
        yield engine, url


@pytest.fixture
def engine(served: tuple[ScriptedEngine, str]) -> ScriptedEngine:
    served[0].forget()
    served[0].script = saying("hello ", "world")
    return served[0]


async def python_script(_request: pb.GenerateRequest, _context: Any) -> AsyncIterator[pb.GenerateChunk]:
    call = pb.ToolEvent(call=pb.ToolCall(call_index=0, code="6*7"))
    yield chunk(ids("é = ".encode(), "<|python_start|>", "6*7", "<|python_end|>"), events=[call])
    result = pb.ToolEvent(result=pb.ToolResult(call_index=0, status="ok", output="42"))
    yield chunk(ids("<|output_start|>", "42", "<|output_end|>"), events=[result])
    yield chunk(
        ids("42", "<|assistant_end|>"),
        finish=pb.FINISH_REASON_STOP,
        usage=pb.Usage(prompt_tokens=5, completion_tokens=11, cached_prompt_tokens=2),
    )


def prompt_of(engine: ScriptedEngine) -> str:
    return TOKENIZER.decode(engine.requests[-1].prompt_token_ids)


async def test_a_question_is_answered(engine: ScriptedEngine, client: openai.AsyncOpenAI) -> None:
    response = await client.responses.create(
        model="nano", input="hi", instructions="Be kind.", temperature=0.5, max_output_tokens=7, metadata={"a": "b"}
    )
    assert (response.output_text, response.status, response.model) == ("hello world", "completed", "nano")
    assert prompt_of(engine) == "<|bos|><|user_start|>Be kind.\n\nhi<|user_end|><|assistant_start|>"
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.max_tokens) == (0.5, 7)
    assert (response.temperature, response.max_output_tokens, response.metadata) == (0.5, 7, {"a": "b"})
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens


async def test_a_stream_ends_with_the_response_that_comes_in_one_piece(
    engine: ScriptedEngine, client: openai.AsyncOpenAI
) -> None:
    engine.script = python_script
    whole = await client.responses.create(model="nano", input="hi")
    events = [event async for event in await client.responses.create(model="nano", input="hi", stream=True)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in (events[0], events[1], events[-1])] == [
        "response.created",
        "response.in_progress",
        "response.completed",
    ]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text == "é = 42"
    for response in (whole, events[-1].response):
        kinds = [item.type for item in response.output]
        assert kinds == ["message", "code_interpreter_call", "message"]
        python = response.output[1]
        assert (python.code, python.status, python.outputs[0].logs) == ("6*7", "completed", "42")


async def test_the_clients_own_helpers_read_the_stream(engine: ScriptedEngine, client: openai.AsyncOpenAI) -> None:
    async with client.responses.stream(model="nano", input="hi") as stream:
        kinds = [event.type async for event in stream]
        assert (await stream.get_final_response()).output_text == "hello world"
    assert "response.output_text.done" in kinds


async def test_output_sent_back_gives_the_tokens_that_the_model_wrote(
    engine: ScriptedEngine, client: openai.AsyncOpenAI
) -> None:
    engine.script = python_script
    first = await client.responses.create(model="nano", input="hi")
    items: list[Any] = [{"role": "user", "content": "hi"}, *first.output, {"role": "user", "content": "more"}]
    await client.responses.create(model="nano", input=items)
    assert prompt_of(engine) == (
        "<|bos|><|user_start|>hi<|user_end|><|assistant_start|>é = <|python_start|>6*7<|python_end|>"
        "<|output_start|>42<|output_end|>42<|assistant_end|><|user_start|>more<|user_end|><|assistant_start|>"
    )


async def test_pictures_of_the_code_are_outputs_that_are_not_kept(
    engine: ScriptedEngine, client: openai.AsyncOpenAI
) -> None:
    async def draw(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateChunk]:
        async for part in python_script(request, context):
            for event in part.tool_events:
                if event.HasField("result"):
                    # A response with this picture would be too large to be kept.
                    event.result.pictures.add(name="figure-1.png", media_type="image/png", content=bytes(1_000_000))
            yield part

    engine.script = draw
    first = await client.responses.create(model="nano", input="hi")
    outputs = first.output[1].outputs
    assert outputs is not None
    logs, image = outputs
    assert (logs.type, logs.logs) == ("logs", "42")
    assert (image.type, image.url) == ("image", "data:image/png;base64," + base64.b64encode(bytes(1_000_000)).decode())
    await client.responses.create(model="nano", input="more", previous_response_id=first.id)
    assert "<|output_start|>42<|output_end|>" in prompt_of(engine)


async def test_a_function_is_called_and_its_output_is_read(engine: ScriptedEngine, client: openai.AsyncOpenAI) -> None:
    engine.script = saying(CALL)
    first = await client.responses.create(model="nano", input="hi", tools=[TOOL])
    [call] = first.output
    assert (call.type, call.name, call.arguments) == ("function_call", "get_weather", '{"city": "Oslo"}')
    engine.script = saying("It is 22.")
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "22"}
    items: list[Any] = [{"role": "user", "content": "hi"}, call, output]
    second = await client.responses.create(model="nano", input=items, tools=[TOOL])
    assert second.output_text == "It is 22."
    assert f"<|assistant_start|>{CALL}<|assistant_end|><|user_start|>get_weather returned: 22" in prompt_of(engine)


async def test_streamed_arguments_are_put_together(engine: ScriptedEngine, client: openai.AsyncOpenAI) -> None:
    engine.script = saying(CALL)
    async with client.responses.stream(model="nano", input="hi", tools=[TOOL], tool_choice="required") as stream:
        deltas = [event.delta async for event in stream if event.type == "response.function_call_arguments.delta"]
        [call] = (await stream.get_final_response()).output
    assert "".join(deltas) == call.arguments == '{"city": "Oslo"}'


async def test_structured_output_is_parsed(engine: ScriptedEngine, client: openai.AsyncOpenAI) -> None:
    class Weather(BaseModel):
        degrees: int

    engine.script = saying('{"degrees": 22}')
    response = await client.responses.parse(model="nano", input="hi", text_format=Weather)
    assert response.output_parsed == Weather(degrees=22)
    assert engine.requests[0].sampling.WhichOneof("constraint") == "json_schema"


async def test_log_probabilities_come_where_they_are_asked_for(
    engine: ScriptedEngine, client: openai.AsyncOpenAI
) -> None:
    response = await client.responses.create(
        model="nano", input="hi", include=["message.output_text.logprobs"], top_logprobs=1
    )
    entries = response.output[0].content[0].logprobs
    assert "".join(entry.token for entry in entries) == "hello world"
    assert [len(entry.top_logprobs) for entry in entries] == [1] * len(entries)


async def test_an_answer_that_is_cut_off_is_incomplete(engine: ScriptedEngine, client: openai.AsyncOpenAI) -> None:
    engine.script = saying("hello", finish=pb.FINISH_REASON_LENGTH)
    response = await client.responses.create(model="nano", input="hi")
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    events = [event async for event in await client.responses.create(model="nano", input="hi", stream=True)]
    assert events[-1].type == "response.incomplete"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"role": "critic", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "function_call"}]}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]}, "input[0].call_id"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].id"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(
    engine: ScriptedEngine, url: str, change: Any, param: str
) -> None:
    async with http_client(url) as http:
        answer = await http.post("/v1/responses", json={"input": "hi", **change})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("truncation", ["auto", "disabled"])
async def test_an_input_without_any_message_is_refused(engine: ScriptedEngine, url: str, truncation: str) -> None:
    async with http_client(url) as http:
        body = {"input": [{"type": "reasoning"}], "truncation": truncation}
        answer = await http.post("/v1/responses", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "The request has no message that the model can read."
    assert engine.requests == []


async def test_a_response_is_continued_by_its_id(engine: ScriptedEngine, client: openai.AsyncOpenAI) -> None:
    first = await client.responses.create(model="nano", input="hi", instructions="Be kind.")
    second = await client.responses.create(model="nano", input="more", previous_response_id=first.id)
    expected = (
        "<|bos|><|user_start|>hi<|user_end|><|assistant_start|>hello world<|assistant_end|>"
        "<|user_start|>more<|user_end|><|assistant_start|>"
    )
    assert prompt_of(engine) == expected
    assert (second.previous_response_id, second.store) == (first.id, True)
    reference: Any = {"type": "item_reference", "id": first.output[0].id}
    items: list[Any] = [{"role": "user", "content": "hi"}, reference, {"role": "user", "content": "more"}]
    await client.responses.create(model="nano", input=items)
    assert prompt_of(engine) == expected
    unkept = await client.responses.create(model="nano", input="hi", store=False)
    with pytest.raises(openai.BadRequestError, match="not found"):
        await client.responses.create(model="nano", input="more", previous_response_id=unkept.id)


@needs_redis
async def test_gateways_on_one_redis_continue_each_others_responses(tmp_path: Path) -> None:
    redis = RedisServer(tmp_path)
    try:
        options = {"redis_url": redis.url, "redis_failure": "open", "redis_timeout_seconds": 20}
        async with (
            running_engine() as engine,
            running_gateway(engine.address, **options) as first,
            running_gateway(engine.address, **options) as second,
        ):
            for url in (first, second):
                await until_ready(url)
            began = await openai_client(first).responses.create(model="nano", input="hi")
            follow: dict[str, Any] = {"model": "nano", "input": "more", "previous_response_id": began.id}
            await openai_client(second).responses.create(**follow)
            assert "<|user_start|>hi<|user_end|>" in prompt_of(engine)
            redis.kill()
            with pytest.raises(openai.InternalServerError, match="store of responses"):
                await openai_client(second).responses.create(**follow)
            assert (await openai_client(second).responses.create(model="nano", input="hi")).status == "completed"
    finally:
        redis.kill()


MESSAGE = {"id": "msg_1", "role": "assistant", "content": "x"}


async def test_a_kept_response_is_read_only_by_its_caller() -> None:
    kept = KeptResponses(MemoryValues(), seconds=60, max_bytes=200)
    await kept.keep("me", "resp_1", [{"role": "user", "content": "hi"}], [MESSAGE])
    assert await kept.conversation("me", "resp_1") == [{"role": "user", "content": "hi"}, MESSAGE]
    assert await kept.item("me", "msg_1", "input[0].id") == MESSAGE
    for lost in (kept.conversation("you", "resp_1"), kept.item("you", "msg_1", "input[0].id")):
        with pytest.raises(ApiError, match="not found"):
            await lost
    await kept.keep("me", "resp_2", [{"role": "user", "content": "x" * 200}], [])
    with pytest.raises(ApiError, match="not found"):
        await kept.conversation("me", "resp_2")


async def test_memory_drops_what_is_old_or_too_much() -> None:
    values = MemoryValues(max_bytes=10)
    await values.put("a", "12345", 60)
    await values.put("a", "1234", 60)
    await values.put("b", "123456", 60)
    assert (await values.get("a"), await values.get("b")) == ("1234", "123456")
    await values.put("c", "1", 60)
    assert (await values.get("a"), await values.get("b"), await values.get("c")) == (None, "123456", "1")
    await values.put("d", "1", 0)
    assert await values.get("d") is None


async def test_parameters_come_back_whatever_they_are(engine: ScriptedEngine, url: str) -> None:
    strange = b'{"input": "hi", "instructions": "\\ud800", "metadata": {"a": "\\udfff"}, "stream": %s,'
    strange += b'"tools": [{"type": "function", "name": "f", "parameters": {"maximum": 1%s}}], "tool_choice": "none"}'
    async with http_client(url) as http:
        for stream in (b"false", b"true"):
            body = strange % (stream, b"0" * 40)
            answer = await http.post("/v1/responses", content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code == 200
            for part in (
                b'"instructions": "\\ufffd"',
                b'"metadata": {"a": "\\ufffd"}',
                b'"maximum": 1%s' % (b"0" * 40),
            ):
                assert part in answer.content


@needs_redis
async def test_redis_drops_what_is_old_or_too_much(tmp_path: Path) -> None:
    redis = RedisServer(tmp_path)
    link = RedisLink(redis.url, 30.0)
    try:
        values = RedisValues(link, max_bytes=10_000)
        for number in range(40):
            await values.put(f"me:{number}", str(number) * 300, 60)
            await values.put(f"me:{number}", str(number) * 200, 60)  # replaces the value, and is not counted twice
        found = [number for number in range(40) if await values.get(f"me:{number}") == str(number) * 200]
        assert 12 <= len(found) < 20  # each has about 660 bytes
        assert found == list(range(40 - len(found), 40))
        await values.put("me:short", "x", 60)
        assert await values.get("me:short") == "x"
        await values.put("me:short", "x", 1)
        async with asyncio.timeout(30):
            while await values.get("me:short") is not None:
                await asyncio.sleep(0.05)
        await values.put("me:large", "x" * 10_000, 60)
        assert await values.get("me:39") is None
        assert await link.call(lambda client: client.get("{nanochat:responses}:bytes")) == "0"
    finally:
        await link.aclose()
        redis.kill()


class Away:
    """A store of values that does not answer."""

    async def get(self, key: str) -> str | None:
        raise ConnectionError

    async def put(self, key: str, value: str, seconds: int) -> None:
        raise ConnectionError


async def test_a_store_that_does_not_answer_fails_only_what_needs_it() -> None:
    kept = KeptResponses(Away(), seconds=60, max_bytes=100)
    await kept.keep("me", "resp_1", [], [])
    with pytest.raises(ApiError) as error:
        await kept.conversation("me", "resp_1")
    assert error.value.status_code == 503
