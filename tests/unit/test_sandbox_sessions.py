"""A call of a session finds the files of the session's previous call, and no other call finds these files."""

import asyncio
from collections.abc import Iterator

import pytest

from nanochat_core.sandbox import (
    Inputs,
    Limits,
    SandboxConfig,
    SandboxExecutor,
    SandboxUnavailable,
    Status,
    WorkerFailed,
)
from nanochat_core.sandbox.sessions import Sessions

FILES = "import os\nsorted(os.listdir('.'))"


@pytest.fixture(scope="module", params=["bwrap", "pod"])
def executor(request: pytest.FixtureRequest) -> Iterator[SandboxExecutor]:
    try:
        config = SandboxConfig(profile=request.param, concurrency=2, wall_seconds=20, max_file_bytes=100_000)
        started = SandboxExecutor(config).start()
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    yield started
    started.close()


def test_a_session_keeps_changes_and_removals_of_files(executor: SandboxExecutor) -> None:
    code = "import os\nos.mkdir('d')\nfor name in ('a', 'b', 'd/c'): open(name, 'w').write(name)"
    first = executor.execute_sync(code, session="kept")
    assert (first.session_new, first.files_complete, first.files) == (True, True, {}), "no files were asked for"
    second = executor.execute_sync("import os\nos.remove('a')\nopen('b', 'a').write('2')", session="kept")
    assert not second.session_new
    third = executor.execute_sync(f"{FILES}, open('b').read(), open('d/c').read()", session="kept")
    assert third.result == "(['b', 'd'], 'b2', 'd/c')"
    assert executor.execute_sync(
        "import sqlite3\nsqlite3.connect('x.db').execute('create table t (n)')", session="kept"
    ).ok
    table = "import sqlite3\nsqlite3.connect('x.db').execute('select * from t').fetchall()"
    assert executor.execute_sync(table, session="kept").result == "[]"


def test_only_calls_of_the_same_session_and_key_see_its_files(executor: SandboxExecutor) -> None:
    async def run(code: str, key: str, session: str) -> str | None:
        return (await executor.execute(code, key=key, session=session)).result

    async def all_files() -> list[str | None]:
        await run("open('mine', 'w').close()", "alice", "s")
        return [
            await run(FILES, *who) for who in (("alice", "s"), ("bob", "s"), ("", "s"), ("alice", "t"), ("alice", ""))
        ]

    assert asyncio.run(all_files()) == ["['mine']", "[]", "[]", "[]", "[]"]


def test_an_answer_brings_only_what_the_call_has_changed(executor: SandboxExecutor) -> None:
    executor.execute_sync("open('old', 'w').write('1')", session="changed")
    inputs = Inputs(files={"given": b"1"}, collect_files=True)
    result = executor.execute_sync("open('new', 'w').write('2')\n" + FILES, inputs=inputs, session="changed")
    assert (result.result, result.files) == ("['given', 'new', 'old']", {"new": b"2"})


def test_a_failed_call_leaves_its_files_and_a_killed_one_those_before_it(executor: SandboxExecutor) -> None:
    executor.execute_sync("open('a', 'w').write('1')", session="failed")
    failed = executor.execute_sync("open('a', 'w').write('2')\n1 / 0", session="failed")
    assert (failed.status, failed.files_complete) == (Status.ERROR, True)
    code = "open('a', 'w').write('3')\nwhile True: pass"
    killed = executor.execute_sync(code, Limits(wall_seconds=0.3), session="failed")
    assert (killed.status, killed.files_complete) == (Status.TIMEOUT, False)
    large = executor.execute_sync("open('b', 'wb').write(bytes(200_000))", session="failed")
    assert (large.status, large.files_complete) == (Status.OUTPUT_LIMIT, False)
    assert executor.execute_sync(FILES + ", open('a').read()", session="failed").result == "(['a'], '2')"


def test_a_request_that_does_not_fit_into_the_session_is_refused(executor: SandboxExecutor) -> None:
    executor.execute_sync("open('a', 'wb').write(bytes(90_000))", session="full")
    with pytest.raises(ValueError, match="at most"):
        executor.execute_sync("1", inputs=Inputs(files={"b": bytes(20_000)}), session="full")
    assert executor.execute_sync(FILES, session="full").result == "['a']"


def test_calls_of_a_session_run_one_after_the_other(executor: SandboxExecutor) -> None:
    code = "import os, time\nn = len(os.listdir('.'))\ntime.sleep(0.05)\nopen(str(n), 'w').close()"

    async def run() -> None:
        await asyncio.gather(*(executor.execute(code, session="turns") for _ in range(5)))

    asyncio.run(run())
    assert executor.execute_sync(FILES, session="turns").result == "['0', '1', '2', '3', '4']"


def test_a_call_that_waits_for_its_session_ends_with_the_executor() -> None:
    async def run() -> list[object]:
        with SandboxExecutor(SandboxConfig(wall_seconds=20)) as executor:
            calls = [
                asyncio.create_task(executor.execute("import time\ntime.sleep(20)", session="s")) for _ in range(2)
            ]
            async with asyncio.timeout(60):
                while not (executor.stats.running == 1 and executor._sessions.waiting == 1):
                    await asyncio.sleep(0.01)
            await asyncio.to_thread(executor.close)
            return list(await asyncio.gather(*calls, return_exceptions=True))

    assert [type(answer) for answer in asyncio.run(run())] == [WorkerFailed, WorkerFailed]


async def test_idle_sessions_are_forgotten() -> None:
    sessions = Sessions(10, 0.1)
    async with sessions.open("", "a") as session:
        session.files = {"f": b""}
        await asyncio.sleep(0.2)
        assert len(sessions) == 1, "it is in use"
    assert len(sessions) == 1
    await asyncio.sleep(0.3)
    assert len(sessions) == 0
    sessions.close()


async def test_the_least_recently_used_session_makes_room() -> None:
    sessions = Sessions(2, 60)
    for name in ("a", "b", "a", "c"):
        async with sessions.open("", name) as session:
            session.new = False
    news = []
    for name in ("c", "a", "b"):
        async with sessions.open("", name) as session:
            news.append(session.new)
    assert news == [False, False, True]
    sessions.close()
