"""If a real engine is lost, its answers continue at another engine and are the same as without the loss.

``NANOCHAT_EXAMPLES=29 pytest -s tests/integration/test_moved_answers.py`` runs two hundred streams, and prints how long
the moves took.
"""

import asyncio
import contextlib
import re
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from nanochat_core.checkpoint import CheckpointRef, promote
from nanochat_core.store import open_store
from nanochat_core.training.checkpoint_writer import save_checkpoint
from tests.support.engine_models import BYTES, CALLING, examples, tiny_model
from tests.support.scripted_engine import http_client, openai_client, running_gateway, until_up
from tests.support.service_process import EngineProcess

pytestmark = pytest.mark.slow

SCHEMA = {"type": "array", "items": {"enum": ["cat", "dog", "bird"]}, "minItems": 20, "maxItems": 30}
FORMAT = {"type": "json_schema", "json_schema": {"name": "pets", "schema": SCHEMA}}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"n": 2, "logprobs": True, "top_logprobs": 2},
    "penalized": {"frequency_penalty": 0.5, "presence_penalty": 0.5},
    "stopped": {"n": 2, "stop": ["a", "e8"]},
    "schema": {"response_format": FORMAT},
    "regex": {"extra_body": {"regex": "([a-z]{3,9} ){20,40}"}},
    "tools": {"logit_bias": {str(token): bias for token, bias in CALLING.items()}},
}
# An answer that lasts for several seconds.
LONG: dict[str, Any] = {
    "model": "tiny",
    "prompt": "On and on",
    "max_tokens": 8000,
    "temperature": 0,
    "logit_bias": {str(token): -100 for token in BYTES.special_ids.values()},
    "stream": True,
}
REPEATS = examples(3)

Choices = dict[int, dict[str, Any]]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    store, ref = open_store(str(tmp_path)), CheckpointRef("tiny", "sft", 1)
    save_checkpoint(store, ref, model=tiny_model(context_length=8192), tokenizer=BYTES, meta={})
    promote(store, ref)
    return tmp_path


@pytest.fixture
def engines(home: Path) -> Iterator[list[EngineProcess]]:
    # The engines are slow, so that the answers still run when an engine is lost, even if the loss comes late.
    flags = ("--drain-seconds", "60", "--max-running", "400")
    running = [EngineProcess(home, *flags, module="tests.support.slow_engine", ready=False) for _ in range(2)]
    for engine in running:
        engine.connect()
    yield running
    for engine in running:
        with contextlib.suppress(ProcessLookupError):
            engine.process.send_signal(signal.SIGKILL)


async def told(client: openai.AsyncOpenAI, kind: str, seed: int, chunks: asyncio.Semaphore) -> Choices:
    """Returns the contents of each choice that the client gets. Releases ``chunks`` for each chunk."""
    messages: Any = [{"role": "user", "content": f"{kind} {seed}"}]
    options = {"model": "tiny", "messages": messages, "max_tokens": 120, "seed": seed, "stream": True} | KINDS[kind]
    choices: Choices = {}
    async for chunk in await client.chat.completions.create(**options):
        for choice in chunk.choices:
            facts = choices.setdefault(choice.index, {"text": "", "events": [], "logprobs": [], "reasons": []})
            facts["text"] += choice.delta.content or ""
            for event in ((choice.delta.model_extra or {}).get("nanochat") or {}).get("tool_events", []):
                facts["events"].append({name: value for name, value in event.items() if name != "duration_seconds"})
            if choice.logprobs is not None:
                facts["logprobs"] += [round(token.logprob, 3) for token in choice.logprobs.content or []]
            if choice.finish_reason:
                facts["reasons"].append(choice.finish_reason)
        chunks.release()
    return choices


@contextlib.asynccontextmanager
async def long_answers(client: openai.AsyncOpenAI) -> AsyncIterator[list[str]]:
    """The texts of two equal answers, which run until the end of the block. On entry, both have begun."""
    texts, begun = ["", ""], asyncio.Semaphore(0)

    async def read(index: int) -> None:
        async for chunk in await client.completions.create(**LONG):
            texts[index] += chunk.choices[0].text
            begun.release()

    reading = [asyncio.create_task(read(index)) for index in range(2)]
    try:
        while not all(texts):
            await begun.acquire()
        yield texts
    finally:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)


async def moves(url: str, reason: str) -> dict[str, float]:
    """For each limit in seconds, the number of moves that interrupted a stream for at most this time."""
    async with http_client(url) as http:
        lines = (await http.get("/metrics")).text.splitlines()
    pattern = re.compile(rf'nanochat_gateway_migration_gap_seconds_bucket{{le="(.+)",reason="{reason}"}} (.+)')
    return {found[1]: float(found[2]) for line in lines if (found := pattern.fullmatch(line))}


@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGKILL, "died"), (signal.SIGSTOP, "hung"), (signal.SIGTERM, "drains")]
)
async def test_every_answer_is_the_one_of_an_undisturbed_run(
    engines: list[EngineProcess], number: signal.Signals, reason: str
) -> None:
    requests = [(kind, seed) for seed in range(REPEATS) for kind in KINDS]
    # On a busy machine, a process that runs may answer late. Only the test of a process that hangs needs a short limit.
    limit = 3.0 if reason == "hung" else 20.0
    changes: dict[str, Any] = {"poll_seconds": 0.5, "health_timeout_seconds": limit, "queue_seconds": 120.0}
    async with running_gateway(*(engine.address for engine in engines), **changes) as url:
        await until_up(url, 2)
        client = openai_client(url)

        async def ask_all(chunks: asyncio.Semaphore) -> list[Choices]:
            return await asyncio.gather(*(told(client, kind, seed, chunks) for kind, seed in requests))

        undisturbed = await ask_all(asyncio.Semaphore(0))
        chunks = asyncio.Semaphore(0)
        # The long answers still run if this process is stopped for a while, and the others end meanwhile.
        async with long_answers(client) as texts:
            asking = asyncio.create_task(ask_all(chunks))
            for _ in range(3 * len(requests)):  # by then, most answers have begun
                await chunks.acquire()
            running = [(await asyncio.to_thread(engine.load)).running for engine in engines]
            victim = engines[running.index(max(running))]
            victim.process.send_signal(number)
            disturbed = await asking
            async with asyncio.timeout(60):
                while not (await moves(url, reason)).get("+Inf"):
                    await asyncio.sleep(0.05)
        assert texts[0].startswith(texts[1]) or texts[1].startswith(texts[0])
        for request, before, after in zip(requests, undisturbed, disturbed, strict=True):
            assert after == before, request
        gaps = await moves(url, reason)
        assert gaps["+Inf"] > 0
        longest = next(seconds for seconds, count in gaps.items() if count == gaps["+Inf"])
        print(f"{number.name}: {len(requests)} streams, {gaps['+Inf']:.0f} moves, each within {longest} seconds")
        assert any(choice["events"] for answer in undisturbed for choice in answer.values())
        if number == signal.SIGTERM:
            assert victim.process.wait(60) == 0
