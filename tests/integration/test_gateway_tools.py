"""Tools that the client runs, as OpenAI's own client sees them, with a scripted engine behind the real gateway."""

import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import openai
import pytest
import pytest_asyncio
from pydantic import BaseModel

from nanochat_core.protos import engine_pb2 as pb
from tests.support.scripted_engine import (
    TOKENIZER,
    ScriptedEngine,
    running_engine,
    running_gateway,
    saying,
    until_ready,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
ARGUMENTS = '{"city": "Oslo"}'
CALL = f'{{"name": "get_weather", "arguments": {ARGUMENTS}}}'


class GetWeather(BaseModel):
    """The weather of a city."""

    city: str


TOOL: Any = openai.pydantic_function_tool(GetWeather, name="get_weather")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served() -> AsyncIterator[tuple[ScriptedEngine, str]]:
    async with running_engine(context_length=1024) as engine, running_gateway(engine.address) as url:
        await until_ready(url)
        yield engine, url


@pytest.fixture
def engine(served: tuple[ScriptedEngine, str]) -> ScriptedEngine:
    served[0].forget()
    return served[0]


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "get_weather"}}])
async def test_an_answer_can_be_a_call(engine: ScriptedEngine, client: openai.AsyncOpenAI, choice: Any) -> None:
    engine.script = saying(CALL)
    answer = await client.chat.completions.create(model="nano", messages=HELLO, tools=[TOOL], tool_choice=choice)
    [found] = answer.choices
    assert (found.message.content, found.finish_reason) == (None, "tool_calls")
    assert found.message.tool_calls is not None
    [call] = found.message.tool_calls
    assert (call.type, call.function.name, call.function.arguments) == ("function", "get_weather", ARGUMENTS)
    sampling = engine.requests[0].sampling
    field = "text_or_json_schema" if choice == "auto" else "json_schema"
    assert sampling.WhichOneof("constraint") == field
    assert json.loads(getattr(sampling, field))["$defs"]["get_weather"]["properties"]["city"]["type"] == "string"
    assert "The weather of a city." in TOKENIZER.decode(engine.requests[0].prompt_token_ids)


async def test_a_stream_has_the_same_call(engine: ScriptedEngine, client: openai.AsyncOpenAI) -> None:
    engine.script = saying(CALL)
    async with client.chat.completions.stream(model="nano", messages=HELLO, tools=[TOOL]) as stream:
        [found] = (await stream.get_final_completion()).choices
    assert found.message.tool_calls is not None
    [call] = found.message.tool_calls
    assert (call.function.arguments, found.finish_reason) == (ARGUMENTS, "tool_calls")
    assert call.function.parsed_arguments == GetWeather(city="Oslo")
    assert not found.message.content


async def test_parsed_arguments_are_the_clients_own_object(engine: ScriptedEngine, client: openai.AsyncOpenAI) -> None:
    engine.script = saying(CALL)
    answer = await client.chat.completions.parse(model="nano", messages=HELLO, tools=[TOOL])
    assert answer.choices[0].message.tool_calls[0].function.parsed_arguments == GetWeather(city="Oslo")


async def test_an_answer_that_is_no_call_is_text(engine: ScriptedEngine, client: openai.AsyncOpenAI) -> None:
    engine.script = saying("hello {you}")
    answer = await client.chat.completions.create(model="nano", messages=HELLO, tools=[TOOL])
    [found] = answer.choices
    assert (found.message.content, found.message.tool_calls, found.finish_reason) == ("hello {you}", None, "stop")


async def test_no_choice_leaves_the_tools_out(engine: ScriptedEngine, client: openai.AsyncOpenAI) -> None:
    engine.script = saying(CALL)
    answer = await client.chat.completions.create(model="nano", messages=HELLO, tools=[TOOL], tool_choice="none")
    assert answer.choices[0].message.content == CALL
    assert engine.requests[0].sampling.WhichOneof("constraint") is None
    assert "get_weather" not in TOKENIZER.decode(engine.requests[0].prompt_token_ids)


async def test_the_result_of_a_call_reaches_the_model(engine: ScriptedEngine, client: openai.AsyncOpenAI) -> None:
    engine.script = saying(CALL)
    first = await client.chat.completions.create(model="nano", messages=HELLO, tools=[TOOL])
    message: Any = first.choices[0].message.model_dump()
    result: Any = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "22 degrees"}
    engine.script = saying("It is 22.")
    await client.chat.completions.create(model="nano", messages=[*HELLO, message, result], tools=[TOOL])
    prompt = TOKENIZER.decode(engine.requests[-1].prompt_token_ids)
    assert prompt.endswith(
        f"<|assistant_start|>{CALL}<|assistant_end|>"
        "<|user_start|>get_weather returned: 22 degrees<|user_end|><|assistant_start|>"
    )


async def test_a_schema_that_the_engine_cannot_use_is_an_error_of_the_tools(
    engine: ScriptedEngine, client: openai.AsyncOpenAI
) -> None:
    async def script(_request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateChunk]:
        await context.abort(
            grpc.StatusCode.INVALID_ARGUMENT, "no such keyword", (("invalid-field", "text_or_json_schema"),)
        )
        yield pb.GenerateChunk()

    engine.script = script
    with pytest.raises(openai.BadRequestError, match="no such keyword") as error:
        await client.chat.completions.create(model="nano", messages=HELLO, tools=[TOOL])
    assert error.value.param == "tools"
