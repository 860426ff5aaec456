"""Each address of each name is a replica; replicas join and leave while the process runs."""

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
        self.lookups = 0
        self.answering = threading.Event()
        self.answering.set()

    def __call__(self, name: str) -> list[str]:
        self.answering.wait()
        self.lookups += 1
        if name not in self.names:
            raise OSError(f"{name} is unknown")
        return self.names[name]


@contextlib.asynccontextmanager
async def watching(server: NameServer, *targets: str) -> AsyncIterator[AsyncIterator[tuple[Endpoint, ...]]]:
    async with contextlib.aclosing(watch_endpoints(targets, 0.01, server)) as changes:
        yield changes


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
    assert server.lookups == 2, "an address is not looked up"


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
