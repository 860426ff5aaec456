"""Each address of each name is a replica; replicas join and leave while the process runs."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator

import pytest

from nanochat_core.discovery import Endpoint, addresses_of, split_target, watch_endpoints
from nanochat_core.errors import UserError


class NameServer:
    """The addresses of each name. A name without an entry cannot be looked up."""

    def __init__(self, **names: list[str]) -> None:
        self.names = names
        self.asked: set[str] = set()
        self.answering = threading.Event()
        self.answering.set()

    def __call__(self, name: str) -> list[str]:
        self.answering.wait()
        self.asked.add(name)
        try:
            return self.names[name]
        except KeyError:
            raise OSError(f"{name} is unknown") from None


class Changes:
    """Records the endpoints after each change. The next ``failures`` calls raise an exception instead."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self._queue: asyncio.Queue[tuple[Endpoint, ...]] = asyncio.Queue()

    def __call__(self, endpoints: tuple[Endpoint, ...]) -> None:
        if self.failures:
            self.failures -= 1
            raise MemoryError("no memory for a channel")
        self._queue.put_nowait(endpoints)

    async def __anext__(self) -> tuple[Endpoint, ...]:
        async with asyncio.timeout(30):
            return await self._queue.get()


@contextlib.asynccontextmanager
async def watching(server: NameServer, *targets: str, failures: int = 0) -> AsyncIterator[Changes]:
    changes = Changes(failures)
    task = asyncio.create_task(watch_endpoints(targets, changes, 0.01, server))
    try:
        yield changes
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_names_and_addresses_are_mixed_and_each_address_appears_once() -> None:
    server = NameServer(engine=["10.0.0.2", "10.0.0.1"], other=["10.0.0.1", "fd00::7"])
    async with watching(server, "engine:50051", "10.0.0.9:1", "[fd00::8]:1", "other:50051") as changes:
        assert await anext(changes) == (
            Endpoint("10.0.0.1:50051", "engine"),
            Endpoint("10.0.0.2:50051", "engine"),
            Endpoint("10.0.0.9:1", "10.0.0.9"),
            Endpoint("[fd00::7]:50051", "other"),
            Endpoint("[fd00::8]:1", "fd00::8"),
        )
    assert server.asked == {"engine", "other"}, "an address is not looked up"


async def test_replicas_join_and_leave() -> None:
    server = NameServer(engine=["10.0.0.1"])
    async with watching(server, "engine:1") as changes:
        assert await anext(changes) == (Endpoint("10.0.0.1:1", "engine"),)
        server.names["engine"] = ["10.0.0.1", "10.0.0.2"]
        assert await anext(changes) == (Endpoint("10.0.0.1:1", "engine"), Endpoint("10.0.0.2:1", "engine"))
        server.names["engine"] = ["10.0.0.2"]
        assert await anext(changes) == (Endpoint("10.0.0.2:1", "engine"),)


async def test_a_failing_lookup_keeps_what_is_known_and_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    server = NameServer(engine=["10.0.0.1"], other=["10.0.0.5"])
    async with watching(server, "engine:1", "other:1") as changes:
        await anext(changes)
        del server.names["engine"]
        server.names["other"] = ["10.0.0.6"]
        assert await anext(changes) == (Endpoint("10.0.0.1:1", "engine"), Endpoint("10.0.0.6:1", "other"))
        for last in ("7", "8"):
            server.names["other"] = [f"10.0.0.{last}"]
            assert Endpoint("10.0.0.1:1", "engine") in await anext(changes)
    assert [record.getMessage() for record in caplog.records] == ["lookup failed"]


async def test_a_thread_that_cannot_start_does_not_end_the_lookups(monkeypatch: pytest.MonkeyPatch) -> None:
    server = NameServer(engine=["10.0.0.1"])
    async with watching(server, "engine:1", "10.0.0.2:1") as changes:
        with monkeypatch.context() as patch:
            patch.setattr("nanochat_core.discovery.run_in_daemon_thread", _no_thread)
            assert await anext(changes) == (Endpoint("10.0.0.2:1", "10.0.0.2"),)
        assert len(await anext(changes)) == 2


async def _no_thread(*_arguments: object) -> list[str]:
    raise RuntimeError("can't start new thread")


async def test_an_unexpected_error_of_a_lookup_does_not_end_the_lookups(caplog: pytest.LogCaptureFixture) -> None:
    server = NameServer(engine=["10.0.0.1"])
    server.names["odd"] = None  # type: ignore[assignment]
    async with watching(server, "engine:1", "odd:1") as changes:
        assert await anext(changes) == (Endpoint("10.0.0.1:1", "engine"),)
        server.names["odd"] = ["10.0.0.2"]
        assert len(await anext(changes)) == 2
    (record,) = caplog.records
    assert record.exc_info
    assert record.exc_info[0] is TypeError


@pytest.mark.parametrize("target", ["engine:1", "10.0.0.1:1"])
async def test_a_change_that_fails_is_logged_and_repeated(target: str, caplog: pytest.LogCaptureFixture) -> None:
    async with watching(NameServer(engine=["10.0.0.1"]), target, failures=2) as changes:
        assert [endpoint.address for endpoint in await anext(changes)] == ["10.0.0.1:1"]
    assert [record.getMessage() for record in caplog.records] == ["change of endpoints failed"] * 2


async def test_a_name_that_is_unknown_at_first_gives_an_empty_result_and_is_found_later() -> None:
    server = NameServer()
    async with watching(server, "engine:1") as changes:
        assert await anext(changes) == ()
        server.names["engine"] = ["10.0.0.1"]
        assert await anext(changes) == (Endpoint("10.0.0.1:1", "engine"),)


async def test_a_name_server_that_does_not_answer_counts_as_a_failed_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanochat_core.discovery._TIMEOUT_SECONDS", 0.05)
    server = NameServer(engine=["10.0.0.1"])
    server.answering.clear()
    async with watching(server, "engine:1", "10.0.0.2:1") as changes:
        assert await anext(changes) == (Endpoint("10.0.0.2:1", "10.0.0.2"),)
        server.answering.set()
        assert len(await anext(changes)) == 2


@pytest.mark.parametrize(
    ("target", "parts"),
    [("engine:50051", ("engine", 50051)), ("[::1]:5", ("::1", 5)), ("10.0.0.1:65535", ("10.0.0.1", 65535))],
)
def test_a_target_is_a_host_and_a_port(target: str, parts: tuple[str, int]) -> None:
    assert split_target(target) == parts


@pytest.mark.parametrize("target", ["engine", "engine:", ":5", "::1:5", "engine:0", "engine:65536", "engine:x", ""])
def test_another_form_is_a_clear_error(target: str) -> None:
    with pytest.raises(UserError, match="write host:port"):
        split_target(target)


def test_the_systems_resolver_finds_this_machine() -> None:
    assert addresses_of("localhost") == ["127.0.0.1"]
    with pytest.raises(OSError, match=r"not known|No address|Temporary"):
        addresses_of("no-such-host.invalid")
