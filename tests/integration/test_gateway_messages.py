"""Anthropic's Messages API, with a scripted engine behind the real gateway."""

import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio

from nanochat_core.protos import engine_pb2 as pb
from tests.support.scripted_engine import (
    TOKENIZER,
    ScriptedEngine,
    chunk,
    failing,
    http_client,
    ids,
    running_engine,
    running_gateway,
    saying,
    until_ready,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

HELLO: list[Any] = [{"role": "user", "content": "hi"}]
CALL = '{"name": "get_weather", "arguments": {"city": "Oslo"}}'
TOOLS = [{"name": "get_weather", "description": "weather", "input_schema": {"type": "object"}}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served() -> AsyncIterator[tuple[ScriptedEngine, httpx.AsyncClient]]:
    async with (
        running_engine(context_length=1024) as engine,
        running_gateway(engine.address) as url,
        http_client(url) as http,
    ):
        await until_ready(url)
        yield engine, http


@pytest.fixture
def engine(served: tuple[ScriptedEngine, httpx.AsyncClient]) -> ScriptedEngine:
    served[0].forget()
    served[0].script = saying("hello ", "world")
    return served[0]


@pytest.fixture
def http(served: tuple[ScriptedEngine, httpx.AsyncClient]) -> httpx.AsyncClient:
    return served[1]


async def python_script(_request: pb.GenerateRequest, _context: Any) -> AsyncIterator[pb.GenerateChunk]:
    call = pb.ToolEvent(call=pb.ToolCall(call_index=0, code="6*7"))
    yield chunk(ids("It is ", "<|python_start|>", "6*7", "<|python_end|>"), events=[call])
    result = pb.ToolEvent(result=pb.ToolResult(call_index=0, status="ok", output="42"))
    yield chunk(ids("<|output_start|>", "42", "<|output_end|>"), events=[result])
    yield chunk(
        ids("42", "<|assistant_end|>"),
        finish=pb.FINISH_REASON_STOP,
        usage=pb.Usage(prompt_tokens=5, completion_tokens=14),
    )


async def message(http: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    answer = await http.post("/v1/messages", json={"max_tokens": 50, "messages": HELLO, **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def streamed(http: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream. Each event's name is its type."""
    answer = await http.post("/v1/messages", json={"max_tokens": 50, "messages": HELLO, "stream": True, **body})
    events = []
    for part in answer.text.strip().split("\n\n"):
        name, data = part.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1].get('type', 'error')}"
    return events


def put_together(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client puts together from a stream."""
    whole: dict[str, Any] = events[0]["message"]
    arguments: dict[int, str] = {}
    for event in events[1:]:
        if event["type"] == "content_block_start":
            assert event["index"] == len(whole["content"])
            whole["content"].append(event["content_block"])
        elif event["type"] == "content_block_delta" and event["delta"]["type"] == "text_delta":
            whole["content"][event["index"]]["text"] += event["delta"]["text"]
        elif event["type"] == "content_block_delta":
            arguments[event["index"]] = arguments.get(event["index"], "") + event["delta"]["partial_json"]
        elif event["type"] == "message_delta":
            whole |= {**event["delta"], "usage": event["usage"]}
    for index, text in arguments.items():
        whole["content"][index]["input"] = json.loads(text)
    assert events[-1]["type"] == "message_stop"
    return whole


def without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_ids(item) for key, item in value.items() if key not in ("id", "tool_use_id")}
    return [without_ids(item) for item in value] if isinstance(value, list) else value


def prompt_of(engine: ScriptedEngine) -> str:
    return TOKENIZER.decode(engine.requests[-1].prompt_token_ids)


async def test_a_question_is_answered(engine: ScriptedEngine, http: httpx.AsyncClient) -> None:
    found = await message(http, system="Be kind.", temperature=0.5, top_k=3)
    assert (found["type"], found["role"], found["stop_reason"]) == ("message", "assistant", "end_turn")
    assert found["content"] == [{"type": "text", "text": "hello world"}]
    assert prompt_of(engine) == "<|bos|><|user_start|>Be kind.\n\nhi<|user_end|><|assistant_start|>"
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.max_tokens) == (0.5, 3, 50)
    assert found["usage"]["output_tokens"] == len(ids("hello ", "world")) + 1


@pytest.mark.parametrize("script", [saying("hello ", "world"), python_script, saying(CALL)])
async def test_a_stream_has_the_message_that_comes_in_one_piece(
    engine: ScriptedEngine, http: httpx.AsyncClient, script: Any
) -> None:
    engine.script = script
    options = {"tools": TOOLS} if script is not python_script else {}
    whole = await message(http, **options)
    assert without_ids(put_together(await streamed(http, **options))) == without_ids(whole)


async def test_content_sent_back_gives_the_tokens_that_the_model_wrote(
    engine: ScriptedEngine, http: httpx.AsyncClient
) -> None:
    engine.script = python_script
    first = await message(http)
    kinds = [block["type"] for block in first["content"]]
    assert kinds == ["text", "server_tool_use", "code_execution_tool_result", "text"]
    history = [*HELLO, {"role": "assistant", "content": first["content"]}, {"role": "user", "content": "more"}]
    await message(http, messages=history)
    assert prompt_of(engine) == (
        "<|bos|><|user_start|>hi<|user_end|><|assistant_start|>It is <|python_start|>6*7<|python_end|>"
        "<|output_start|>42<|output_end|>42<|assistant_end|><|user_start|>more<|user_end|><|assistant_start|>"
    )


async def test_a_tool_is_called_and_its_result_is_read(engine: ScriptedEngine, http: httpx.AsyncClient) -> None:
    engine.script = saying(CALL)
    first = await message(http, tools=TOOLS, tool_choice={"type": "any"})
    [call] = first["content"]
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "get_weather", {"city": "Oslo"})
    assert first["stop_reason"] == "tool_use"
    assert engine.requests[0].sampling.WhichOneof("constraint") == "json_schema"
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "22"}]}
    history = [*HELLO, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    engine.script = saying("It is 22.")
    await message(http, messages=history, tools=TOOLS)
    assert f"<|assistant_start|>{CALL}<|assistant_end|><|user_start|>get_weather returned: 22<" in prompt_of(engine)


async def test_the_reason_for_the_end_is_named(engine: ScriptedEngine, http: httpx.AsyncClient) -> None:
    engine.script = saying("abc STOP def")
    found = await message(http, stop_sequences=["STOP"])
    assert (found["content"][0]["text"], found["stop_reason"], found["stop_sequence"]) == (
        "abc ",
        "stop_sequence",
        "STOP",
    )
    engine.script = saying("abc", finish=pb.FINISH_REASON_LENGTH)
    assert (await message(http))["stop_reason"] == "max_tokens"


async def test_the_last_answer_goes_on(engine: ScriptedEngine, http: httpx.AsyncClient) -> None:
    await message(http, messages=[*HELLO, {"role": "assistant", "content": "he"}])
    assert prompt_of(engine).endswith("<|assistant_start|>he")


async def test_an_answer_that_breaks_off_ends_with_an_error_event(
    engine: ScriptedEngine, http: httpx.AsyncClient
) -> None:
    engine.script = failing(grpc.StatusCode.INTERNAL, "it broke", after=saying("hello", "!"))
    assert "error" in (await streamed(http))[-1]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content"),
        ({"thinking": {"type": "enabled"}}, "thinking"),
        ({"tools": [{"name": "two words", "input_schema": {}}]}, "tools[0].name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(
    engine: ScriptedEngine, http: httpx.AsyncClient, change: Any, param: str
) -> None:
    answer = await http.post("/v1/messages", json={"max_tokens": 5, "messages": HELLO, **change})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
