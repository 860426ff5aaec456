"""The stores of keys and usage fulfill the same contract in memory, in a file and in Redis."""

import asyncio
import contextlib
import itertools
import json
import os
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanochat_core.errors import UserError
from services.gateway.admission import file_store, redis_link
from services.gateway.admission.away import Away
from services.gateway.admission.file_store import FileStore
from services.gateway.admission.keyring import Keyring
from services.gateway.admission.keys import ApiKey, Limits, new_key
from services.gateway.admission.redis_link import RedisLink
from services.gateway.admission.redis_store import RedisStore
from services.gateway.admission.store import KeyStore, MemoryStore, StoreError
from services.gateway.admission.usage import Usage, UsageTable, last_days
from services.gateway.admission.usage_book import UsageBook
from services.gateway.keys import COMMANDS, CreateSettings, run
from tests.support.redis_server import RedisServer, needs_redis

DAY, NEXT_DAY = "2026-11-29", "2026-11-30"


@pytest.fixture(params=["memory", "file", pytest.param("redis", marks=needs_redis)])
async def stores(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Callable[[], KeyStore]]:
    """Opens the same store again and again, as several programs do; a store in memory is always the same object."""
    async with contextlib.AsyncExitStack() as stack:
        if request.param == "memory":
            memory = MemoryStore()
            yield lambda: memory
        elif request.param == "file":
            yield lambda: FileStore(str(tmp_path / "keys.json"))
        else:
            server = RedisServer(tmp_path)
            stack.callback(server.kill)
            opened: list[KeyStore] = []

            def reopen() -> KeyStore:
                opened.append(RedisStore(RedisLink(server.url, 5.0)))
                return opened[-1]

            yield reopen
            for store in opened:
                await store.aclose()


async def test_keys_are_written_and_changed_and_the_version_says_so(stores: Callable[[], KeyStore]) -> None:
    store, other = stores(), stores()
    assert await store.load() == {}
    before = await other.version()
    key, _ = new_key("x", limits=Limits(requests=5))
    await store.replace(None, key)
    assert await other.load() == {key.id: key}
    between = await other.version()
    await other.replace(key, key.revoke())
    assert (await store.load())[key.id].revoked is not None
    assert len({before, between, await store.version()}) == 3
    assert await other.version() == await store.version()


async def test_a_change_of_a_record_that_has_changed_is_refused(stores: Callable[[], KeyStore]) -> None:
    store = stores()
    key, _ = new_key("x")
    await store.replace(None, key)
    await store.replace(key, key.revoke())
    with pytest.raises(StoreError, match="changed by another program"):
        await store.replace(key, key.rotated()[0])  # this would undo the revocation
    with pytest.raises(StoreError, match="changed by another program"):
        await store.replace(None, key)
    assert (await store.load())[key.id].revoked is not None


async def test_the_number_of_keys_is_bounded(stores: Callable[[], KeyStore], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("store", "redis_store"):
        monkeypatch.setattr(f"services.gateway.admission.{module}.MAX_KEYS", 2)
    store = stores()
    for _ in range(2):
        await store.replace(None, new_key("x")[0])
    with pytest.raises(StoreError, match="there are 2 keys already"):
        await store.replace(None, new_key("x")[0])


async def test_usage_adds_up_over_programs_and_days_and_a_repeated_batch_counts_once(
    stores: Callable[[], KeyStore],
) -> None:
    store, other = stores(), stores()
    await store.add_usage(1, {(DAY, "a"): Usage(1, 0, 10, 20)})
    await store.add_usage(1, {(DAY, "a"): Usage(1, 0, 10, 20)})
    assert (await store.has_batch(1), await store.has_batch(2)) == (True, False)
    await store.add_usage(2, {(DAY, "a"): Usage(0, 3), (NEXT_DAY, "b"): Usage(1)})
    assert await store.has_batch(2)
    if other is not store:
        await other.add_usage(1, {(DAY, "a"): Usage(1, 0, 5, 5)})
    expected = Usage(1, 3, 10, 20) if other is store else Usage(2, 3, 15, 25)
    assert await other.usage([DAY]) == {(DAY, "a"): expected}
    assert await other.usage([DAY, NEXT_DAY]) == {(DAY, "a"): expected, (NEXT_DAY, "b"): Usage(1)}


class Unreliable(MemoryStore):
    """A store that adds the usage. While ``fails`` is set, it then raises ``Away``, as if its reply were lost."""

    fails = False

    async def add_usage(self, batch: int, usage: UsageTable) -> None:
        await super().add_usage(batch, usage)
        if self.fails:
            raise Away


async def test_usage_is_counted_exactly_once_although_the_store_does_not_confirm() -> None:
    store = Unreliable()
    book = UsageBook(store)
    counts = itertools.count(1)
    for fails in (False, True, True, False, True, False):
        store.fails = fails
        book.add(DAY, "a", Usage(requests=1))
        assert await book.flush() is not fails
        assert sum(usage.requests for usage in (await book.read([DAY])).values()) == next(counts)
    assert await store.usage([DAY]) == {(DAY, "a"): Usage(requests=6)}  # includes the unconfirmed batches
    assert await book.read([DAY]) == await store.usage([DAY]) == {(DAY, "a"): Usage(requests=6)}


class Slow(MemoryStore):
    """Adds usage immediately, and confirms it later."""

    def __init__(self) -> None:
        super().__init__()
        self.added, self.confirmed = asyncio.Event(), asyncio.Event()

    async def add_usage(self, batch: int, usage: UsageTable) -> None:
        await super().add_usage(batch, usage)
        self.added.set()
        await self.confirmed.wait()


async def test_usage_that_is_read_while_it_is_written_counts_once() -> None:
    store = Slow()
    book = UsageBook(store)
    book.add(DAY, "a", Usage(requests=1))
    writing = asyncio.create_task(book.flush())
    await store.added.wait()
    reading = asyncio.create_task(book.read([DAY]))
    await asyncio.sleep(0)
    store.confirmed.set()
    assert await reading == {(DAY, "a"): Usage(requests=1)}
    assert await writing


async def test_a_file_is_private_and_a_damaged_or_foreign_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "keys.json"
    store = FileStore(str(path))
    await store.replace(None, new_key("x")[0])
    assert path.stat().st_mode & 0o777 == 0o600
    for text in ("{", "[]", '{"format": "other/1"}', '{"format": "nanochat-keys/1", "keys": [{"id": 1}]}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"keys\.json is damaged"):
            FileStore(str(path))


async def test_a_keyring_follows_a_file_and_keeps_its_keys_while_the_file_is_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.json"
    store = FileStore(str(path))
    keyring = Keyring(store)
    key, _ = new_key("x")
    assert await keyring.find(key.id) is None
    await store.replace(None, key)
    assert await keyring.find(key.id) == key  # find() reads the file again if a key is unknown
    good = path.read_text()
    path.write_text("{")
    for _ in range(3):
        await keyring.refresh()
    assert await keyring.find(key.id) == key
    assert [record.getMessage() for record in caplog.records] == ["keys cannot be read, the old ones stay in use"]
    path.write_text(good.replace('"revoked": null', '"revoked": 1.0'))
    await keyring.refresh()
    assert (await keyring.find(key.id)).revoked == 1.0


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write read-only folders")
async def test_usage_of_a_read_only_file_stays_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"format": "nanochat-keys/1", "keys": []}))
    tmp_path.chmod(0o500)
    book = UsageBook(FileStore(str(path)))
    book.add(DAY, "a", Usage(requests=1))
    await book.flush()
    assert await book.read([DAY]) == {(DAY, "a"): Usage(requests=1)}


async def test_usage_counts_once_if_the_gateway_ends_while_a_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, writing, go_on = tmp_path / "keys.json", threading.Event(), threading.Event()
    path.write_text(json.dumps({"format": "nanochat-keys/1", "keys": []}))
    write = file_store._write

    def slowly(*arguments: Any) -> None:
        writing.set()
        go_on.wait(60)
        write(*arguments)

    monkeypatch.setattr(file_store, "_write", slowly)
    book = UsageBook(FileStore(str(path)))
    book.add(DAY, "a", Usage(requests=1))
    first = asyncio.create_task(book.flush())
    await asyncio.to_thread(writing.wait, 60)
    first.cancel()  # as the gateway does when it ends
    await asyncio.gather(first, return_exceptions=True)
    last = asyncio.create_task(book.flush())
    await asyncio.sleep(0)
    go_on.set()
    assert await last
    assert await FileStore(str(path)).usage([DAY]) == {(DAY, "a"): Usage(requests=1)}


@needs_redis
async def test_a_command_waits_longer_for_redis_than_a_request_may(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = RedisServer(tmp_path)
    server.pause()
    asyncio.get_running_loop().call_later(1.5, server.resume)
    settings = CreateSettings(name="late", redis_url=server.url)
    assert settings.redis_timeout_seconds == 1.0
    await run(COMMANDS["create"], settings)
    assert capsys.readouterr().out.startswith("nc-")
    server.kill()


@needs_redis
async def test_a_redis_that_hangs_or_is_gone_costs_at_most_the_timeout_and_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0  # the clock of the pause after a failure
    monkeypatch.setattr(redis_link, "time", SimpleNamespace(monotonic=lambda: now))
    server = RedisServer(tmp_path)
    states: list[bool] = []
    store = RedisStore(RedisLink(server.url, 3.0, states.append))
    loop = asyncio.get_running_loop()
    key: ApiKey = new_key("x")[0]
    await store.replace(None, key)

    async def seconds_of_failure() -> float:
        began = loop.time()
        with pytest.raises(Away):
            await store.version()
        return loop.time() - began

    async def recovered() -> Any:
        nonlocal now
        async with asyncio.timeout(60):
            while True:
                now += 1.0
                with contextlib.suppress(Away):
                    return await store.load()
                await asyncio.sleep(0.05)

    try:
        server.pause()
        assert await seconds_of_failure() < 20.0
        with pytest.raises(Away):
            store.version().send(None)  # the next calls do not wait
        server.resume()
        assert await recovered() == {key.id: key}
        server.kill()
        assert await seconds_of_failure() < 20.0
        server.start()
        assert await recovered() == {key.id: key}
    finally:
        await store.aclose()
        server.kill()
    assert states == [False, True, False, True]


def test_days_end_with_today() -> None:
    assert last_days(3, 1795939524.0) == ["2026-11-27", "2026-11-28", DAY]
