"""Test limits, the loss of Redis and the speed of a revocation, with many clients of two gateways that share a Redis.

``python -m tests.benchmarks.limits`` starts a Redis, a scripted engine and two gateways as processes, and prints what
the clients saw as a table in Markdown. It fails if a promise of docs/admission.md does not hold.
"""

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from services.gateway.admission.keys import Limits, id_of
from services.gateway.admission.redis_link import RedisLink
from services.gateway.admission.redis_store import RedisStore
from services.gateway.admission.usage import last_days
from tests.support.api_keys import bearer, created
from tests.support.redis_server import RedisServer
from tests.support.scripted_engine import ScriptedEngine, running_engine, saying
from tests.support.service_process import GatewayProcess

BODY = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}


@dataclasses.dataclass
class Seen:
    """What clients saw."""

    statuses: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    # Time of each answer in seconds, its status, and how long it took.
    answers: list[tuple[float, int, float]] = dataclasses.field(default_factory=list)

    def slowest(self) -> float:
        """The longest time to an answer in seconds."""
        return max(seconds for _, _, seconds in self.answers)


class Stack:
    """Two gateways, their Redis and their engine."""

    def __init__(self, redis: RedisServer, store: RedisStore, engine: ScriptedEngine, failure: str) -> None:
        self.redis = redis
        self.store = store
        self.engine = engine
        flags = ("--redis-url", redis.url, "--redis-failure", failure, "--anonymous-scopes", "none")
        self.gateways = [GatewayProcess(engine.address, flags=flags) for _ in range(2)]
        self._turns = itertools.cycle(gateway.url for gateway in self.gateways)

    async def load(self, key: str, clients: int, until: Callable[[], bool]) -> Seen:
        """Lets clients ask one question after the other until ``until`` is true."""
        seen = Seen()

        async def client(http: httpx.AsyncClient) -> None:
            while not until():
                began = time.monotonic()
                try:
                    status = (await http.post("/v1/chat/completions", json=BODY, headers=bearer(key))).status_code
                except httpx.TransportError:
                    status = 0
                seen.statuses[status] += 1
                seen.answers.append((time.monotonic(), status, time.monotonic() - began))

        async with contextlib.AsyncExitStack() as stack:
            https = [
                await stack.enter_async_context(httpx.AsyncClient(base_url=next(self._turns), verify=False, timeout=30))
                for _ in range(clients)
            ]
            await asyncio.gather(*map(client, https))
        return seen

    async def answered(self, key: str) -> int:
        """Number of the key's requests in the stored usage."""
        table = await self.store.usage(last_days(2, time.time()))
        return sum(usage.requests for (_, used), usage in table.items() if used == id_of(key))

    async def stop(self) -> None:
        """Ends the gateways, which write their usage."""
        for gateway in self.gateways:
            await asyncio.to_thread(gateway.stop)


def row(what: str, promised: str, seen: str) -> None:
    print(f"| {what} | {promised} | {seen} |", flush=True)


async def exactness(stack: Stack, clients: int, seconds: float, limit: int) -> None:
    """Counts the answers of a key with a limit."""
    key = await created(stack.store, limits=Limits(requests=limit))
    end = time.monotonic() + seconds
    seen = await stack.load(key, clients, lambda: time.monotonic() > end)
    good = [(at, took) for at, status, took in seen.answers if status == 200]
    # The bucket is full at the first request, and is refilled at a constant rate until the last answer.
    longest = max(at for at, _ in good) - min(at - took for at, took in good)
    most = limit + int(limit * longest / 60)
    row(
        f"{clients} clients, {limit} requests per minute, {seconds:.0f} s",
        f"at least {limit}, at most {most}",
        f"{len(good)} of {len(seen.answers)} answered, the others 429; {len(stack.engine.requests)} reached the engine",
    )
    assert limit <= len(good) <= most
    assert set(seen.statuses) == {200, 429}
    assert len(stack.engine.requests) == len(good)


async def killed_redis(stack: Stack, clients: int, failure: str) -> tuple[str, int]:
    """Kills Redis under load and starts it again. Returns the key and the number of its requests with status 200."""
    key = await created(stack.store, limits=Limits(requests=10_000_000, answers=10_000))
    done = False

    async def kill_and_start() -> tuple[float, float]:
        nonlocal done
        await asyncio.sleep(2)
        stack.redis.kill()
        killed = time.monotonic()
        await asyncio.sleep(3)
        await asyncio.to_thread(stack.redis.start)
        started = time.monotonic()
        await asyncio.sleep(3)
        done = True
        return killed, started

    seen, (killed, started) = await asyncio.gather(stack.load(key, clients, lambda: done), kill_and_start())
    without = collections.Counter(status for at, status, took in seen.answers if killed < at - took and at < started)
    refused = [at for at, status, _ in seen.answers if status != 200 and at > started]
    row(
        f"Redis killed for 3 s, `--redis-failure {failure}`",
        "200" if failure == "open" else "503",
        f"{dict(without)}; slowest answer {seen.slowest():.2f} s; last refusal "
        + (f"{max(refused) - started:.2f} s after the start" if refused else "none after the start"),
    )
    assert set(without) == {200 if failure == "open" else 503}
    assert 0 not in seen.statuses
    return key, seen.statuses[200]


async def revocation(stack: Stack) -> None:
    """Measures the time until both gateways refuse a revoked key."""
    worst = 0.0
    for _ in range(5):
        key = await created(stack.store)
        record = (await stack.store.load())[str(id_of(key))]
        async with contextlib.AsyncExitStack() as opened:
            https = [
                await opened.enter_async_context(httpx.AsyncClient(base_url=gateway.url, verify=False))
                for gateway in stack.gateways
            ]

            async def status(http: httpx.AsyncClient, key: str = key) -> int:
                return (await http.get("/v1/models", headers=bearer(key))).status_code

            assert [await status(http) for http in https] == [200, 200]
            await stack.store.replace(record, record.revoke())
            began = time.monotonic()
            for http in https:
                while await status(http) != 401:
                    await asyncio.sleep(0.005)
            worst = max(worst, time.monotonic() - began)
    row("a revoked key is refused by both gateways", "within 2 s", f"{worst:.2f} s, the slowest of 5")
    assert worst < 2


async def run(clients: int, seconds: float, limit: int) -> None:
    print("| Load | Promised | Seen |\n| --- | --- | --- |")
    for failure in ("open", "closed"):
        with tempfile.TemporaryDirectory() as folder:
            redis = RedisServer(Path(folder))
            store = RedisStore(RedisLink(redis.url, 5.0))
            try:
                async with running_engine() as engine:
                    engine.script = saying("hello")
                    stack = await asyncio.to_thread(Stack, redis, store, engine, failure)
                    try:
                        await until_served(stack)
                        if failure == "open":
                            await exactness(stack, clients, seconds, limit)
                            await revocation(stack)
                        key, answers = await killed_redis(stack, clients, failure)
                    finally:
                        await stack.stop()
                    counted = await stack.answered(key)
                    row("usage after that", f"{answers} requests", f"{counted} requests")
                    assert counted == answers
            finally:
                await store.aclose()
                redis.kill()


async def until_served(stack: Stack) -> None:
    """Waits until both gateways know the model."""

    async def ready(url: str) -> bool:
        async with httpx.AsyncClient(base_url=url, verify=False) as http:
            return bool((await http.get("/readyz")).json()["models"])

    async with asyncio.timeout(30):
        for gateway in stack.gateways:
            while not await ready(gateway.url):
                await asyncio.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--limit", type=int, default=600, help="requests per minute of the key")
    arguments = parser.parse_args()
    asyncio.run(run(arguments.clients, arguments.seconds, arguments.limit))


if __name__ == "__main__":
    main()
