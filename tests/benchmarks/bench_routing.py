"""Compare the gateway's routing with round robin and least load, on real engines.

Run the program from the project's root: ``python -m tests.benchmarks.bench_routing``. It starts engines as processes,
with one thread each, and a gateway in front of them. All chats begin at once. Each has the same system prompt, several
turns, and questions of its own; a turn sends the whole conversation so far. The first column of the table is the share
of the prompts' tokens that were found in a cache. The second column divides the number of these tokens by the number
that a single engine finds; this engine has as much memory as all the others together, and its results are the last row.
The other columns are the time to the first token (median and 95th percentile).
"""

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import random
import statistics
import string
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from nanochat_core.checkpoint import CheckpointRef, promote
from nanochat_core.store import open_store
from nanochat_core.training.checkpoint_writer import save_checkpoint
from services.gateway.routing import Prompt, ReplicaLoad, Router, RoutingSettings
from tests.support.engine_models import BYTES, scripted_model
from tests.support.scripted_engine import openai_client, running_gateway, until_up
from tests.support.service_process import EngineProcess

CONTEXT = 4096
SYSTEM = "You are the guide of a small town. " * 8
QUESTION_CHARACTERS = (40, 160)
ANSWER_TOKENS = 20


class LeastLoad(Router):
    """Chooses the replica with the fewest sequences."""

    def choose(self, prompt: Prompt, loads: Mapping[str, ReplicaLoad], now: float) -> str:
        return min(loads, key=lambda replica: loads[replica].sequences)


class RoundRobin(Router):
    """Chooses the replicas one after another."""

    def __init__(self, settings: RoutingSettings, seed: int = 0) -> None:
        super().__init__(settings, seed)
        self._turns = itertools.count()

    def choose(self, prompt: Prompt, loads: Mapping[str, ReplicaLoad], now: float) -> str:
        return sorted(loads)[next(self._turns) % len(loads)]


@dataclasses.dataclass
class Found:
    """Token counts summed over all turns. ``waits`` has each turn's time to the first token in seconds."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    waits: list[float] = dataclasses.field(default_factory=list)


async def chat(client: Any, number: int, turns: int, found: Found) -> None:
    """Hold one conversation. Two chats with the same ``number`` have the same questions."""
    source = random.Random(number)
    messages: list[dict[str, str]] = [{"role": "system", "content": SYSTEM}]
    for _ in range(turns):
        length = source.randint(*QUESTION_CHARACTERS)
        messages.append({"role": "user", "content": "".join(source.choices(string.ascii_lowercase + " ", k=length))})
        started, first, answer = time.perf_counter(), None, ""
        stream = await client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=ANSWER_TOKENS, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        async for part in stream:
            if part.choices and part.choices[0].delta.content:
                first = first or time.perf_counter() - started
                answer += part.choices[0].delta.content
            if part.usage:
                found.prompt_tokens += part.usage.prompt_tokens
                found.cached_tokens += part.usage.prompt_tokens_details.cached_tokens
        assert first is not None
        found.waits.append(first)
        messages.append({"role": "assistant", "content": answer})


@contextlib.asynccontextmanager
async def engines(home: Path, count: int, cache_mib: int) -> AsyncIterator[list[str]]:
    """Start engines with empty caches as processes, and yield the engines' addresses."""
    flags = ["--kv-cache-mib", str(cache_mib), "--max-running", "64"]
    started = [await asyncio.to_thread(EngineProcess, home, *flags, ready=False) for _ in range(count)]
    try:
        for engine in started:
            await asyncio.to_thread(engine.connect)
        yield [engine.address for engine in started]
    finally:
        for engine in started:
            engine.process.kill()


async def measure(home: Path, router: type[Router], count: int, options: argparse.Namespace) -> Found:
    """Hold all chats with new engines and with one kind of router."""
    found = Found()
    async with engines(home, count, options.cache_mib * options.engines // count) as addresses:
        with mock.patch("services.gateway.engines.pool.Router", router):
            async with running_gateway(*addresses, poll_seconds=1.0, queue_seconds=600.0) as url:
                await until_up(url, count)
                # During this time, the router would send fewer requests to new engines, so the chats begin afterwards.
                await asyncio.sleep(RoutingSettings().warm_up_seconds)
                async with openai_client(url) as client:
                    await asyncio.gather(*(chat(client, n, options.turns, found) for n in range(options.chats)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", type=int, default=3)
    parser.add_argument("--chats", type=int, default=60)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--cache-mib", type=int, default=512, help="KV cache of each engine")
    options = parser.parse_args()
    ways = {"router": Router, "least load": LeastLoad, "round robin": RoundRobin}
    results: dict[str, Found] = {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        store, ref = open_store(folder), CheckpointRef("tiny", "sft", 1)
        model = scripted_model("<|assistant_start|>" + string.ascii_letters, context_length=CONTEXT)
        save_checkpoint(store, ref, model=model, tokenizer=BYTES, meta={})
        promote(store, ref)
        for name, router in ways.items():
            results[name] = asyncio.run(measure(home, router, options.engines, options))
        results["one engine"] = asyncio.run(measure(home, Router, 1, options))
    print(f"{options.engines} engines, {options.chats} chats of {options.turns} turns")
    print("| | found in a cache | of the reusable | first token p50 | first token p95 |")
    print("| --- | ---: | ---: | ---: | ---: |")
    findable = results["one engine"].cached_tokens
    for name, found in results.items():
        p95 = statistics.quantiles(found.waits, n=20)[-1]
        print(
            f"| {name} | {found.cached_tokens / found.prompt_tokens:.1%} | {found.cached_tokens / findable:.1%} "
            f"| {statistics.median(found.waits):.2f} s | {p95:.2f} s |"
        )


if __name__ == "__main__":
    main()
