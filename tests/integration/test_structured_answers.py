"""`response_format` and `regex` through OpenAI's client, the gateway and the engine service with a random model."""

import json
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest
import pytest_asyncio

from nanochat_core.checkpoint import CheckpointRef, promote
from nanochat_core.store import open_store
from nanochat_core.training.checkpoint_writer import save_checkpoint
from tests.support.engine_models import BYTES, tiny_model
from tests.support.scripted_engine import http_client, running_gateway, until_ready
from tests.support.service_process import EngineProcess

pytestmark = pytest.mark.asyncio(loop_scope="module")

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


class Pet(pydantic.BaseModel):
    kind: Literal["cat", "dog"]
    legs: Literal[3, 4]
    good: bool


PET = {"type": "json_schema", "json_schema": {"name": "pet", "schema": Pet.model_json_schema(), "strict": True}}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    home = tmp_path_factory.mktemp("home")
    store, ref = open_store(str(home)), CheckpointRef("tiny", "sft", 1)
    save_checkpoint(store, ref, model=tiny_model(context_length=1024), tokenizer=BYTES, meta={})
    promote(store, ref)
    running = EngineProcess(Path(home))
    yield running
    assert running.stop() == 0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def url(engine: EngineProcess) -> AsyncIterator[str]:
    async with running_gateway(engine.address) as url:
        await until_ready(url)
        yield url


async def test_an_answer_follows_its_schema(client: openai.AsyncOpenAI) -> None:
    for seed in range(3):
        answer = await client.chat.completions.create(
            model="tiny", messages=HELLO, response_format=PET, temperature=1.5, seed=seed
        )
        assert answer.choices[0].finish_reason == "stop"
        Pet.model_validate_json(answer.choices[0].message.content or "")
        assert not hasattr(answer.choices[0].message, "nanochat")


async def test_a_streamed_answer_is_the_same(client: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "response_format": PET, "seed": 7, "n": 3}
    whole = await client.chat.completions.create(**asked)
    texts, reasons = ["", "", ""], ["", "", ""]
    async for chunk in await client.chat.completions.create(**asked, stream=True):
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == ["stop"] * 3
    for text in texts:
        Pet.model_validate_json(text)


async def test_the_clients_own_parsing_works(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.parse(model="tiny", messages=HELLO, response_format=Pet, temperature=1)
    assert isinstance(answer.choices[0].message.parsed, Pet)
    with pytest.raises(openai.LengthFinishReasonError):
        await client.chat.completions.parse(model="tiny", messages=HELLO, response_format=Pet, max_tokens=3)


async def test_any_object_is_an_object(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        n=8,
        response_format={"type": "json_object"},
        temperature=1,
        seed=1,
        max_tokens=400,
        logit_bias={str(ord('"')): 4, str(ord("}")): 4},
    )
    finished = [choice.message.content for choice in answer.choices if choice.finish_reason == "stop"]
    assert finished
    for text in finished:
        assert isinstance(json.loads(text or ""), dict)


@pytest.mark.parametrize("path", ["chat", "text"])
async def test_a_regular_expression_is_matched_from_end_to_end(client: openai.AsyncOpenAI, path: str) -> None:
    extra = {"regex": r"[A-Z][a-z]{2,6}, (yes|no)\."}
    if path == "chat":
        answer = await client.chat.completions.create(model="tiny", messages=HELLO, extra_body=extra)
        text = answer.choices[0].message.content
    else:
        text = (
            (await client.completions.create(model="tiny", prompt="Hi", max_tokens=40, extra_body=extra))
            .choices[0]
            .text
        )
    assert re.fullmatch(extra["regex"], text or "")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"regex": "(ab"}, "regex", "unclosed group"),
        ({"regex": "(?:a?){4999}a{5000}"}, "regex", "more than 1 s of CPU time: it has 4 repetitions"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}}},
            "response_format.json_schema.schema",
            "strin",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
            "response_format.json_schema.schema",
            "not",
        ),
    ],
)
async def test_what_only_the_engine_finds_wrong_is_named_too(
    url: str, stream: bool, change: dict[str, Any], param: str, message: str
) -> None:
    async with http_client(url) as http:
        answer = await http.post("/v1/chat/completions", json={"messages": HELLO, "stream": stream, **change})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, "invalid_value")
    assert message in error["message"]


async def test_the_engine_serves_on_after_refusals(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5)
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 5
