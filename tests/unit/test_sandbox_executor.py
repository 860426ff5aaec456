"""The executor: calls are bounded, can be canceled, leak nothing, and never run without isolation."""

import asyncio
import contextlib
import dataclasses
import gc
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
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
    fork_server,
    landlock,
    pool,
    profiles,
    seccomp,
    worker_process,
)
from nanochat_core.sandbox import executor as executor_module
from nanochat_core.sandbox.call import run_call
from nanochat_core.sandbox.interpreter import current_executable
from nanochat_core.sandbox.worker_process import WorkerProcess
from tests.support.processes import command_line, descendants, stat_fields
from tests.support.waiting import eventually

ENDLESS = "import time\ntime.sleep(60)"
TELLS_ITS_BEGINNING = "print('begun', flush=True)\n" + ENDLESS
NAMES_ITS_FILE = "import os\nopen(os.path.abspath('f'), 'w').write('x')"
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


def settled_descriptors() -> int:
    """The number of open descriptors, once it has stayed the same for a second.

    The worker of an ended call keeps its descriptors until its process has ended, and this can be after the next
    workers are ready.
    """
    count, since = -1, 0.0

    def settled() -> bool:
        nonlocal count, since
        now = len(os.listdir("/proc/self/fd"))
        if now != count:
            count, since = now, time.monotonic()
        return time.monotonic() - since > 1

    eventually(settled)
    return count


def kill(processes: set[int]) -> None:
    """Kill fork servers before their workers, so that no server can report the end of a worker."""
    for pid in sorted(processes):
        with contextlib.suppress(ProcessLookupError):  # the process has already ended
            os.kill(pid, signal.SIGKILL)


class Begun:
    """Notices that the code of a call runs. The code must print something."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def __call__(self, _stream: str, _piece: bytes) -> None:
        self._event.set()

    async def wait(self) -> None:
        assert await asyncio.to_thread(self._event.wait, 60)


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
        long = [asyncio.create_task(executor.execute(ENDLESS, PATIENT)) for _ in range(2)]
        await asyncio.to_thread(eventually, lambda: executor.stats.running == 2)
        calls = [asyncio.create_task(executor.execute("import time\ntime.sleep(0.2)")) for _ in range(4)]
        await asyncio.to_thread(eventually, lambda: executor.stats.running == 2 and executor.stats.queued == 4)
        for call in long:
            call.cancel()
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
        assert "1 calls are running and 1 wait" in refused.error
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await asyncio.to_thread(eventually, lambda: executor.stats.running == 0)
        assert (await executor.execute("1 + 1")).result == "2"

    asyncio.run(run())


def test_cancelling_a_call_kills_its_process(make: Callable[..., SandboxExecutor], tmp_path: Path) -> None:
    executor = make()

    async def run() -> None:
        idle, begun = own_processes(), Begun()
        code = "open('f', 'w').write('x')\n" + TELLS_ITS_BEGINNING
        call = asyncio.create_task(executor.execute(code, PATIENT, on_output=begun))
        await begun.wait()
        assert own_processes() - idle
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        # A process of the executor's start may also end only now.
        await asyncio.to_thread(eventually, lambda: own_processes() <= idle and executor.stats.running == 0)

    asyncio.run(run())
    eventually(lambda: not list(tmp_path.glob("*/call-*/*")))  # its scratch folder is empty again
    assert executor.execute_sync("6 * 7").result == "42"


def test_a_cancelled_wait_for_a_slot_gives_the_place_back(make: Callable[..., SandboxExecutor]) -> None:
    executor = make(concurrency=1, queue=1)

    async def run() -> None:
        first = asyncio.create_task(executor.execute(ENDLESS, PATIENT))
        await asyncio.to_thread(eventually, lambda: executor.stats.running == 1)
        waiting = asyncio.create_task(executor.execute("1"))
        await asyncio.to_thread(eventually, lambda: executor.stats.queued == 1)
        waiting.cancel()
        await asyncio.to_thread(eventually, lambda: executor.stats.queued == 0)
        second = asyncio.create_task(executor.execute("2"))
        await asyncio.to_thread(eventually, lambda: executor.stats.queued == 1)
        first.cancel()
        assert (await second).result == "2"

    asyncio.run(run())


def test_many_calls_leave_no_process_descriptor_or_folder(make: Callable[..., SandboxExecutor], tmp_path: Path) -> None:
    executor = make(concurrency=4, queue=1000, warm=4)
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
    eventually(lambda: executor.stats.warm == 4)
    gc.collect()  # closes the descriptors of earlier tests now, not between the two counts
    before = settled_descriptors()
    statuses = asyncio.run(run())
    assert statuses == [Status.OK, Status.OK, Status.ERROR, Status.ERROR, Status.OUTPUT_LIMIT] * 12
    eventually(lambda: executor.stats.warm == 4)
    eventually(lambda: len(os.listdir("/proc/self/fd")) == before)
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
    thread.join(60)
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
        left = {pid for pid in descendants(adopter.pid) if _runs(pid) and not _is_killed(pid)}
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
    kill(own_processes())
    time.sleep(0.1)
    assert executor.execute_sync("6 * 7").result == "42"


def test_a_killed_fork_server_costs_only_the_calls_in_flight(make: Callable[..., SandboxExecutor]) -> None:
    executor = make(warm=1, concurrency=2)

    async def run() -> None:
        begun = Begun()
        call = asyncio.create_task(executor.execute(TELLS_ITS_BEGINNING, PATIENT, on_output=begun))
        await begun.wait()
        await asyncio.to_thread(eventually, lambda: executor.stats.running == 1 and executor.stats.warm >= 1)
        kill(own_processes())
        with pytest.raises(WorkerFailed, match="fork server ended"):
            await call
        assert [(await executor.execute("6 * 7")).result for _ in range(3)] == ["42"] * 3

    asyncio.run(run())


def test_the_end_of_a_fork_server_is_noticed_although_its_socket_stays_open(
    make: Callable[..., SandboxExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    # If only the limits of a start ended the wait for a dead server, the call would take ten minutes.
    monkeypatch.setattr(worker_process, "START_SECONDS", 600.0)
    executor = make()
    command = executor.isolation.command
    # A child of the server keeps the socket open, as a worker does that has just been forked.
    monkeypatch.setattr(
        executor.isolation, "command", lambda fd: ["/bin/sh", "-c", 'sleep 600 & exec "$@"', "sh", *command(fd)]
    )
    kill(own_processes())
    assert executor.execute_sync("6 * 7").result == "42"
    (server,), processes = executor.fork_servers, own_processes()
    kill({server.pid})
    eventually(lambda: not any("main.py" in command_line(pid) for pid in processes))

    async def run() -> str | None:
        async with asyncio.timeout(60):
            return (await executor.execute("6 * 7")).result

    assert asyncio.run(run()) == "42"


@pytest.mark.parametrize("leaves_child", [False, True])
def test_a_fork_server_that_is_killed_while_it_starts_is_replaced(
    make: Callable[..., SandboxExecutor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, leaves_child: bool
) -> None:
    executor = make()
    command = executor.isolation.command
    # A killed launcher may leave a child that keeps the server's socket open and waits for ever.
    child = tmp_path / "child"
    leave_child = f"sleep 600 & echo $! > {child};" if leaves_child else ""
    commands = iter([["/bin/sh", "-c", f"{leave_child} kill -9 $$"]])
    monkeypatch.setattr(executor.isolation, "command", lambda fd: next(commands, None) or command(fd))
    kill(own_processes())
    assert executor.execute_sync("6 * 7").result == "42"
    assert next(commands, None) is None
    if leaves_child:
        eventually(lambda: not command_line(int(child.read_text())))


def test_only_the_kernel_can_tell_that_a_process_was_killed_for_lack_of_memory(
    make: Callable[..., SandboxExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = make()

    kills = 10**9
    monkeypatch.setattr(fork_server, "_oom_kills", lambda: kills)  # as if the kernel had killed so many processes

    async def kill_worker(further_kills: int = 0) -> Status:
        nonlocal kills
        idle, begun = own_processes(), Begun()
        call = asyncio.create_task(executor.execute(TELLS_ITS_BEGINNING, PATIENT, on_output=begun))
        await begun.wait()
        assert len(own_processes() - idle) == 1
        kills += further_kills
        kill(own_processes() - idle)
        return (await call).status

    with pytest.raises(WorkerFailed, match="killed from outside"):
        asyncio.run(kill_worker())
    assert asyncio.run(kill_worker(further_kills=1)) is Status.MEMORY
    kills += 1
    with pytest.raises(WorkerFailed, match="killed from outside"):
        asyncio.run(kill_worker())  # the kill before the call is no reason for its end
    assert executor.execute_sync("import os\nos._exit(137)").error == "exited with code 137 before the code ended"


def test_an_executor_that_was_never_started_runs_no_code() -> None:
    executor = SandboxExecutor(SandboxConfig())
    try:
        with pytest.raises(RuntimeError, match="the executor is not started"):
            executor.execute_sync("6 * 7")
        with pytest.raises(RuntimeError, match="the executor is not started"):
            asyncio.run(executor.probe())
    finally:
        executor.close()
    with pytest.raises(RuntimeError, match="the executor is closed"):
        executor.execute_sync("6 * 7")


def test_a_relative_scratch_folder_works(
    make: Callable[..., SandboxExecutor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "relative").mkdir()
    config = dataclasses.replace(make().config, scratch_dir="relative")
    with SandboxExecutor(config) as executor:
        assert executor.execute_sync("open('f', 'w').write('x')").ok


def test_removed_scratch_folders_are_made_again(make: Callable[..., SandboxExecutor], tmp_path: Path) -> None:
    executor = make(warm=1)
    assert executor.execute_sync("open('f', 'w').write('x')").ok
    for _ in range(2):
        shutil.rmtree(next(tmp_path.iterdir()), ignore_errors=True)  # the executor may be replacing the folders already
        for _ in range(4):
            assert executor.execute_sync("open('f', 'w').write('x')\n6 * 7").result == "42"
    asyncio.run(executor.probe())


def test_a_warm_interpreter_that_lost_its_scratch_folder_is_not_handed_out(
    make: Callable[..., SandboxExecutor], tmp_path: Path
) -> None:
    executor = make(warm=2, concurrency=2)
    eventually(lambda: executor.stats.warm == 2)
    shutil.rmtree(next(tmp_path.iterdir()))
    for _ in range(4):
        assert executor.execute_sync(NAMES_ITS_FILE).result == "1"


def test_a_worker_that_lost_its_scratch_folder_while_it_started_is_replaced(
    make: Callable[..., SandboxExecutor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = make()
    fork = fork_server.ForkServer.fork
    removed: list[Path] = []

    async def remove_first(server: fork_server.ForkServer, *arguments: Any) -> Any:
        forked = await fork(server, *arguments)
        if not removed:
            removed.append(next(tmp_path.iterdir()))
            shutil.rmtree(removed[0])
        return forked

    monkeypatch.setattr(fork_server.ForkServer, "fork", remove_first)
    assert executor.execute_sync(NAMES_ITS_FILE).result == "1"
    assert removed


def test_a_fork_server_whose_scratch_folders_are_removed_while_it_starts_is_replaced(
    make: Callable[..., SandboxExecutor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = make()
    start, fork = fork_server.ForkServer.start, fork_server.ForkServer.fork
    failed: list[fork_server.ForkServer] = []
    removed: list[Path] = []

    async def fail_first(server: fork_server.ForkServer, *arguments: Any) -> Any:
        if not failed:
            failed.append(server)
            raise FileNotFoundError("the removal has begun")
        return await fork(server, *arguments)

    async def remove_first(*arguments: Any) -> fork_server.ForkServer:
        if not removed:
            removed.append(next(tmp_path.iterdir()))
            shutil.rmtree(removed[0])
        return await start(*arguments)

    monkeypatch.setattr(fork_server.ForkServer, "fork", fail_first)
    monkeypatch.setattr(fork_server.ForkServer, "start", remove_first)
    assert executor.execute_sync(NAMES_ITS_FILE).result == "1"
    assert removed


def test_the_time_before_the_code_begins_is_not_its_own(make: Callable[..., SandboxExecutor]) -> None:
    executor = make()
    shortest = Limits(wall_seconds=0.001)
    assert executor.execute_sync("while True: pass", shortest).status is Status.TIMEOUT
    # On a busy machine, a call may take longer than its limit. It is unlikely that all of them do.
    slow_to_start = (executor.execute_sync("6 * 7", Limits(wall_seconds=0.2)) for _ in range(10))
    assert next(call for call in slow_to_start if call.result == "42").queue_seconds > 0


def test_a_worker_that_dies_before_its_code_begins_is_replaced(
    make: Callable[..., SandboxExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = make()
    killed: list[WorkerProcess] = []

    async def kill_first(worker: WorkerProcess, *arguments: Any) -> Any:
        if not killed:
            killed.append(worker)
            worker.kill()
            await worker.reap()
        return await run_call(worker, *arguments)

    monkeypatch.setattr(executor_module, "run_call", kill_first)
    assert executor.execute_sync("6 * 7").result == "42"
    assert len(killed) == 1


def test_code_that_exits_at_once_runs_once(make: Callable[..., SandboxExecutor]) -> None:
    executor = make(warm=2)
    written = bytearray()

    def keep(_stream: str, piece: bytes) -> None:
        written.extend(piece)

    for _ in range(20):
        result = asyncio.run(executor.execute("import os\nos.write(1, b'x')\nos._exit(3)", on_output=keep))
        assert result.error == "exited with code 3 before the code ended"
    assert written == b"x" * 20


def test_a_call_that_fills_its_scratch_space_leaves_the_others_theirs(make: Callable[..., SandboxExecutor]) -> None:
    executor = make(concurrency=2, warm=2, scratch_bytes=1 << 20)
    fill = "f = open('f', 'wb')\ntry:\n  while True: f.write(bytes(1 << 16))\nexcept OSError: pass\n"

    async def run() -> None:
        full = asyncio.create_task(executor.execute(fill + "import time\ntime.sleep(0.5)"))
        await asyncio.sleep(0.2)
        neighbor = await executor.execute("open('f', 'wb').write(bytes(1 << 19))")
        assert (neighbor.status, neighbor.result) == (Status.OK, str(1 << 19))
        assert (await full).status in (Status.OK, Status.OUTPUT_LIMIT)

    asyncio.run(run())


def test_fork_servers_are_renewed_between_calls(make: Callable[..., SandboxExecutor]) -> None:
    executor = make(renew_calls=3, warm=1)
    hashes = set()

    def several() -> bool:
        hashes.add(executor.execute_sync("hash('x'), id(object)").result)
        return len(hashes) > 2

    eventually(several)
    # An old server stays as long as one of its workers is ready for a call.
    eventually(lambda: len(executor.fork_servers) <= 2)


def test_callers_take_turns(make: Callable[..., SandboxExecutor]) -> None:
    executor = make(concurrency=1, queue=100, warm=1)

    ended: list[str] = []

    async def ask(name: str, key: str) -> float:
        result = await executor.execute("1", key=key)
        ended.append(name)
        return result.queue_seconds

    async def run() -> None:
        first = asyncio.create_task(executor.execute(ENDLESS, PATIENT))
        await asyncio.to_thread(eventually, lambda: executor.stats.running == 1)
        many = [asyncio.create_task(ask(str(number), "many")) for number in range(20)]
        await asyncio.to_thread(eventually, lambda: executor.stats.queued == 20)
        single = asyncio.create_task(ask("single", "one"))
        await asyncio.to_thread(eventually, lambda: executor.stats.queued == 21)
        first.cancel()
        waits = await asyncio.gather(*many)
        assert await single < waits[-1]

    asyncio.run(run())
    assert ended.index("single") <= 3, "it does not wait for all calls of the other caller that came before"
    ended.remove("single")
    assert ended == [str(number) for number in range(20)]


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
        return stat_fields(pid)[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _is_killed(pid: int) -> bool:
    """Whether a process has been sent SIGKILL. On a busy machine, it may still have to wait until it can end."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return True
    pending = (int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd:", "ShdPnd:")))
    return any(mask & 1 << signal.SIGKILL - 1 for mask in pending)


def _allow_everything(machine: object, **options: bool) -> bytes:
    return seccomp.instruction(0x06, seccomp.ALLOW)


def _allow_every_file(interpreter: object, packages_hidden: bool = False) -> list[landlock.PathRule]:
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


def test_namespaces_that_leak_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles.PodProfile, "hides_files", True)
    with pytest.raises(SandboxUnavailable, match="pod: namespaces: code could see that a file outside exists"):
        SandboxExecutor(SandboxConfig(profile="pod", scratch_dir=str(tmp_path))).start()


@pytest.mark.parametrize("abi", [0, 2])
def test_pod_refuses_a_kernel_without_enough_landlock(abi: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landlock, "kernel_abi", lambda: abi)
    with pytest.raises(SandboxUnavailable, match=r"pod: landlock: .*version 3"):
        SandboxExecutor(SandboxConfig(profile="pod")).start()


def test_gvisor_refuses_every_other_kernel_and_auto_tries_it_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    if profiles.kernel_is_gvisor():
        pytest.skip("this is gVisor")
    with pytest.raises(SandboxUnavailable, match="gvisor: gvisor: the kernel is not gVisor"):
        SandboxExecutor(SandboxConfig(profile="gvisor")).start()
    with SandboxExecutor(SandboxConfig()) as executor:
        assert "gvisor" not in executor.rejected
    monkeypatch.setattr(profiles, "kernel_is_gvisor", lambda: True)
    with SandboxExecutor(SandboxConfig()) as executor:
        assert executor.profile == "gvisor" or "gvisor" in executor.rejected


def test_what_gvisor_lacks_is_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The profile works on this kernel as it must on gVisor's: without Landlock, and with the stricter filter."""
    monkeypatch.setattr(profiles, "kernel_is_gvisor", lambda: True)
    try:
        executor = SandboxExecutor(SandboxConfig(profile="gvisor", scratch_dir=str(tmp_path))).start()
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    with contextlib.closing(executor):
        assert (executor.profile, executor.landlock_abi) == ("gvisor", 0)
        assert executor.execute_sync("import os\nos.path.exists('/etc/passwd'), 6 * 7").result == "(False, 42)"


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
        ({"scratch_dir": "a\0b"}, "scratch folder"),
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
    monkeypatch.setattr(executor.isolation, "setup", lambda scratch: b"\0\0\0\0")
    kill(own_processes())
    eventually(lambda: not own_processes())
    with pytest.raises(WorkerFailed, match="did not start"):
        executor.execute_sync("1 + 1")


def test_it_needs_nothing_but_the_standard_library() -> None:
    repository = Path(__file__).parents[2]
    code = f"import sys; sys.path.insert(0, {str(repository)!r}); import nanochat_core.sandbox"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)


@pytest.fixture
def interpreter_without_bytecode(tmp_path: Path) -> str:
    """A Python whose standard library is not compiled, as in slim base images."""
    source = Path(sysconfig.get_path("stdlib"))
    python = tmp_path / "python" / "bin" / "python3"
    python.parent.mkdir(parents=True)
    shutil.copy(current_executable(), python)
    ignored = shutil.ignore_patterns(
        "__pycache__", "test", "tests", "*-packages", "config-*", "idlelib", "lib2to3", "*.a"
    )
    shutil.copytree(source, tmp_path / "python" / "lib" / source.name, ignore=ignored)
    command = [str(python), "-I", "-S", "-B", "-c", "import json; print(json.__cached__)"]
    answer = subprocess.run(command, capture_output=True, text=True, env={})
    if answer.returncode or os.path.exists(answer.stdout.strip()):
        pytest.skip("this Python cannot be copied")
    return str(python)


def test_a_standard_library_without_bytecode_is_compiled_once_and_not_for_each_call(
    make: Callable[..., SandboxExecutor], interpreter_without_bytecode: str
) -> None:
    def cpu_seconds(interpreter: str) -> float:
        """The lowest CPU time, in several calls, of a worker from its fork to its answer."""
        executor = make(interpreter=interpreter)
        code = "import datetime, decimal, json, random, re, statistics, time\ntime.process_time()"
        return min(float(executor.execute_sync(code).result or "inf") for _ in range(5))

    assert cpu_seconds(interpreter_without_bytecode) < 2 * cpu_seconds("") + 0.005


def test_the_pool_follows_demand(make: Callable[..., SandboxExecutor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_SHRINK_SECONDS", 1000.0)
    executor = make(warm=1, concurrency=3)
    eventually(lambda: executor.stats.warm == 1)

    async def load() -> None:
        await asyncio.gather(*(executor.execute("6 * 7") for _ in range(20)))

    asyncio.run(load())
    eventually(lambda: executor.stats.warm == 3)
    monkeypatch.setattr(pool, "_SHRINK_SECONDS", 0.1)
    assert executor._pool is not None
    executor._loop.call_soon_threadsafe(executor._pool._shrink_later)  # replaces the timer with the long period
    eventually(lambda: executor.stats.warm == 1)
    assert executor.execute_sync("6 * 7").result == "42"
