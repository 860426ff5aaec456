"""A request is answered or refused in bounded time, whatever numbers it has and however long its lists are."""

import json
import time
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio

from tests.support.scripted_engine import http_client, running_engine, running_gateway, until_ready

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# JSON texts of values. Each replaces the character @ of a request's JSON.
BOUNDARIES = [
    "0", "1", "-1", "-2", "7", "256", "257", "2147483647", "2147483648", "4294967295", "4294967296",
    "9223372036854775807", "9223372036854775808", "18446744073709551616", "-9223372036854775809", "1" + "0" * 400,
    "1" + "0" * 5000, "10.0", "1.5", "1e400", "-0.0", "NaN", "Infinity", "true", "null", '"5"', '""', "[]", "[1]", "{}",
]  # fmt: skip
SAMPLING = [
    "n", "max_tokens", "stop", "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "logit_bias", "regex", "priority", "user", "stream",
    "stream_options", "model", "min_tokens", "stop_token_ids", "ignore_eos", "structured_outputs", "guided_json",
    "guided_regex", "guided_choice",
]  # fmt: skip
CHAT_ONLY = [
    "messages", "response_format", "max_completion_tokens", "logprobs", "top_logprobs", "tools", "tool_choice",
    "continue_final_message", "add_generation_prompt", "truncation",
]  # fmt: skip
RESPONSES_PARAMETERS = [
    "input", "instructions", "previous_response_id", "stream", "stream_options", "max_output_tokens", "temperature",
    "top_p", "top_logprobs", "include", "text", "tools", "tool_choice", "truncation", "store", "metadata", "seed",
    "reasoning",
]  # fmt: skip
MESSAGES_PARAMETERS = [
    "messages", "system", "max_tokens", "stop_sequences", "stream", "temperature", "top_p", "top_k", "tools",
    "tool_choice", "metadata", "thinking",
]  # fmt: skip
SANDBOX_PARAMETERS = [
    "code", "result_format", "stdin", "argv", "files", "collect_files", "collect_endings", "session", "limits",
    "stream",
]  # fmt: skip
COMPLETION_ONLY = ["prompt", "logprobs", "echo", "suffix", "best_of"]
ASKED = '"messages":[{"role":"user","content":"a"}]'
CALLED = (
    '{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","nanochat":{"tool_events":'
    '[{"type":"call","call_index":X,"code":"1","offset":Y}]}},{"role":"user","content":"a"}]}'
)
PLACES = [
    *[(CHAT, f'{{{ASKED},"{name}":@}}') for name in SAMPLING + CHAT_ONLY],
    *[(COMPLETIONS, f'{{"prompt":"a","{name}":@}}') for name in SAMPLING + COMPLETION_ONLY],
    *[("/v1/responses", f'{{"input":"a","{name}":@}}') for name in RESPONSES_PARAMETERS],
    *[("/v1/messages", f'{{{ASKED},"max_tokens":5,"{name}":@}}') for name in MESSAGES_PARAMETERS],
    *[("/v1/sandbox/execute", f'{{"code":"1","{name}":@}}') for name in SANDBOX_PARAMETERS],
    *[("/v1/sandbox/execute", f'{{"code":"1","limits":{{"{name}":@}}}}') for name in ("wall_seconds", "memory_bytes")],
    (CHAT, f'{{{ASKED},"stop_token_ids":[@]}}'),
    ("/v1/responses", '{"input":[@]}'),
    ("/v1/responses", '{"input":[{"type":"code_interpreter_call","code":"1","outputs":@}]}'),
    ("/v1/messages", '{"max_tokens":5,"messages":[{"role":"user","content":[@]}]}'),
    (CHAT, f'{{{ASKED},"logprobs":true,"top_logprobs":@}}'),
    (CHAT, f'{{{ASKED},"logit_bias":{{"5":@}}}}'),
    (CHAT, '{"messages":[{"role":"user","content":@}]}'),
    (CHAT, CALLED.replace("X", "@").replace("Y", "0")),
    (CHAT, CALLED.replace("X", "0").replace("Y", "@")),
    (COMPLETIONS, '{"prompt":[@]}'),
    (COMPLETIONS, '{"prompt":[[@]]}'),
    ("/tokenize", '{"prompt":@}'),
    ("/tokenize", '{"prompt":"a","add_special_tokens":@}'),
    ("/detokenize", '{"tokens":[@]}'),
    ("/detokenize", '{"tokens":@}'),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with running_engine() as engine, running_gateway(engine.address) as url, http_client(url) as client:
        await until_ready(url)
        yield client


async def post(http: httpx.AsyncClient, path: str, body: str | bytes) -> httpx.Response:
    return await http.post(path, content=body, headers={"Content-Type": "application/json"}, timeout=30)


@pytest.mark.parametrize(("path", "template"), PLACES)
async def test_every_boundary_of_every_parameter_is_served_or_refused(
    http: httpx.AsyncClient, path: str, template: str
) -> None:
    for value in BOUNDARIES:
        answer = await post(http, path, template.replace("@", value))
        assert answer.status_code in (200, 400, 404), (template.replace("@", value[:30]), answer.text)
        if answer.status_code != 200:
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["code"], error
            assert len(error["message"]) < 1000, "the error repeats what the client sent"


@pytest.mark.parametrize("value", ["4294967296", "9223372036854775808", "1" + "0" * 400])
async def test_a_top_k_beyond_every_vocabulary_means_all_tokens(http: httpx.AsyncClient, value: str) -> None:
    answer = await post(http, COMPLETIONS, f'{{"prompt":"a","top_k":{value}}}')
    assert answer.status_code == 200, answer.text


EVENTS = '{"messages":[{"role":"assistant","content":"","nanochat":{"tool_events":[@]}}]}'
USER = '{"role":"user","content":"a"}'
CALL = '{"type":"call","call_index":0,"code":"","offset":0}'


def many(template: str, entry: str, count: int) -> str:
    return template.replace("@", ",".join([entry] * count))


def numbered(template: str, value: str, count: int) -> str:
    return template.replace("@", ",".join(f'"{i}":{value}' for i in range(count)))


MASSES = {
    "empty tool events": (CHAT, many(EVENTS, "{}", 300_000)),
    "tool events": (CHAT, many(EVENTS, CALL, 18_000)),
    "numbers as messages": (CHAT, many('{"messages":[@]}', "1", 400_000)),
    "messages": (CHAT, many('{"messages":[@]}', USER, 30_000)),
    "fields": (CHAT, numbered("{@}", "1", 80_000)),
    "biases": (CHAT, numbered(f'{{{ASKED},"logit_bias":{{@}}}}', '"a"', 70_000)),
    "parts": (CHAT, many('{"messages":[{"role":"user","content":[@]}]}', "{}", 300_000)),
    "items": ("/v1/responses", many('{"input":[@]}', "{}", 300_000)),
    "parts of an item": ("/v1/responses", many('{"input":[{"role":"user","content":[@]}]}', "{}", 300_000)),
    "blocks": ("/v1/messages", many('{"max_tokens":5,"messages":[{"role":"user","content":[@]}]}', "{}", 300_000)),
    "tools": (CHAT, many(f'{{{ASKED},"tools":[@]}}', "{}", 300_000)),
    "a schema of a tool": (
        CHAT,
        numbered(
            f'{{{ASKED},"tools":[{{"type":"function","function":{{"name":"a","parameters":{{"properties":{{@}}}}}}}}]}}',
            "{}",
            70_000,
        ),
    ),
    "stop strings": (CHAT, many(f'{{{ASKED},"stop":[@]}}', '""', 300_000)),
    "nested arrays": (CHAT, "[" * 900_000),
    "nested objects": (CHAT, '{"a":' * 150_000),
    "digits": (CHAT, many('{"messages":@}', "1" * 900_000, 1)),
    "prompts": (COMPLETIONS, many('{"prompt":[@]}', "[1]", 200_000)),
    "token ids": (COMPLETIONS, many('{"prompt":[@]}', "1", 450_000)),
    "strings as tokens": ("/detokenize", many('{"tokens":[@]}', '""', 300_000)),
    "tokens": ("/detokenize", many('{"tokens":[@]}', "1", 450_000)),
    "a name of a model": (COMPLETIONS, many('{"prompt":"a","model":"@"}', "x" * 100_000, 1)),
    "a type of a part": (CHAT, many('{"messages":[{"role":"user","content":[{"type":"@"}]}]}', "x" * 100_000, 1)),
    "a key of a bias": (COMPLETIONS, many('{"prompt":"a","logit_bias":{"@":1}}', "x" * 100_000, 1)),
}


@pytest.mark.parametrize("mass", MASSES)
async def test_a_mass_of_entries_is_refused_at_once_and_with_one_error(http: httpx.AsyncClient, mass: str) -> None:
    path, body = MASSES[mass]
    assert len(body) < 1_000_000
    began = time.process_time()  # the gateway runs in this process
    answer = await post(http, path, body)
    seconds = time.process_time() - began
    assert answer.status_code in (400, 404), answer.text[:300]
    assert len(answer.content) < 1000
    assert json.loads(answer.content)["error"]["code"]
    assert seconds < 2, "takes a tenth of a second of processor time"
