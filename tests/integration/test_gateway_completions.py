"""Text completions, tokens and models: the parts of the API besides chat."""

import asyncio
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
    failing,
    hanging,
    http_client,
    ids,
    running_engine,
    running_gateway,
    saying,
    until_ready,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served() -> AsyncIterator[tuple[ScriptedEngine, str]]:
    async with running_engine() as engine, running_gateway(engine.address, model_aliases=("gpt-4o",)) as url:
        await until_ready(url)
        yield engine, url


@pytest.fixture
def engine(served: tuple[ScriptedEngine, str]) -> ScriptedEngine:
    served[0].forget()
    served[0].script = saying(" world")
    return served[0]


async def echo(request: pb.GenerateRequest, _context: Any) -> AsyncIterator[pb.GenerateChunk]:
    """A script that repeats the prompt in each choice, after the choice's index."""
    for index in range(request.n):
        tokens = [*ids(str(index)), *(i for i in request.prompt_token_ids if i != TOKENIZER.bos_id)]
        for k, token in enumerate(tokens):
            last = k == len(tokens) - 1
            yield pb.GenerateChunk(
                index=index,
                tokens=[pb.Token(id=token)],
                finish_reason=pb.FINISH_REASON_LENGTH if last else 0,
                usage=pb.Usage(prompt_tokens=len(request.prompt_token_ids), completion_tokens=len(tokens))
                if last
                else None,
            )
            await asyncio.sleep(0)


async def test_a_text_is_continued_without_tools(engine: ScriptedEngine, client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="nano", prompt="hello", max_tokens=5)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (" world", "stop")
    assert answer.object == "text_completion"
    request = engine.requests[0]
    assert list(request.prompt_token_ids) == [TOKENIZER.bos_id, *TOKENIZER.encode("hello")]
    assert not request.tools.enabled
    assert request.sampling.max_tokens == 5


async def test_token_ids_are_used_as_they_are(engine: ScriptedEngine, client: openai.AsyncOpenAI) -> None:
    await client.completions.create(model="nano", prompt=[5, 6, 7])
    assert list(engine.requests[0].prompt_token_ids) == [5, 6, 7]


async def test_python_tokens_hide_nothing_without_tools(engine: ScriptedEngine, client: openai.AsyncOpenAI) -> None:
    engine.script = saying("a", "<|python_start|>", "b", "<|python_end|>", "c")
    assert (await client.completions.create(model="nano", prompt="x")).choices[0].text == "abc"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompts", [["ab", "cde"], [list(b"ab"), list(b"cde")]])
async def test_a_list_of_prompts_gets_n_answers_each(
    engine: ScriptedEngine, client: openai.AsyncOpenAI, prompts: Any, stream: bool
) -> None:
    engine.script = echo
    texts = [""] * 4
    if stream:
        async for part in await client.completions.create(
            model="nano", prompt=prompts, n=2, stream=True, stream_options={"include_usage": True}
        ):
            for choice in part.choices:
                texts[choice.index] += choice.text
            usage = part.usage
    else:
        answer = await client.completions.create(model="nano", prompt=prompts, n=2)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        texts = [choice.text for choice in answer.choices]
        usage = answer.usage
    assert texts == ["0ab", "1ab", "0cde", "1cde"]
    assert usage.completion_tokens == 14
    # The tokens of each prompt count once, although n is 2. A text prompt also has the token that begins a document.
    assert usage.prompt_tokens == 5 + (2 if isinstance(prompts[0], str) else 0)
    assert len({request.sampling.seed for request in engine.requests}) == 2


async def test_log_probabilities_have_the_older_form(engine: ScriptedEngine, client: openai.AsyncOpenAI) -> None:
    engine.script = saying("hello", "!")
    answer = await client.completions.create(model="nano", prompt="x", logprobs=1)
    found = answer.choices[0].logprobs
    assert found.tokens == ["hello", "!"]
    assert found.text_offset == [0, 5]
    assert found.token_logprobs[1] == pytest.approx(-0.33)
    assert list(found.top_logprobs[0]) == ["hello"]


async def scored(request: pb.GenerateRequest, _context: Any) -> AsyncIterator[pb.GenerateChunk]:
    """A script that gives token ``i`` of the prompt the score -i/100, and then writes "h" and ends the document."""
    prompt = request.prompt_token_ids

    def token(i: int) -> pb.Token:
        return pb.Token(id=i, logprob=-i / 100, top_logprobs=[pb.TopLogprob(token_id=i, logprob=-i / 100)])

    yield pb.GenerateChunk(
        prompt_tokens=[token(i) for i in prompt[1:]] if request.sampling.HasField("prompt_logprobs") else [],
        tokens=[token(ord("h"))],
    )
    yield pb.GenerateChunk(
        tokens=[token(TOKENIZER.bos_id)],
        finish_reason=pb.FINISH_REASON_STOP,
        usage=pb.Usage(prompt_tokens=len(prompt), completion_tokens=2),
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("logprobs", [None, 1])
async def test_an_echo_begins_with_the_prompt(
    engine: ScriptedEngine, client: openai.AsyncOpenAI, stream: bool, logprobs: Any
) -> None:
    engine.script = scored
    options: dict[str, Any] = {"model": "nano", "prompt": "hello é", "echo": True, "max_tokens": 5}
    if stream:
        parts = [part async for part in await client.completions.create(**options, logprobs=logprobs, stream=True)]
    else:
        parts = [await client.completions.create(**options, logprobs=logprobs)]
    assert "".join(part.choices[0].text for part in parts) == "hello éh"
    assert engine.requests[0].sampling.HasField("prompt_logprobs") == (logprobs is not None)
    found = [part.choices[0].logprobs for part in parts if part.choices[0].logprobs]
    if logprobs is None:
        assert not found
        return
    hello = TOKENIZER.encode("hello")[0]
    log_probabilities = [value for each in found for value in each.token_logprobs]
    assert log_probabilities == pytest.approx([-hello / 100, -0.32, -1.95, -1.69, -1.04, -TOKENIZER.bos_id / 100])
    assert [offset for each in found for offset in each.text_offset] == [0, 5, 6, 6, 7, 8]


async def test_no_tokens_and_an_echo_only_score_the_prompts(engine: ScriptedEngine, client: openai.AsyncOpenAI) -> None:
    engine.script = scored
    prompts = [[104, 101], [98]]
    answer = await client.completions.create(model="nano", prompt=prompts, echo=True, logprobs=1, max_tokens=0)
    assert [(choice.text, choice.finish_reason) for choice in answer.choices] == [("he", "length"), ("b", "length")]
    first, second = (choice.logprobs for choice in answer.choices)
    # Nothing precedes the first token of a prompt of token ids, so it has no log probability.
    assert first.token_logprobs == [None, pytest.approx(-1.01)]
    assert (first.top_logprobs, second.token_logprobs) == ([None, {"e": pytest.approx(-1.01)}], [None])
    assert answer.usage.completion_tokens == 0


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"echo": "yes"}, "echo"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [TOKENIZER.vocab_size]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"n": 9}, "n"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"prompt": [["a"]] * 2}, "prompt"),
        ({"prompt": [10**400]}, "prompt"),
        ({"logprobs": True}, "logprobs"),
        ({"prompt": list(range(100)) * 3}, "prompt"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_cannot_be_done_is_refused_by_name(
    engine: ScriptedEngine, url: str, change: Any, param: str, stream: bool
) -> None:
    async with http_client(url) as http:
        answer = await http.post(f"{url}/v1/completions", json={"prompt": "hello", "stream": stream, **change})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_one_failing_prompt_fails_the_request_and_ends_the_others(
    engine: ScriptedEngine, client: openai.AsyncOpenAI
) -> None:
    calls = 0

    def script(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateChunk]:
        nonlocal calls
        calls += 1
        bad = failing(grpc.StatusCode.INVALID_ARGUMENT, "no such thing")
        return (hanging("a") if calls == 1 else bad)(request, context)

    engine.script = script
    with pytest.raises(openai.BadRequestError, match="no such thing"):
        await client.completions.create(model="nano", prompt=["a", "b"])
    await asyncio.wait_for(engine.cancelled.acquire(), 30)


async def test_models_are_listed_and_described(engine: ScriptedEngine, client: openai.AsyncOpenAI) -> None:
    listed = [model async for model in await client.models.list()]
    assert [(model.id, model.root, model.object, model.owned_by) for model in listed] == [
        ("nano", "nano", "model", "nanochat"),
        ("gpt-4o", "nano", "model", "nanochat"),
    ]
    model = await client.models.retrieve("nano")
    assert model.nanochat == {
        "revision": "sft/step_10",
        "context_length": 256,
        "vocab_size": TOKENIZER.vocab_size,
        "parameters": 1234,
        "compute_dtype": "float32",
        "examples": [],
    }
    assert model.max_model_len == 256
    assert (await client.models.retrieve("gpt-4o")).id == "gpt-4o"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("some/other")


async def test_an_alias_answers_under_the_models_own_name(engine: ScriptedEngine, client: openai.AsyncOpenAI) -> None:
    assert (await client.completions.create(model="gpt-4o", prompt="x")).model == "nano"


async def test_tokens_go_there_and_back(engine: ScriptedEngine, url: str) -> None:
    async with http_client(url) as http:
        text = "hello 😀"
        made = (await http.post("/tokenize", json={"prompt": text, "return_token_strs": True})).json()
        assert made["tokens"] == [TOKENIZER.bos_id, *TOKENIZER.encode(text)]
        assert (made["count"], made["max_model_len"]) == (len(made["tokens"]), 256)
        assert made["token_strs"][:2] == ["<|bos|>", "hello"]
        plain = (await http.post("/tokenize", json={"prompt": text, "add_special_tokens": False})).json()
        assert (await http.post("/detokenize", json={"tokens": plain["tokens"]})).json() == {"prompt": text}


async def test_what_the_context_has_no_room_for_is_counted_all_the_same(engine: ScriptedEngine, url: str) -> None:
    async with http_client(url) as http:
        text = (await http.post("/tokenize", json={"prompt": "x" * 100_000})).json()
        chat = (await http.post("/tokenize", json={"messages": [{"role": "user", "content": "x" * 1000}]})).json()
    assert (text["count"], text["max_model_len"], len(text["tokens"])) == (100_001, 256, 100_001)
    assert chat["count"] == 1004


async def test_hundreds_of_prompts_are_answered(engine: ScriptedEngine, url: str) -> None:
    async with http_client(url) as http:
        answer = await http.post("/v1/completions", json={"prompt": ["a"] * 200}, timeout=30)
    assert [choice["index"] for choice in answer.json()["choices"]] == list(range(200))


async def test_the_tokens_of_a_conversation_are_those_that_chat_sends(
    engine: ScriptedEngine, url: str, client: openai.AsyncOpenAI
) -> None:
    messages: list[Any] = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello"}]
    async with http_client(url) as http:
        counted = (await http.post("/tokenize", json={"messages": messages})).json()
    await client.chat.completions.create(model="nano", messages=messages)
    assert counted["tokens"] == list(engine.requests[-1].prompt_token_ids)
    assert counted["tokens"][-1] == SPECIAL["<|assistant_start|>"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}),
        ("/tokenize", {"messages": [{"role": "user", "content": "a", "function_call": {"name": "b"}}]}),
        ("/detokenize", {"tokens": [10**6]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": "hello"}),
    ],
)
async def test_what_has_no_tokens_is_refused(engine: ScriptedEngine, url: str, path: str, body: Any) -> None:
    async with http_client(url) as http:
        answer = await http.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]
