"""Engines join and leave under their host names while the gateway runs. Only the name server is a stub."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from nanochat_core.discovery import Endpoint
from nanochat_core.grpc_client import ServiceChannel
from nanochat_core.protos import engine_pb2 as pb
from services.gateway.engines.channel import open_channel
from services.gateway.engines.pool import EnginePool
from services.gateway.metrics import Metrics
from services.gateway.settings import GatewaySettings
from tests.support.scripted_engine import (
    ScriptedEngine,
    hanging,
    http_client,
    openai_client,
    running_engine,
    running_gateway,
    saying,
    until_queued,
    until_ready,
    until_up,
)
from tests.support.waiting import until

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


class Names:
    """The addresses that names have now. A name without an entry cannot be looked up.

    ``failures`` is the number of lookups that failed.
    """

    def __init__(self, **addresses: list[str]) -> None:
        self.addresses = addresses
        self.failures = 0

    def __call__(self, name: str) -> list[str]:
        if name not in self.addresses:
            self.failures += 1
            raise OSError("temporary failure in name resolution")
        return self.addresses[name]


@contextlib.asynccontextmanager
async def engines_at_one_port(*hosts: str) -> AsyncIterator[tuple[str, list[ScriptedEngine]]]:
    """Runs an engine for each host, all at one port. Each answers with its host's name. Yields port and engines."""
    async with contextlib.AsyncExitStack() as stack:
        engines, port = [], "0"
        for host in hosts:
            engine = await stack.enter_async_context(running_engine(address=f"{host}:{port}"))
            engine.script = saying(host)
            engines.append(engine)
            port = engine.address.rpartition(":")[2]
        yield port, engines


async def until_known(url: str, *addresses: str) -> None:
    """Waits until the gateway has exactly these engines, all of them up."""
    async with http_client(url) as http, asyncio.timeout(30):
        while True:
            lines = (await http.get("/metrics")).text.splitlines()
            states = sorted(line for line in lines if line.startswith("nanochat_gateway_engine_up{"))
            if states == sorted(f'nanochat_gateway_engine_up{{address="{address}"}} 1.0' for address in addresses):
                return
            await asyncio.sleep(0.02)


async def ask(url: str) -> str:
    answer = await openai_client(url).chat.completions.create(model="nano", messages=HELLO)
    return answer.choices[0].message.content or ""


async def test_every_address_of_a_name_is_an_engine() -> None:
    hosts = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
    async with (
        engines_at_one_port(*hosts) as (port, _),
        running_gateway(f"engines:{port}", lookup=Names(engines=list(hosts))) as url,
    ):
        await until_known(url, *(f"{host}:{port}" for host in hosts))
        assert {await ask(url) for _ in range(40)} == set(hosts)


async def test_engines_join_and_leave_without_a_restart() -> None:
    names = Names(engines=["127.0.0.1"])
    async with (
        engines_at_one_port("127.0.0.1", "127.0.0.2") as (port, _),
        running_gateway(f"engines:{port}", lookup=names, discovery_seconds=0.05) as url,
    ):
        await until_known(url, f"127.0.0.1:{port}")
        names.addresses["engines"] = ["127.0.0.1", "127.0.0.2"]
        await until_known(url, f"127.0.0.1:{port}", f"127.0.0.2:{port}")
        assert {await ask(url) for _ in range(20)} == {"127.0.0.1", "127.0.0.2"}
        names.addresses["engines"] = ["127.0.0.2"]
        await until_known(url, f"127.0.0.2:{port}")
        assert {await ask(url) for _ in range(4)} == {"127.0.0.2"}


async def test_a_lookup_that_fails_keeps_the_known_engines() -> None:
    names = Names(engines=["127.0.0.1"])
    async with (
        engines_at_one_port("127.0.0.1") as (port, _),
        running_gateway(f"engines:{port}", lookup=names, discovery_seconds=0.05) as url,
    ):
        await until_known(url, f"127.0.0.1:{port}")
        names.addresses.clear()
        await until(lambda: names.failures >= 3, 30)
        await until_known(url, f"127.0.0.1:{port}")
        assert await ask(url) == "127.0.0.1"


async def test_names_addresses_and_both_families_may_be_mixed() -> None:
    async with (
        running_engine() as static,
        running_engine(address="[::1]:0") as sixth,
        engines_at_one_port("127.0.0.2") as (port, _),
        running_gateway(static.address, sixth.address, f"engines:{port}", lookup=Names(engines=["127.0.0.2"])) as url,
    ):
        await until_known(url, static.address, sixth.address, f"127.0.0.2:{port}")
        sixth.script = saying("six")
        assert {await ask(url) for _ in range(40)} == {"hello", "six", "127.0.0.2"}


async def test_a_stream_of_an_engine_that_leaves_its_name_goes_on_to_its_end() -> None:
    names = Names(engines=["127.0.0.1"])
    async with (
        engines_at_one_port("127.0.0.1", "127.0.0.2") as (port, (leaving, _)),
        running_gateway(f"engines:{port}", lookup=names, discovery_seconds=0.05) as url,
    ):
        await until_known(url, f"127.0.0.1:{port}")
        ended = asyncio.Event()
        leaving.script = saying("hello", "!", until=ended)
        asking = asyncio.create_task(ask(url))
        await until(lambda: leaving.requests, 30)
        names.addresses["engines"] = ["127.0.0.2"]
        await until_up(url, 2)  # the engine that has left stays known until its stream ends
        ended.set()
        assert await asking == "hello!"
        await until_known(url, f"127.0.0.2:{port}")


async def test_a_gateway_whose_name_has_no_address_yet_says_so_and_serves_when_it_has() -> None:
    names = Names()
    options: dict[str, Any] = {"discovery_seconds": 0.05, "waiting_hint": "It is being trained."}
    async with (
        engines_at_one_port("127.0.0.1") as (port, _),
        running_gateway(f"engines:{port}", lookup=names, **options) as url,
        http_client(url) as http,
    ):
        assert (await http.get("/readyz")).json()["waits_for"] == "No engine has been found yet. It is being trained."
        asking = asyncio.create_task(ask(url))
        await until_queued(url, 1)
        names.addresses["engines"] = ["127.0.0.1"]
        assert await asking == "127.0.0.1"
        assert (await http.get("/readyz")).json()["waits_for"] is None


async def test_a_model_may_be_at_an_engine_whose_name_has_no_address_yet() -> None:
    names = Names(engines=["127.0.0.1"])
    async with (
        engines_at_one_port("127.0.0.1", "127.0.0.2") as (port, (_, late)),
        running_gateway(f"engines:{port}", f"late:{port}", lookup=names, discovery_seconds=0.05) as url,
    ):
        late.info.name = "late"
        await until_known(url, f"127.0.0.1:{port}")
        create = openai_client(url).chat.completions.create
        asking = asyncio.create_task(create(model="late", messages=HELLO))
        await until_queued(url, 1)
        names.addresses["late"] = ["127.0.0.2"]
        assert (await asking).choices[0].message.content == "127.0.0.2"


async def test_engines_that_cannot_be_added_now_are_added_later(caplog: pytest.LogCaptureFixture) -> None:
    settings = GatewaySettings(engine_addresses=("engines:1",), discovery_seconds=0.01)
    failures = 2

    def connect(endpoint: Endpoint) -> ServiceChannel:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise MemoryError
        return open_channel(endpoint, settings)

    pool = EnginePool(settings, Metrics(), connect, Names(engines=["127.0.0.1"]))
    async with contextlib.aclosing(pool), asyncio.timeout(30):
        while pool.waits_for() == "No engine has been found yet.":
            await asyncio.sleep(0.01)
    assert [record.getMessage() for record in caplog.records if record.exc_info] == ["change of endpoints failed"] * 2


async def test_the_connection_of_an_engine_that_has_just_left_is_closed_with_the_pool() -> None:
    settings = GatewaySettings(engine_addresses=("engines:1",))
    channels: list[ServiceChannel] = []

    def connect(endpoint: Endpoint) -> ServiceChannel:
        channels.append(open_channel(endpoint, settings))
        return channels[-1]

    pool = EnginePool(settings, Metrics(), connect, Names(engines=["127.0.0.1"]))
    await until(lambda: pool.replicas(), 30)
    pool._set_endpoints([])
    assert pool.replicas() == []
    await pool.aclose()
    (channel,) = channels
    with pytest.raises(grpc.aio.UsageError, match="is closed"):
        channel.connection()


async def test_a_request_goes_on_if_its_engine_leaves_while_its_model_is_read_again() -> None:
    names = Names(engines=["127.0.0.1"])
    async with (
        engines_at_one_port("127.0.0.1", "127.0.0.2") as (port, (leaving, _)),
        running_gateway(f"engines:{port}", lookup=names, discovery_seconds=0.05) as url,
    ):
        await until_known(url, f"127.0.0.1:{port}")

        async def refuse(_request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateChunk]:
            leaving.awake.clear()  # so that GetModel waits
            names.addresses["engines"] = ["127.0.0.2"]
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "other weights")
            yield pb.GenerateChunk()

        leaving.script = refuse
        assert await ask(url) == "127.0.0.2"
        leaving.awake.set()


async def test_the_calls_of_an_engine_that_left_end_with_their_clients() -> None:
    names = Names(engines=["127.0.0.1"])
    async with (
        engines_at_one_port("127.0.0.1") as (port, (engine,)),
        running_gateway(f"engines:{port}", lookup=names, discovery_seconds=0.05) as url,
    ):
        await until_ready(url)
        engine.script = hanging("hello")
        asking = asyncio.create_task(ask(url))
        await until(lambda: engine.requests, 30)
        names.addresses["engines"] = []
        await until_ready(url, ready=False)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.wait_for(engine.cancelled.acquire(), 30)
        await until_known(url)
