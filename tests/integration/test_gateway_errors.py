"""Every error of a request tells the client what is wrong and where, in OpenAI's JSON form."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import openai
import pytest
import pytest_asyncio

from tests.support.scripted_engine import (
    ScriptedEngine,
    failing,
    hanging,
    http_client,
    running_engine,
    running_gateway,
    saying,
    until_ready,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get", "arguments": "{}"}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served() -> AsyncIterator[tuple[ScriptedEngine, str]]:
    changes = {"max_body_bytes": 4096, "queue_seconds": 0.5}
    async with running_engine(context_length=64) as engine, running_gateway(engine.address, **changes) as url:
        await until_ready(url)
        yield engine, url


@pytest.fixture
def engine(served: tuple[ScriptedEngine, str]) -> ScriptedEngine:
    served[0].script = saying("hello")
    return served[0]


def json_schema(**changes: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, **changes}}


async def refused(url: str, body: Any, path: str = "/v1/chat/completions") -> dict[str, Any]:
    async with http_client(url) as http:
        answer = await http.post(url + path, json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"priority": -1}, "priority"),
        ({"seed": 2**64}, "seed"),
        ({"seed": "one"}, "seed"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop": ["x" * 1001]}, "stop"),
        ({"logit_bias": {"hello": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "a"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [*HELLO, {"role": "assistant", "tool_calls": [{}]}]}, "messages[1].tool_calls[0].id"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0]"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"response_format": "json_object"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
        ({"response_format": json_schema(name="two words")}, "response_format.json_schema.name"),
        ({"response_format": json_schema(schema="{}")}, "response_format.json_schema.schema"),
        ({"regex": ""}, "regex"),
        ({"regex": 5}, "regex"),
        ({"regex": "a", "response_format": {"type": "json_object"}}, "response_format"),
        ({"regex": "a", "tools": [TOOL]}, "tools"),
        ({"guided_regex": "a", "guided_json": {}}, "guided_json"),
        ({"structured_outputs": {"grammar": "a"}}, "structured_outputs.grammar"),
        ({"guided_grammar": "a"}, "guided_grammar"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"min_tokens": 5, "regex": "a"}, "min_tokens"),
        ({"ignore_eos": True, "regex": "a"}, "ignore_eos"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "put"}}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
        ({"truncation": "old"}, "truncation"),
        ({"functions": [{}]}, "functions"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"prediction": {"type": "content"}}, "prediction"),
        ({"web_search_options": {}}, "web_search_options"),
    ],
)
async def test_the_parameter_at_fault_is_named(engine: ScriptedEngine, url: str, change: Any, param: str) -> None:
    for stream in (False, True):
        error = await refused(url, {"messages": HELLO, "stream": stream, **change})
        assert error["param"] == param
        assert param in error["message"] or param == "n" or "message" in error["message"]


async def test_a_missing_parameter_is_named(engine: ScriptedEngine, url: str) -> None:
    error = await refused(url, {"model": "nano"})
    assert (error["param"], error["code"]) == ("messages", "missing_required_parameter")


async def test_an_image_is_refused_in_words(engine: ScriptedEngine, client: openai.AsyncOpenAI) -> None:
    content: Any = [{"type": "text", "text": "what is it"}, {"type": "image_url", "image_url": {"url": "data:"}}]
    with pytest.raises(openai.BadRequestError, match="part 1 is of type 'image_url'"):
        await client.chat.completions.create(model="nano", messages=[{"role": "user", "content": content}])


async def test_values_that_ask_for_nothing_are_accepted(engine: ScriptedEngine, client: openai.AsyncOpenAI) -> None:
    await client.chat.completions.create(
        model="nano",
        messages=[*HELLO, {"role": "assistant", "content": "x", "tool_calls": [], "refusal": None}, *HELLO],
        response_format={"type": "text"},
        tools=[],
        tool_choice="none",
        parallel_tool_calls=True,
        modalities=["text"],
        store=True,
        metadata={"a": "b"},
        service_tier="auto",
        extra_body={"functions": None, "function_call": "none", "audio": None, "max_tokens": 10.0, "unheard_of": 1},
    )


async def test_unknown_parameters_are_refused_where_the_settings_say_so() -> None:
    async with (
        running_engine() as engine,
        running_gateway(engine.address, unknown_parameters="refuse") as url,
        http_client(url) as http,
    ):
        engine.script = saying("hello")
        await until_ready(url)
        known: dict[str, Any] = {"messages": HELLO, "store": True, "metadata": {}, "audio": None}
        assert (await http.post("/v1/chat/completions", json=known)).status_code == 200
        bodies: dict[str, dict[str, Any]] = {
            "/v1/chat/completions": {"messages": HELLO},
            "/v1/completions": {"prompt": "x"},
            "/v1/responses": {"input": "x"},
        }
        for path, body in bodies.items():
            error = await refused(url, {**body, "unheard_of": 1}, path)
            assert (error["param"], error["code"]) == ("unheard_of", "unknown_parameter")
            assert error["message"] == "Unrecognized request argument supplied: unheard_of."


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(
    engine: ScriptedEngine, client: openai.AsyncOpenAI, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        await client.chat.completions.create(
            model="nano", messages=[{"role": "user", "content": "x" * 100}], stream=stream
        )
    assert error.value.code == "context_length_exceeded"
    assert "64 tokens" in error.value.message
    assert "104 tokens" in error.value.message


@pytest.mark.parametrize("stream", [False, True])
async def test_an_unknown_model_is_not_found(engine: ScriptedEngine, client: openai.AsyncOpenAI, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        await client.chat.completions.create(model="gpt-9", messages=HELLO, stream=stream)
    assert error.value.code == "model_not_found"
    assert "nano" in error.value.message


async def test_an_unknown_endpoint_is_not_found(engine: ScriptedEngine, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="POST /v1/embeddings"):
        await client.embeddings.create(model="nano", input="x")


@pytest.mark.parametrize(
    ("content", "content_type", "said"),
    [
        (b"{", "application/json", "not valid JSON"),
        (b"", "application/json", "no body"),
        (b"[1]", "application/json", "must be a JSON object"),
        (b'"text"', "application/json", "must be a JSON object"),
        (b'{"messages": []}', "text/plain", "Content-Type: application/json"),
        (b"\xff\xfe", "application/json", ""),
        (b"[" * 4000, "application/json", ""),
        (b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', "application/json", "temperature"),
    ],
)
async def test_a_body_that_is_no_request_is_refused_in_words(
    engine: ScriptedEngine, url: str, content: Any, content_type: str, said: str
) -> None:
    async with http_client(url) as http:
        answer = await http.post(f"{url}/v1/chat/completions", content=content, headers={"Content-Type": content_type})
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


async def test_half_of_a_surrogate_pair_is_read_as_a_replacement_character(engine: ScriptedEngine, url: str) -> None:
    body = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    async with http_client(url) as http:
        answer = await http.post(
            f"{url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
        )
    assert answer.status_code == 200
    assert list(engine.requests[-1].prompt_token_ids)[2:-2] == list("\N{REPLACEMENT CHARACTER}".encode())


async def test_a_body_over_the_limit_is_refused_announced_or_not(
    engine: ScriptedEngine, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine, sending the large body may take longer than the gateway would wait for its end.
    monkeypatch.setattr("services.gateway.middleware.unread_body.LINGER_SECONDS", 60)

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield b"x" * 1024

    async with http_client(url) as http:
        for content in (b"x" * 5000, b"x" * 5_000_000, pieces()):
            answer = await http.post(
                f"{url}/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}
            )
            assert answer.status_code == 413
            assert answer.json()["error"]["code"] == "request_too_large"
            assert "4096 bytes" in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("code", "kind", "status", "retry_after"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, openai.BadRequestError, 400, None),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, openai.InternalServerError, 503, "2"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, openai.InternalServerError, 504, None),
        (grpc.StatusCode.INTERNAL, openai.InternalServerError, 500, None),
        (grpc.StatusCode.UNAVAILABLE, openai.InternalServerError, 503, "2"),
    ],
)
async def test_an_engines_refusal_has_the_status_that_fits(
    engine: ScriptedEngine,
    url: str,
    client: openai.AsyncOpenAI,
    code: Any,
    kind: Any,
    status: int,
    retry_after: str | None,
    stream: bool,
) -> None:
    engine.script = failing(code, "the words of the engine")
    with pytest.raises(kind) as error:
        await client.chat.completions.create(model="nano", messages=HELLO, stream=stream)
    assert error.value.status_code == status
    assert error.value.response.headers.get("retry-after") == retry_after
    # The client sees the engine's message about a wrong request, but not the engine's message about its own failure.
    assert ("the words of the engine" in str(error.value)) == (status == 400)
    await until_ready(url)


async def test_a_request_that_takes_too_long_is_ended() -> None:
    async with (
        running_engine() as engine,
        running_gateway(engine.address, request_timeout_seconds=0.3) as url,
        http_client(url) as http,
    ):
        engine.script = hanging("hello")
        await until_ready(url)
        answer = await http.post("/v1/chat/completions", json={"messages": HELLO})
        assert answer.status_code == 504
        streamed = await http.post("/v1/chat/completions", json={"messages": HELLO, "stream": True})
        assert '"code": "timeout"' in streamed.text or '"code":"timeout"' in streamed.text
