"""Chat completions as OpenAI's own client sees them, with a scripted engine behind the real gateway."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import openai
import pytest
import pytest_asyncio

from nanochat_core.protos import engine_pb2 as pb
from tests.support.scripted_engine import (
    SPECIAL,
    TOKENIZER,
    ScriptedEngine,
    chunk,
    failing,
    hanging,
    http_client,
    ids,
    openai_client,
    running_engine,
    running_gateway,
    saying,
    until_ready,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served() -> AsyncIterator[tuple[ScriptedEngine, str]]:
    async with running_engine() as engine, running_gateway(engine.address) as url:
        await until_ready(url)
        yield engine, url


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def beating(served: tuple[ScriptedEngine, str]) -> AsyncIterator[str]:
    """The address of a gateway that sends heartbeats after a short silence."""
    async with running_gateway(served[0].address, heartbeat_seconds=0.2) as url:
        await until_ready(url)
        yield url


@pytest.fixture
def engine(served: tuple[ScriptedEngine, str]) -> ScriptedEngine:
    served[0].forget()
    return served[0]


async def test_a_conversation_is_answered(engine: ScriptedEngine, client: openai.AsyncOpenAI) -> None:
    engine.script = saying("the wor", "ld")
    answer = await client.chat.completions.create(model="nano", messages=HELLO)
    assert answer.choices[0].message.content == "the world"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "nano"
    # bos, user_start, hello, user_end, assistant_start
    assert list(engine.requests[0].prompt_token_ids) == [
        TOKENIZER.bos_id,
        SPECIAL["<|user_start|>"],
        *TOKENIZER.encode("hello"),
        SPECIAL["<|user_end|>"],
        SPECIAL["<|assistant_start|>"],
    ]
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.completion_tokens == len(ids("the wor", "ld")) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


async def test_the_blocking_client_streams_too(engine: ScriptedEngine, url: str) -> None:
    engine.script = saying("hello world")

    def read() -> list[str | None]:
        blocking = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
        with blocking.chat.completions.create(model="nano", messages=HELLO, stream=True) as stream:
            return [part.choices[0].delta.content for part in stream]

    assert "".join(text or "" for text in await asyncio.to_thread(read)) == "hello world"


async def test_the_raw_stream_is_what_the_protocol_says(engine: ScriptedEngine, url: str) -> None:
    engine.script = saying("hello", "!")
    async with http_client(url) as http:
        answer = await http.post(
            f"{url}/v1/chat/completions",
            json={"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}},
        )
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["cache-control"] == "no-cache"
    assert "content-length" not in answer.headers
    events = answer.text.split("\n\n")
    assert events.pop() == ""
    assert events.pop() == "data: [DONE]"
    assert all(event.startswith("data: ") for event in events)
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert [part["choices"][0]["delta"] for part in chunks[:-1]] == [
        {"role": "assistant", "content": ""},
        {"content": "hello"},
        {"content": "!"},
        {},
    ]
    assert [part["choices"][0]["finish_reason"] for part in chunks[:-1]] == [None, None, None, "stop"]
    assert [part["usage"] for part in chunks[:-1]] == [None] * 4
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert {part["object"] for part in chunks} == {"chat.completion.chunk"}
    assert len({(part["id"], part["created"], part["model"], part["system_fingerprint"]) for part in chunks}) == 1


async def test_usage_is_absent_from_a_stream_that_did_not_ask(engine: ScriptedEngine, url: str) -> None:
    engine.script = saying("hello")
    async with http_client(url) as http:
        answer = await http.post(f"{url}/v1/chat/completions", json={"messages": HELLO, "stream": True})
    assert '"usage"' not in answer.text


async def test_no_chunk_ever_splits_a_character(engine: ScriptedEngine, client: openai.AsyncOpenAI) -> None:
    text = "naïve 😀👩‍🚀 ñ 漢字"
    engine.script = saying(text.encode())
    pieces = []
    async for part in await client.chat.completions.create(model="nano", messages=HELLO, stream=True):
        pieces.append(part.choices[0].delta.content or "")
    assert "".join(pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert "😀" in pieces


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["STOP", ["never", "STOP"]])
async def test_a_stop_string_ends_the_answer_and_the_engines_work(
    engine: ScriptedEngine, client: openai.AsyncOpenAI, stop: Any, stream: bool
) -> None:
    async def script(request: pb.GenerateRequest, _context: Any) -> AsyncIterator[pb.GenerateChunk]:
        for byte in b"abc STOP def":
            yield chunk([byte])
        await asyncio.Event().wait()

    engine.script = script
    if stream:
        parts = [
            part
            async for part in await client.chat.completions.create(
                model="nano", messages=HELLO, stop=stop, stream=True, stream_options={"include_usage": True}
            )
        ]
        text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        reason, usage = parts[-2].choices[0].finish_reason, parts[-1].usage
    else:
        answer = await client.chat.completions.create(model="nano", messages=HELLO, stop=stop)
        text, reason, usage = answer.choices[0].message.content or "", answer.choices[0].finish_reason, answer.usage
    assert (text, reason) == ("abc ", "stop")
    # The gateway stopped the engine before the engine sent its counts. So usage counts the tokens up to the end of the
    # stop string.
    assert usage.completion_tokens == len("abc STOP")
    await asyncio.wait_for(engine.cancelled.acquire(), 30)


def tool_script(request: pb.GenerateRequest, _context: Any) -> AsyncIterator[pb.GenerateChunk]:
    async def run() -> AsyncIterator[pb.GenerateChunk]:
        yield chunk(ids("é = ".encode(), "<|python_start|>", "6*7"))
        call = pb.ToolEvent(call=pb.ToolCall(call_index=0, code="6*7"))
        yield chunk(ids("<|python_end|>"), events=[call])
        result = pb.ToolResult(call_index=0, status="ok", output="42", duration_seconds=0.002)
        yield chunk([], events=[pb.ToolEvent(result=result)])
        yield chunk(ids("<|output_start|>", "42", "<|output_end|>"))
        yield chunk(ids("42", "<|assistant_end|>"), finish=pb.FINISH_REASON_STOP)

    return run()


EVENTS = [
    {"index": 0, "type": "call", "call_index": 0, "code": "6*7", "offset": 4},
    {"index": 1, "type": "result", "call_index": 0, "status": "ok", "output": "42", "duration_seconds": 0.002},
]


async def test_tool_events_stand_beside_the_text(engine: ScriptedEngine, client: openai.AsyncOpenAI) -> None:
    engine.script = tool_script
    answer = await client.chat.completions.create(model="nano", messages=HELLO)
    assert answer.choices[0].message.content == "é = 42"
    assert answer.choices[0].message.nanochat == {"tool_events": EVENTS}
    assert engine.requests[0].tools.enabled


async def test_tool_events_are_streamed_when_they_happen(engine: ScriptedEngine, client: openai.AsyncOpenAI) -> None:
    engine.script = tool_script
    seen: list[Any] = []
    async for part in await client.chat.completions.create(model="nano", messages=HELLO, stream=True):
        delta = part.choices[0].delta
        seen += [delta.content] if delta.content else []
        seen += delta.nanochat["tool_events"] if getattr(delta, "nanochat", None) else []
    assert seen == ["é = ", *EVENTS, "42"]


async def test_the_clients_own_helper_puts_streamed_events_together(
    engine: ScriptedEngine, client: openai.AsyncOpenAI
) -> None:
    engine.script = tool_script
    async with client.chat.completions.stream(model="nano", messages=HELLO) as stream:
        message = (await stream.get_final_completion()).choices[0].message
    assert message.content == "é = 42"
    assert message.nanochat == {"tool_events": EVENTS}


async def test_an_answer_sent_back_as_it_came_gives_the_tokens_that_the_model_wrote(
    engine: ScriptedEngine, client: openai.AsyncOpenAI
) -> None:
    engine.script = tool_script
    first = await client.chat.completions.create(model="nano", messages=HELLO)
    message: Any = first.choices[0].message.model_dump()
    await client.chat.completions.create(model="nano", messages=[*HELLO, message, {"role": "user", "content": "the"}])
    prompt = list(engine.requests[-1].prompt_token_ids)
    written = ids(
        "é = ".encode(),
        *("<|python_start|>", "6*7", "<|python_end|>"),
        *("<|output_start|>", "42", "<|output_end|>"),
        *("42", "<|assistant_end|>"),
    )
    assert prompt[5 : 5 + len(written)] == written
    assert prompt[5 + len(written) :] == ids("<|user_start|>", "the", "<|user_end|>", "<|assistant_start|>")


@pytest.mark.parametrize("stream", [False, True])
async def test_n_choices_are_kept_apart(engine: ScriptedEngine, client: openai.AsyncOpenAI, stream: bool) -> None:
    async def script(request: pb.GenerateRequest, _context: Any) -> AsyncIterator[pb.GenerateChunk]:
        for step in range(3):
            for index in range(request.n):
                last = step == 2
                usage = pb.Usage(prompt_tokens=5, completion_tokens=3) if last else None
                text = f"{index}{step}"
                finish = (pb.FINISH_REASON_LENGTH if index else pb.FINISH_REASON_STOP) if last else 0
                yield chunk(ids(text), index=index, finish=finish, usage=usage)

    engine.script = script
    if stream:
        texts, reasons = {0: "", 1: ""}, {}
        async for part in await client.chat.completions.create(model="nano", messages=HELLO, n=2, stream=True):
            for choice in part.choices:
                texts[choice.index] += choice.delta.content or ""
                reasons[choice.index] = choice.finish_reason
    else:
        answer = await client.chat.completions.create(model="nano", messages=HELLO, n=2)
        texts = {choice.index: choice.message.content or "" for choice in answer.choices}
        reasons = {choice.index: choice.finish_reason for choice in answer.choices}
        assert answer.usage.completion_tokens == 6
        assert answer.usage.prompt_tokens == 5
    assert texts == {0: "000102", 1: "101112"}
    assert reasons == {0: "stop", 1: "length"}


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities_come_with_their_text(
    engine: ScriptedEngine, client: openai.AsyncOpenAI, stream: bool
) -> None:
    engine.script = saying("hello ", "😀".encode())
    options: dict[str, Any] = {"model": "nano", "messages": HELLO, "logprobs": True, "top_logprobs": 2}
    if stream:
        entries = []
        async for part in await client.chat.completions.create(**options, stream=True):
            if part.choices[0].logprobs:
                entries += part.choices[0].logprobs.content
    else:
        answer = await client.chat.completions.create(**options)
        entries = answer.choices[0].logprobs.content
    assert bytes(byte for entry in entries for byte in entry.bytes).decode() == "hello 😀"
    hello = TOKENIZER.encode("hello")[0]
    assert entries[0].token == "hello"
    assert entries[0].logprob == pytest.approx(-hello / 100)
    assert [top.token for top in entries[0].top_logprobs] == ["hello", "th"]
    assert entries[0].top_logprobs[1].logprob == pytest.approx(-(hello + 1) / 100)


async def test_parameters_reach_the_engine(engine: ScriptedEngine, client: openai.AsyncOpenAI) -> None:
    await client.chat.completions.create(
        model="nano",
        messages=HELLO,
        temperature=0.3,
        top_p=0.9,
        max_completion_tokens=7,
        seed=-1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"65": -100},
        user="somebody",
        extra_body={"top_k": 20, "min_p": 0.05, "repetition_penalty": 1.25, "unheard_of": {"a": 1}},
    )
    sampling = engine.requests[0].sampling
    assert sampling.temperature == pytest.approx(0.3)
    assert sampling.top_p == pytest.approx(0.9)
    assert (sampling.top_k, sampling.max_tokens, sampling.seed) == (20, 7, 2**64 - 1)
    assert sampling.min_p == pytest.approx(0.05)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.25, 0.5, -0.5)
    assert dict(sampling.logit_bias) == {65: -100.0}
    assert set(sampling.stop_token_ids) == {SPECIAL["<|assistant_end|>"], TOKENIZER.bos_id}
    assert not sampling.HasField("logprobs")


async def test_what_the_answer_must_match_reaches_the_engine(
    engine: ScriptedEngine, client: openai.AsyncOpenAI
) -> None:
    schema = {"type": "object", "properties": {"b": {"enum": ["é", 1]}, "a": {}}}
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}
    for changes in (
        {"response_format": form},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "text"}, "extra_body": {"regex": "a+"}},
        {"response_format": {"type": "text"}},
    ):
        await client.chat.completions.create(model="nano", messages=HELLO, **changes)
    by_schema, by_object, by_regex, free = (request.sampling for request in engine.requests)
    # Answers have their properties in the order of the schema, so the gateway must keep this order.
    assert json.dumps(json.loads(by_schema.json_schema)) == json.dumps(schema)
    assert by_object.json_object
    assert by_regex.regex == "a+"
    assert free.WhichOneof("constraint") is None


async def test_parameters_of_vllm_are_honored(engine: ScriptedEngine, client: openai.AsyncOpenAI) -> None:
    schema = {"type": "object"}
    for extra in (
        {"min_tokens": 3, "stop_token_ids": [5]},
        {"ignore_eos": True},
        {"guided_json": schema},
        {"guided_json": json.dumps(schema)},
        {"guided_regex": "a+"},
        {"guided_choice": ["a.b", "c"]},
        {"structured_outputs": {"json": schema}},
        {"structured_outputs": {"regex": "a+"}},
        {"structured_outputs": {"choice": ["a.b", "c"]}},
        {"structured_outputs": {"json_object": True}},
    ):
        await client.chat.completions.create(model="nano", messages=HELLO, max_tokens=9, extra_body=extra)
    stops, endless, *bound = (request.sampling for request in engine.requests)
    assert (stops.min_tokens, set(stops.stop_token_ids)) == (3, {5, SPECIAL["<|assistant_end|>"], TOKENIZER.bos_id})
    assert not endless.stop_token_ids
    assert [sampling.json_schema for sampling in bound[:2]] == [json.dumps(schema)] * 2
    assert [sampling.regex for sampling in bound[2:4]] == ["a+", r"(a\.b)|(c)"]
    assert bound[4].json_schema == json.dumps(schema)
    assert [sampling.regex for sampling in bound[5:7]] == ["a+", r"(a\.b)|(c)"]
    assert bound[7].json_object


async def test_the_last_answer_goes_on(engine: ScriptedEngine, client: openai.AsyncOpenAI) -> None:
    engine.script = saying("llo")
    started: list[Any] = [*HELLO, {"role": "assistant", "content": "he"}]
    for extra in ({}, {"continue_final_message": True, "add_generation_prompt": False}):
        answer = await client.chat.completions.create(model="nano", messages=started, extra_body=extra)
        assert answer.choices[0].message.content == "llo"
        assert list(engine.requests[-1].prompt_token_ids)[5:] == ids("he")
    await client.chat.completions.create(model="nano", messages=started, extra_body={"continue_final_message": False})
    assert list(engine.requests[-1].prompt_token_ids)[5:] == ids("he", "<|assistant_end|>", "<|assistant_start|>")


async def test_old_messages_are_left_out_where_the_request_says_so(
    engine: ScriptedEngine, client: openai.AsyncOpenAI
) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "x" * 200},
        {"role": "assistant", "content": "y"},
        {"role": "user", "content": "z" * 60},
    ]
    with pytest.raises(openai.BadRequestError, match="maximum context length is 256 tokens"):
        await client.chat.completions.create(model="nano", messages=messages)
    auto: Any = {"model": "nano", "messages": messages, "max_tokens": 40, "extra_body": {"truncation": "auto"}}
    answer = await client.chat.completions.create(**auto)
    assert TOKENIZER.decode(engine.requests[-1].prompt_token_ids[2:-2]) == "S\n\n" + "z" * 60
    assert (answer.choices[0].message.model_extra or {})["nanochat"] == {"left_out_turns": 2}
    first, *_ = [part async for part in await client.chat.completions.create(**auto, stream=True)]
    assert (first.choices[0].delta.model_extra or {})["nanochat"] == {"left_out_turns": 2}


async def test_nothing_is_said_of_left_out_messages_if_there_are_none(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="nano", messages=HELLO, extra_body={"truncation": "auto"})
    assert "nanochat" not in (answer.choices[0].message.model_extra or {})


async def test_token_counts_come_with_every_chunk_where_the_request_says_so(
    engine: ScriptedEngine, client: openai.AsyncOpenAI
) -> None:
    engine.script = saying("hello world")
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    stream = await client.chat.completions.create(model="nano", messages=HELLO, stream=True, stream_options=options)
    counts = [chunk.usage.completion_tokens async for chunk in stream if chunk.usage]
    assert counts == sorted(counts)
    assert len(set(counts)) > 2


async def test_left_out_parameters_have_the_documented_defaults(
    engine: ScriptedEngine, client: openai.AsyncOpenAI
) -> None:
    await client.chat.completions.create(model="nano", messages=HELLO)
    await client.chat.completions.create(model="nano", messages=HELLO)
    first, second = (request.sampling for request in engine.requests)
    assert first.temperature == pytest.approx(0.6)
    assert first.max_tokens == 256 - 5
    # The gateway draws a seed for each request, so that another replica can continue the answer.
    assert first.HasField("seed")
    assert first.seed != second.seed


async def test_an_answer_longer_than_the_context_has_room_for_is_capped(
    engine: ScriptedEngine, client: openai.AsyncOpenAI
) -> None:
    engine.script = saying("hello", finish=pb.FINISH_REASON_LENGTH)
    answer = await client.chat.completions.create(model="nano", messages=HELLO, max_tokens=100_000)
    assert engine.requests[0].sampling.max_tokens == 256 - 5
    assert answer.choices[0].finish_reason == "length"


async def test_top_p_zero_is_the_narrowest_choice_and_not_none(
    engine: ScriptedEngine, client: openai.AsyncOpenAI
) -> None:
    await client.chat.completions.create(model="nano", messages=HELLO, top_p=0)
    assert 0 < engine.requests[0].sampling.top_p < 1e-3


async def test_the_request_id_goes_all_the_way(engine: ScriptedEngine, client: openai.AsyncOpenAI) -> None:
    raw = await client.chat.completions.with_raw_response.create(
        model="nano", messages=HELLO, extra_headers={"x-request-id": "abc-123"}
    )
    assert raw.headers["x-request-id"] == "abc-123"
    assert raw.parse().choices[0].message.content
    assert engine.requests[0].request_id == "abc-123"
    assert engine.metadata[0]["x-request-id"] == "abc-123"


@pytest.mark.parametrize("bad", ["x" * 129, "tab\there", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"])
async def test_an_unusable_request_id_is_replaced(engine: ScriptedEngine, url: str, bad: str) -> None:
    async with http_client(url) as http:
        answer = await http.get(f"{url}/v1/models", headers={"x-request-id": bad.encode("latin-1")})
    assert answer.headers["x-request-id"] != bad
    assert len(answer.headers["x-request-id"]) == 32


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("said", [(), ("hello",)])
async def test_a_client_that_leaves_stops_the_engine(engine: ScriptedEngine, url: str, stream: bool, said: Any) -> None:
    engine.script = hanging(*said)
    async with http_client(url) as http:
        request = http.build_request("POST", f"{url}/v1/chat/completions", json={"messages": HELLO, "stream": stream})
        asked = asyncio.create_task(http.send(request, stream=True))
        while not engine.requests:
            await asyncio.sleep(0.01)
        if stream and said:
            answer = await asked
            async for line in answer.aiter_lines():
                if "hello" in line:
                    break
            await answer.aclose()
        else:
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
    await asyncio.wait_for(engine.cancelled.acquire(), 30)


@pytest.mark.parametrize("said", [(), ("hello",)])
async def test_silence_is_filled_with_comments(engine: ScriptedEngine, beating: str, said: Any) -> None:
    engine.script = hanging(*said)
    lines: list[str] = []
    async with (
        http_client(beating) as http,
        http.stream("POST", "/v1/chat/completions", json={"messages": HELLO, "stream": True}) as answer,
    ):
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            lines.append(line)
            # On a busy machine, the text may come after the first comments.
            if lines.count(": keep-alive") >= 2 and sum("hello" in line for line in lines) == len(said):
                break


async def test_openai_ignores_the_comments(engine: ScriptedEngine, beating: str) -> None:
    engine.script = saying("hello", "!", pause=0.3)
    pieces = []
    async for part in await openai_client(beating).chat.completions.create(model="nano", messages=HELLO, stream=True):
        pieces.append(part.choices[0].delta.content or "")
    assert "".join(pieces) == "hello!"


async def test_an_engine_that_dies_in_mid_stream_is_an_error_event_and_no_silent_end(
    engine: ScriptedEngine, url: str, client: openai.AsyncOpenAI
) -> None:
    engine.script = failing(grpc.StatusCode.INTERNAL, "secret detail", after=saying("hello", "!"))
    async with http_client(url) as http:
        answer = await http.post(f"{url}/v1/chat/completions", json={"messages": HELLO, "stream": True})
    last = answer.text.strip().split("\n\n")[-1]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["type"] == "server_error"
    assert "[DONE]" not in answer.text
    assert "secret" not in answer.text
    with pytest.raises(openai.APIError, match="failed"):
        async for _ in await client.chat.completions.create(model="nano", messages=HELLO, stream=True):
            pass


async def test_an_engine_that_ends_without_a_reason_is_an_error(
    engine: ScriptedEngine, client: openai.AsyncOpenAI
) -> None:
    async def script(request: pb.GenerateRequest, _context: Any) -> AsyncIterator[pb.GenerateChunk]:
        yield chunk(ids("hello"))

    engine.script = script
    with pytest.raises(openai.InternalServerError, match="failed on this request"):
        await client.chat.completions.create(model="nano", messages=HELLO)
