"""The executor: calls are bounded, can be canceled, leak nothing, and never run without isolation."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nanochat_core.sandbox import (
    Limits,
    SandboxConfig,
    SandboxExecutor,
    SandboxUnavailable,
    Status,
    WorkerFailed,
    landlock,
    profiles,
    seccomp,
)
from nanochat_core.sandbox.worker_process import WorkerProcess
from tests.support.processes import descendants

ENDLESS = "import time\ntime.sleep(60)"
PATIENT = Limits(wall_seconds=30, cpu_seconds=30)


_others: set[int] = set()


@pytest.fixture(autouse=True)
def _note_others() -> None:
    """Remember the processes of earlier tests that still run, such as the servers of multiprocessing."""
    _others.clear()
    _others.update(descendants(os.getpid()))


def own_processes() -> set[int]:
    """Running processes that this test has started."""
    return descendants(os.getpid()) - _others


def eventually(claim: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


@pytest.fixture(params=["bwrap", "pod"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., SandboxExecutor]]:
    """Starts executors of one profile, with scratch folders in ``tmp_path``. Closes executors after the test."""
    started: list[SandboxExecutor] = []

    def start(**options: Any) -> SandboxExecutor:
        config = SandboxConfig(profile=request.param, scratch_dir=str(tmp_path), **({"warm": 0} | options))
        try:
            started.append(SandboxExecutor(config).start())
        except SandboxUnavailable as error:
            pytest.skip(str(error))
        return started[-1]

    yield start
    for executor in started:
        executor.close()


def test_calls_run_at_once_up_to_the_bound_and_the_rest_wait(make: Callable[..., SandboxExecutor]) -> None:
    executor = make(concurrency=2, queue=10)

    async def run() -> list[Status]:
        calls = [asyncio.create_task(executor.execute("import time\ntime.sleep(0.2)")) for _ in range(4)]
        await asyncio.to_thread(eventually, lambda: executor.stats.running == 2 and executor.stats.queued == 2)
        return [result.status for result in await asyncio.gather(*calls)]

    assert asyncio.run(run()) == [Status.OK] * 4
    assert (executor.stats.running, executor.stats.queued) == (0, 0)


def test_a_full_queue_is_answered_at_once(make: Callable[..., SandboxExecutor]) -> None:
    executor = make(concurrency=1, queue=1)

    async def run() -> None:
        calls = [asyncio.create_task(executor.execute(ENDLESS, PATIENT)) for _ in range(2)]
        await asyncio.to_thread(eventually, lambda: executor.stats.running == 1 and executor.stats.queued == 1)
        refused = await executor.execute("1 + 1")
        assert refused.status is Status.OVERLOADED
        assert "1 calls are running and 1 waiting" in refused.error
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await asyncio.to_thread(eventually, lambda: executor.stats.running == 0)
        assert (await executor.execute("1 + 1")).result == "2"

    asyncio.run(run())


def test_cancelling_a_call_kills_its_process(make: Callable[..., SandboxExecutor], tmp_path: Path) -> None:
    executor = make()

    async def run() -> None:
        call = asyncio.create_task(executor.execute("open('f', 'w').write('x')\n" + ENDLESS, PATIENT))
        await asyncio.to_thread(eventually, lambda: len(own_processes()) > 0 and executor.stats.running == 1)
        await asyncio.sleep(0.2)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.to_thread(eventually, lambda: not own_processes() and executor.stats.running == 0)

    asyncio.run(run())
    assert not list(tmp_path.glob("*/call-*")), "its scratch folder is gone too"
    assert executor.execute_sync("6 * 7").result == "42"


def test_a_cancelled_wait_for_a_slot_gives_the_place_back(make: Callable[..., SandboxExecutor]) -> None:
    executor = make(concurrency=1, queue=1)

    async def run() -> None:
        first = asyncio.create_task(executor.execute("import time\ntime.sleep(0.5)"))
        await asyncio.to_thread(eventually, lambda: executor.stats.running == 1)
        waiting = asyncio.create_task(executor.execute("1"))
        await asyncio.to_thread(eventually, lambda: executor.stats.queued == 1)
        waiting.cancel()
        await asyncio.to_thread(eventually, lambda: executor.stats.queued == 0)
        second = await executor.execute("2")
        assert ((await first).status, second.result) == (Status.OK, "2")

    asyncio.run(run())


def test_many_calls_leave_no_process_descriptor_or_folder(make: Callable[..., SandboxExecutor], tmp_path: Path) -> None:
    executor = make(concurrency=4, queue=1000, warm=2)
    codes = [
        "6 * 7",
        "open('f', 'w').write('x')",
        "import os\nos._exit(1)",
        "1 / 0",
        "while True: print('x' * 999)",
    ] * 12

    async def run() -> list[Status]:
        limits = Limits(output_bytes=2000)
        return [result.status for result in await asyncio.gather(*(executor.execute(code, limits) for code in codes))]

    executor.execute_sync("1")
    eventually(lambda: executor.stats.warm == 2)
    gc.collect()  # closes the descriptors of earlier tests now, not between the two counts
    before = len(os.listdir("/proc/self/fd"))
    statuses = asyncio.run(run())
    assert statuses == [Status.OK, Status.OK, Status.ERROR, Status.ERROR, Status.OUTPUT_LIMIT] * 12
    eventually(lambda: executor.stats.warm == 2)
    assert len(os.listdir("/proc/self/fd")) == before
    executor.close()
    assert own_processes() == set()
    assert list(tmp_path.iterdir()) == []


def test_closing_kills_what_runs(make: Callable[..., SandboxExecutor], tmp_path: Path) -> None:
    executor = make(warm=2)
    ended: list[BaseException] = []

    def call() -> None:
        try:
            executor.execute_sync(ENDLESS, PATIENT)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    eventually(lambda: executor.stats.running == 1)
    executor.close()
    thread.join(10)
    assert [type(error) for error in ended] == [WorkerFailed]
    assert own_processes() == set()
    assert list(tmp_path.iterdir()) == []
    executor.close()


def test_closing_while_interpreters_start_leaves_none_behind(
    make: Callable[..., SandboxExecutor], tmp_path: Path
) -> None:
    profile = make().profile
    # As a subreaper, the program becomes the parent of every orphan, so no process can hide.
    program = (
        "import ctypes, sys, time\n"
        "from nanochat_core.sandbox import SandboxConfig, SandboxExecutor\n"
        "become_subreaper = 36\n"
        "assert ctypes.CDLL(None).prctl(become_subreaper, 1, 0, 0, 0) == 0\n"
        "for n in range(25):\n"
        "  with SandboxExecutor(SandboxConfig(profile=sys.argv[1], scratch_dir=sys.argv[2], warm=2)):\n"
        "    time.sleep(n / 2000)\n"
        "print('closed', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, profile, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as adopter:
        assert adopter.stdin is not None
        assert adopter.stdout is not None
        assert adopter.stdout.readline() == "closed\n"
        left = {pid for pid in descendants(adopter.pid) if _runs(pid)}
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        adopter.stdin.close()
    assert left == set()


def test_calls_come_from_any_thread_and_any_loop(make: Callable[..., SandboxExecutor]) -> None:
    executor = make(concurrency=2, queue=100)
    answers: dict[int, str | None] = {}

    def by_sync(number: int) -> None:
        answers[number] = executor.execute_sync(f"{number} * 2").result

    def by_loop(number: int) -> None:
        answers[number] = asyncio.run(executor.execute(f"{number} * 2")).result

    threads = [threading.Thread(target=(by_sync, by_loop)[n % 2], args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {n: str(n * 2) for n in range(8)}


def test_a_warm_interpreter_that_died_is_not_handed_out(make: Callable[..., SandboxExecutor]) -> None:
    executor = make(warm=1)
    eventually(lambda: executor.stats.warm == 1)
    for pid in own_processes():
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.1)
    assert executor.execute_sync("6 * 7").result == "42"


def test_no_process_outlives_a_killed_service(make: Callable[..., SandboxExecutor], tmp_path: Path) -> None:
    profile = make().profile
    program = (
        "import sys, threading, time\n"
        "from nanochat_core.sandbox import SandboxConfig, SandboxExecutor\n"
        "executor = SandboxExecutor(SandboxConfig(profile=sys.argv[1], scratch_dir=sys.argv[2], warm=1)).start()\n"
        f"call = threading.Thread(target=executor.execute_sync, args=({ENDLESS!r},), daemon=True)\n"
        "call.start()\n"
        "while executor.stats.running + executor.stats.warm < 2: time.sleep(0.01)\n"
        "print('running', flush=True)\n"
        "time.sleep(60)\n"
    )
    service = subprocess.Popen(
        [sys.executable, "-c", program, profile, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert service.stdout is not None
    assert service.stdout.readline() == "running\n"
    workers = descendants(service.pid)
    assert len(workers) >= 2
    service.kill()
    service.wait()
    service.stdout.close()
    eventually(lambda: not any(_runs(pid) for pid in workers))


def _runs(pid: int) -> bool:
    """Whether a process is alive. A zombie does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _allow_everything(machine: object) -> bytes:
    return seccomp.instruction(0x06, seccomp.ALLOW)


def _allow_every_file(interpreter: object) -> list[landlock.PathRule]:
    return [landlock.PathRule("/", landlock.USE_SCRATCH)]


@pytest.mark.parametrize(
    ("layer", "place", "name", "broken"),
    [
        ("seccomp", seccomp, "build_filter", _allow_everything),
        ("rlimits", WorkerProcess, "set_limits", lambda self, limits, receiving: None),
        ("rlimits", profiles, "resource_limits", lambda config: b""),
    ],
)
def test_a_layer_that_leaks_is_noticed_and_named(
    make: Callable[..., SandboxExecutor],
    monkeypatch: pytest.MonkeyPatch,
    layer: str,
    place: object,
    name: str,
    broken: object,
) -> None:
    config = make().config
    monkeypatch.setattr(place, name, broken)
    with pytest.raises(SandboxUnavailable, match=rf"{config.profile}: {layer}: code could "):
        SandboxExecutor(config).start()


def test_files_that_leak_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if landlock.kernel_abi() < landlock.MINIMUM_ABI:
        pytest.skip("no Landlock here")
    monkeypatch.setattr(profiles, "file_rules", _allow_every_file)
    with pytest.raises(SandboxUnavailable, match="pod: files: code could read a file outside"):
        SandboxExecutor(SandboxConfig(profile="pod", scratch_dir=str(tmp_path))).start()
    assert list(tmp_path.iterdir()) == []


def test_namespaces_that_leak_are_noticed(
    make: Callable[..., SandboxExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make().config
    if config.profile != "bwrap":
        pytest.skip("only bwrap has namespaces")
    monkeypatch.setattr(profiles, "namespace_options", lambda program: ["--die-with-parent"])
    with pytest.raises(SandboxUnavailable, match="bwrap: namespaces: code could see its process number outside"):
        SandboxExecutor(config).start()


@pytest.mark.parametrize("abi", [0, 2])
def test_pod_refuses_a_kernel_without_enough_landlock(abi: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landlock, "kernel_abi", lambda: abi)
    with pytest.raises(SandboxUnavailable, match=r"pod: landlock: .*version 3"):
        SandboxExecutor(SandboxConfig(profile="pod")).start()


def test_bwrap_holds_without_landlock_too(
    make: Callable[..., SandboxExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    if make().profile != "bwrap":
        pytest.skip("pod needs Landlock")
    monkeypatch.setattr(landlock, "kernel_abi", lambda: 0)
    executor = make()
    assert executor.landlock_abi == 0
    assert executor.execute_sync("import os\nos.path.exists('/etc/passwd'), 6 * 7").result == "(False, 42)"


def test_auto_passes_over_a_missing_bubblewrap_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "BWRAP", "no-such-bwrap")
    try:
        executor = SandboxExecutor(SandboxConfig()).start()
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    assert executor.profile == "pod"
    assert executor.rejected == {"bwrap": "bubblewrap: no-such-bwrap is not installed"}
    executor.close()


def test_nothing_runs_when_no_profile_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landlock, "kernel_abi", lambda: 0)
    monkeypatch.setattr(profiles, "BWRAP", "no-such-bwrap")
    with pytest.raises(
        SandboxUnavailable, match=r"none will run .*bwrap: bubblewrap: .*; pod: landlock: not available"
    ):
        SandboxExecutor(SandboxConfig()).start()


def test_a_configured_profile_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "BWRAP", "no-such-bwrap")
    with pytest.raises(SandboxUnavailable, match="bwrap: bubblewrap: no-such-bwrap is not installed"):
        SandboxExecutor(SandboxConfig(profile="bwrap")).start()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scratch_dir": "/no/such/folder"}, "scratch folder"),
        ({"interpreter": "/no/such/python"}, "interpreter /no/such/python cannot be run"),
        ({"interpreter": "/bin/false"}, "interpreter .* cannot be run"),
    ],
)
def test_a_wrong_configuration_is_named(options: dict[str, str], message: str) -> None:
    with pytest.raises(SandboxUnavailable, match=message):
        SandboxExecutor(SandboxConfig(**options)).start()  # type: ignore[arg-type]


def test_a_default_above_its_maximum_is_refused() -> None:
    with pytest.raises(ValueError, match="wall_seconds"):
        SandboxConfig(wall_seconds=100)


def test_a_failure_of_the_sandbox_is_not_blamed_on_the_code(
    make: Callable[..., SandboxExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = make()
    monkeypatch.setattr(executor.isolation, "setup", b"\0\0\0\0")
    with pytest.raises(WorkerFailed, match="did not start"):
        executor.execute_sync("1 + 1")


def test_it_needs_nothing_but_the_standard_library() -> None:
    repository = Path(__file__).parents[2]
    code = f"import sys; sys.path.insert(0, {str(repository)!r}); import nanochat_core.sandbox"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)
