"""Runs code in isolation, by default the strongest that works here, and limits how many calls run at once."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import dataclasses
import logging
import os
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from nanochat_core.fair_slots import FairSlots
from nanochat_core.sandbox import interpreter
from nanochat_core.sandbox.call import run_call
from nanochat_core.sandbox.capture import OnData
from nanochat_core.sandbox.cgroups import Cgroups
from nanochat_core.sandbox.examination.programs import candidate_program, judge_program
from nanochat_core.sandbox.fork_server import ForkServer, ServerLate
from nanochat_core.sandbox.interface import (
    CodeNotBegun,
    ExecutionResult,
    Inputs,
    Limits,
    ProfileUnavailable,
    ResultFormat,
    SandboxConfig,
    SandboxUnavailable,
    Status,
    WorkerFailed,
)
from nanochat_core.sandbox.pool import WorkerPool
from nanochat_core.sandbox.profiles import PROFILES, Profile
from nanochat_core.sandbox.scratch import ScratchRoot
from nanochat_core.sandbox.selftest import self_test
from nanochat_core.sandbox.sessions import Sessions
from nanochat_core.sandbox.worker_process import WorkerProcess

T = TypeVar("T")

log = logging.getLogger("nanochat.sandbox")

_NO_LIMITS = Limits()
_NO_INPUTS = Inputs()
# If the worker of a call ends or hangs before the code begins, the call runs in another worker. A call has this many
# attempts, except an examination, which has one. The start of a worker has this many attempts too.
_ATTEMPTS = 3
# Pause before the executor reaps the worker of a call and forks another one, so that the call's answer is sent first.
_PAUSE_SECONDS = 0.001


@dataclasses.dataclass(frozen=True)
class ExecutorStats:
    """How many calls are running, how many calls wait for a slot, and how many idle workers are ready for a call."""

    running: int
    queued: int
    warm: int


class SandboxExecutor:
    """Executes untrusted Python in a fresh process for each call.

    Use the executor as a context manager, or call :meth:`start` and :meth:`close`. Calls may come from any event loop
    or thread. The executor starts its fork servers from a thread of its own, because the kernel kills a fork server
    (and, with it, the workers) when the thread that started the server ends. ``rejected`` has the name of each profile
    that was tried and does not work on this machine, and the reason.
    """

    def __init__(self, config: SandboxConfig | None = None) -> None:
        self.config = config or SandboxConfig()
        self.rejected: dict[str, str] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sandbox", daemon=True)
        self._isolation: Profile | None = None
        self._scratch: ScratchRoot | None = None
        self._cgroups: Cgroups | None = None
        self._pool: WorkerPool | None = None
        self._server: ForkServer | None = None
        self._servers: set[ForkServer] = set()
        self._starting_server = asyncio.Lock()
        self._renewal: asyncio.Task[None] | None = None
        self._slots = FairSlots(self.config.concurrency)
        self._pairs = asyncio.Semaphore(self.config.concurrency)
        self._sessions = Sessions(self.config.sessions, self.config.session_seconds)
        self._closing = False
        self._running = 0
        self._calls: set[asyncio.Task[Any]] = set()
        self._disposals: set[asyncio.Task[None]] = set()

    @property
    def isolation(self) -> Profile:
        """The active isolation profile. Raises RuntimeError before :meth:`start`."""
        if self._isolation is None:
            raise RuntimeError("the executor is not started")
        return self._isolation

    @property
    def profile(self) -> str:
        return self.isolation.name

    @property
    def landlock_abi(self) -> int:
        """Landlock version in use; 0 if the profile works without Landlock."""
        return self.isolation.landlock_abi

    @property
    def own_file_systems(self) -> bool:
        """Whether each call has a scratch file system of its own, so that the kernel limits its size."""
        scratch_sized = self._scratch is not None and self._scratch.sized
        return scratch_sized or (self._server is not None and self._server.private)

    @property
    def fork_servers(self) -> list[ForkServer]:
        """The running fork servers: the current one, and old ones whose last workers have not ended yet."""
        return [server for server in self._servers if server.alive]

    @property
    def stats(self) -> ExecutorStats:
        return ExecutorStats(self._running, self._slots.queued, len(self._pool) if self._pool else 0)

    def start(self) -> SandboxExecutor:
        """Choose and test the isolation profile, then begin to start workers. Blocks for about 100 ms.

        Raises SandboxUnavailable if the configured profile does not work on this machine (with ``auto``: if no profile
        works), or if the interpreter, the scratch folder or the folder of cgroups cannot be used.
        """
        self._thread.start()
        atexit.register(self.close)
        try:
            self._submit(self._open()).result()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Kill all workers, remove all scratch files and stop. Idempotent.

        Calls that run or wait raise WorkerFailed.
        """
        atexit.unregister(self.close)
        if self._loop.is_closed():
            return
        if self._thread.is_alive():
            self._submit(self._shut_down()).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()

    def __enter__(self) -> SandboxExecutor:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    async def execute(
        self,
        code: str,
        limits: Limits = _NO_LIMITS,
        result_format: ResultFormat = ResultFormat.REPR,
        key: str = "",
        inputs: Inputs = _NO_INPUTS,
        on_output: OnData | None = None,
        session: str = "",
    ) -> ExecutionResult:
        """Run ``code``. Canceling the call kills its process.

        The result is returned even if the code failed. Its status is OVERLOADED if all slots and the queue are full, or
        if too many calls wait for other calls of their sessions. Raises WorkerFailed if the sandbox itself failed, or
        was closed during the call, ValueError if the inputs (with the files of the session) are too large or too many,
        and RuntimeError if the executor is not started or is closed.

        Args:
            code: a program. If its last statement is an expression, the expression's value is the result.
            limits: a zero means the configured default. A value above the configured maximum is lowered to the maximum.
            result_format: how the value is converted to text.
            key: identifies the caller or conversation. Waiting calls of different keys take turns.
            inputs: stdin, arguments and files for the code.
            on_output: called with the name (stdout or stderr) and new bytes of the code's output while the code runs.
                It is called in the executor's thread and must not block.
            session: name of a session of this key. The call begins with the files that the session keeps and with those
                of ``inputs``. The files that the call leaves replace the session's files, unless some of them are
                missing or they are too large (see ``files_complete``). Calls of a session run one after the other. If
                the name is empty, no files are kept.
        """
        self._check(inputs)
        work = self._execute(code, limits, result_format, key, inputs, on_output, session)
        return await asyncio.wrap_future(self._submit(work))

    def execute_sync(
        self,
        code: str,
        limits: Limits = _NO_LIMITS,
        result_format: ResultFormat = ResultFormat.REPR,
        inputs: Inputs = _NO_INPUTS,
        session: str = "",
    ) -> ExecutionResult:
        """Like :meth:`execute`, for callers without an event loop. Blocks."""
        self._check(inputs)
        return self._wait(self._execute(code, limits, result_format, "", inputs, session=session))

    def examine_sync(self, context: str, code: str, tests: str, function: str, limits: Limits) -> ExecutionResult:
        """Run ``tests`` on the function that ``context`` and then ``code`` define. Blocks.

        The function and the tests run in two sandboxes, and only plain data pass between them. The code therefore
        cannot read the tests or their expected values, and cannot change how values are compared.

        Returns how the tests ended: the status is OK if they passed, or OVERLOADED if they did not run. Both sandboxes
        have the given limits. Raises the same errors as :meth:`execute`.

        Args:
            context: a program that the function and the tests share, such as imports and helper functions.
            code: continues ``context``, and defines the function.
            tests: define a function ``check(candidate)``, which raises an exception unless ``candidate`` is right.
            function: name of the function.
        """
        programs = candidate_program(f"{context.rstrip()}\n{code}\n", function), judge_program(context, tests, function)
        return self._wait(self._examine(*programs, limits))

    async def probe(self) -> None:
        """Run a tiny program outside of the slots and the queue. Raises WorkerFailed if the sandbox does not work."""
        result = await asyncio.wrap_future(self._submit(self._run(b"6 * 7", self.config.default_limits)))
        if result.result != "42":
            raise WorkerFailed(f"a test call ended with {result.status.value}: {result.error or result.result}")

    def _check(self, inputs: Inputs) -> None:
        if not self._fits(inputs):
            raise ValueError(
                f"the code would get {len(inputs.files)} files and, with stdin, {inputs.size} bytes; at most "
                f"{self._most_files} files and {self._most_bytes} bytes are allowed"
            )

    def _fits(self, inputs: Inputs) -> bool:
        return inputs.size <= self._most_bytes and len(inputs.files) <= self._most_files

    @property
    def _most_bytes(self) -> int:
        # Files occupy whole blocks, which may be larger than the bytes of the files. The limit is therefore at most
        # half of the scratch folder's size.
        return min(self.config.max_file_bytes, self.config.scratch_bytes // 2)

    @property
    def _most_files(self) -> int:
        # The limit ``scratch_files`` also counts folders. A file's name has up to 16 parts (is_file_name), so the file
        # may need 15 folders. Therefore, a sixteenth of that limit is a number of files that always fits.
        return min(self.config.max_files, self.config.scratch_files // 16)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        future = self._submit(work)
        try:
            return future.result()
        finally:
            future.cancel()  # stops the call if the wait was interrupted; otherwise it has no effect

    def _submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        if self._loop.is_closed() or not self._thread.is_alive():
            work.close()
            raise RuntimeError(f"the executor is {'closed' if self._loop.is_closed() else 'not started'}")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _open(self) -> None:
        installation = interpreter.inspect(self.config.interpreter)
        try:
            self._scratch = ScratchRoot(self.config.scratch_dir or tempfile.gettempdir())
        except (OSError, ValueError) as error:
            raise SandboxUnavailable(f"the sandbox cannot use its scratch folder: {error}") from error
        try:
            self._cgroups = Cgroups(self.config.cgroup_dir) if self.config.cgroup_dir else None
        except OSError as error:
            raise SandboxUnavailable(f"the sandbox cannot use its cgroup folder: {error}") from error
        await self._choose_profile(installation, self._scratch)
        most, least = self.config.concurrency, self.config.warm
        if self._scratch.places is not None:
            # Idle workers occupy scratch folders, and so does an examination (a pair of workers) while it waits for its
            # second worker. Idle workers and waiting examinations must together leave one folder free, so that at least
            # one call or examination can run.
            share = (self._scratch.places - 1) // 2
            most, least = min(most, share), min(least, share)
            self._pairs = asyncio.Semaphore(max(1, share))
        self._pool = WorkerPool(self._start_worker, least, most)
        self._pool.refill()

    async def _choose_profile(self, installation: interpreter.Interpreter, scratch_root: ScratchRoot) -> None:
        suggested = [name for name, profile_type in PROFILES.items() if profile_type.suggested()]
        for name in suggested if self.config.profile == "auto" else [self.config.profile]:
            try:
                profile = PROFILES[name](installation, self.config)
                server = await self._open_server(profile, scratch_root)
                await self_test(server, scratch_root)
                self._isolation, self._server = profile, server
                return
            except (ProfileUnavailable, WorkerFailed) as error:
                self.rejected[name] = str(error)
            except OSError as error:
                raise SandboxUnavailable(f"the sandbox cannot use its scratch folder: {error}") from error
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.rejected.items())
        raise SandboxUnavailable(f"code cannot be isolated on this machine, so none will run ({reasons})")

    async def _open_server(self, profile: Profile, scratch_root: ScratchRoot) -> ForkServer:
        self._servers = {server for server in self._servers if not server.closed}
        server = await ForkServer.start(profile, scratch_root)
        server.cgroups = self._cgroups
        self._servers.add(server)
        return server

    async def _start_worker(self, peers: Sequence[int] = ()) -> WorkerProcess:
        """Fork a worker. If this fails, try again with a new fork server and, if needed, new scratch folders.

        If somebody is still removing the scratch folders during the second attempt, a third attempt is needed. A fork
        server that ended while it started is replaced too. A fork server that was not ready in time is not replaced,
        because the next one would not be ready in time either.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            server: ForkServer | None = None
            try:
                server = await self._ready_server()
                assert self._scratch is not None
                return await WorkerProcess.start(server, self._scratch, peers)
            except ServerLate:
                raise
            except WorkerFailed as error:
                if attempt == _ATTEMPTS:
                    raise
                log.warning("a new sandbox fork server is needed", extra={"error": str(error)})
                if server is not None:
                    if self._server is server:
                        self._server = None
                    server.retire()
        raise AssertionError("unreachable")

    async def _ready_server(self) -> ForkServer:
        """The current fork server. A server that has ended, or whose scratch folders were removed, is replaced."""
        async with self._starting_server:
            server = self._server
            assert self._scratch is not None
            if not self._scratch.intact:
                log.warning("the sandbox's scratch folders were removed")
                try:
                    self._scratch.make()
                except OSError as error:
                    raise WorkerFailed(f"the sandbox cannot use its scratch folder: {error}") from error
                if server is not None:
                    server.retire()
                server = None
            if server is None or not server.alive:
                server = self._server = await self._open_server(self.isolation, self._scratch)
            elif server.forks >= self.config.renew_calls and (self._renewal is None or self._renewal.done()):
                self._renewal = asyncio.create_task(self._renew(server, self._scratch))
            return server

    async def _renew(self, old: ForkServer, scratch_root: ScratchRoot) -> None:
        """Start a new fork server, while the old one still serves."""
        try:
            server = await self._open_server(old.profile, scratch_root)
        except WorkerFailed as error:
            log.error("a sandbox fork server could not be renewed", extra={"error": str(error)})
            return
        if self._server is old:
            self._server = server
            old.retire()
        else:
            server.retire()

    async def _shut_down(self) -> None:
        self._closing = True
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)
        self._sessions.close()
        await asyncio.gather(*self._disposals, return_exceptions=True)
        if self._pool is not None:
            await self._pool.close()
        if self._renewal is not None:
            self._renewal.cancel()
            await asyncio.gather(self._renewal, return_exceptions=True)
        await asyncio.gather(*(server.close() for server in self._servers))
        if self._scratch is not None:
            self._scratch.close()
        if self._cgroups is not None:
            self._cgroups.close()
        await self._loop.shutdown_default_executor()

    async def _execute(
        self,
        code: str,
        limits: Limits,
        result_format: ResultFormat,
        key: str,
        inputs: Inputs,
        on_output: OnData | None = None,
        session: str = "",
    ) -> ExecutionResult:
        async def execute(inputs: Inputs) -> ExecutionResult:
            async def run(source: bytes, granted: Limits, arrived: float) -> ExecutionResult:
                return await self._run(source, granted, result_format, arrived, inputs, on_output)

            return await self._admit((code,), limits, key, run)

        return await (self._execute_in_session(execute, key, session, inputs) if session else execute(inputs))

    async def _execute_in_session(
        self, execute: Callable[[Inputs], Awaitable[ExecutionResult]], key: str, name: str, inputs: Inputs
    ) -> ExecutionResult:
        if self._sessions.waiting >= max(1, self.config.queue):
            line = f"too many calls ({self._sessions.waiting}) wait for other calls of their sessions; try again later"
            return ExecutionResult(Status.OVERLOADED, error=line, profile=self.profile)
        arrived = time.monotonic()
        with self._cancelled_at_the_end():
            async with self._sessions.open(key, name) as session:
                waited, new = time.monotonic() - arrived, session.new
                given = {**session.files, **inputs.files}
                asked = dataclasses.replace(
                    inputs, files=given, collect_files=True, collect_unchanged=True, collect_endings=()
                )
                self._check(asked)
                result = await execute(asked)
                kept = result.files_complete and self._fits(Inputs(files=result.files))
                if kept:
                    session.files, session.new = result.files, False
        endings = inputs.collect_endings or ("",)
        changed = {
            name: content
            for name, content in result.files.items()
            if name.endswith(endings) and (inputs.collect_unchanged or given.get(name) != content)
        }
        return dataclasses.replace(
            result,
            files=changed if inputs.collect_files else {},
            files_complete=kept,
            session_new=new,
            queue_seconds=waited + result.queue_seconds,
        )

    async def _examine(self, candidate: str, judge: str, limits: Limits) -> ExecutionResult:
        async def run(candidate_source: bytes, judge_source: bytes, granted: Limits, _: float) -> ExecutionResult:
            async with self._pairs:
                return await self._run_pair(candidate_source, judge_source, granted)

        return await self._admit((candidate, judge), limits, "", run)

    async def _admit(
        self, programs: tuple[str, ...], limits: Limits, key: str, run: Callable[..., Awaitable[ExecutionResult]]
    ) -> ExecutionResult:
        """Wait for a slot, then call ``run`` with the programs as bytes, the granted limits and the time of arrival."""
        profile = self.profile
        if self._slots.full and self._slots.queued >= self.config.queue:
            line = (
                f"the queue is full: {self._running} calls are running and {self._slots.queued} wait; try again later"
            )
            return ExecutionResult(Status.OVERLOADED, error=line, profile=profile)
        try:
            sources = [program.encode() for program in programs]
        except UnicodeEncodeError as error:
            line = f"SyntaxError: the code is not text: {error}"
            return ExecutionResult(Status.ERROR, error=line, profile=profile)
        limits = limits.within(self.config.default_limits, self.config.maximum_limits)
        arrived = time.monotonic()
        with self._cancelled_at_the_end():
            await self._slots.acquire(key)
            self._running += 1
            try:
                return await run(*sources, limits, arrived)
            finally:
                self._running -= 1
                self._slots.release()

    @contextlib.contextmanager
    def _cancelled_at_the_end(self) -> Iterator[None]:
        """Cancel the current call if the executor closes in the ``with`` block. The call then raises WorkerFailed."""
        call = asyncio.current_task()
        assert call is not None
        self._calls.add(call)
        try:
            yield
        except asyncio.CancelledError:
            if self._closing:
                raise WorkerFailed("the sandbox is shutting down") from None
            raise
        finally:
            self._calls.discard(call)

    def _dispose_later(self, worker: WorkerProcess) -> None:
        """Kill a worker, and wait for its end in the background, so that the answer of its call is not delayed."""
        worker.kill()
        disposal = asyncio.create_task(self._dispose(worker))
        self._disposals.add(disposal)
        disposal.add_done_callback(self._disposals.discard)

    async def _dispose(self, worker: WorkerProcess) -> None:
        await asyncio.sleep(_PAUSE_SECONDS)
        if self._pool is not None:
            self._pool.refill()
        await worker.dispose()

    async def _run_pair(self, candidate: bytes, judge: bytes, limits: Limits) -> ExecutionResult:
        """Run a candidate and its judge, connected by two pipes. Returns the judge's result."""
        to_judge, from_candidate = os.pipe()
        to_candidate, from_judge = os.pipe()
        workers: list[WorkerProcess] = []
        calls: list[asyncio.Task[ExecutionResult]] = []
        try:
            try:
                for peers in ((to_judge, from_judge), (to_candidate, from_candidate)):
                    workers.append(await self._start_worker(peers))
            finally:
                # The executor closes its own copies of the pipes, so that each worker notices when the other worker
                # ends.
                for fd in (to_judge, from_candidate, to_candidate, from_judge):
                    os.close(fd)
            for worker, source in zip(workers, (judge, candidate), strict=True):
                calls.append(asyncio.create_task(run_call(worker, source, limits, ResultFormat.STR)))
            judging, answering = calls
            await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            if answering.done() and not judging.done():
                answering.result()  # raises if the sandbox failed, so that the tests do not count as failed
            return await judging
        finally:
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            for worker in workers:
                self._dispose_later(worker)

    async def _run(
        self,
        source: bytes,
        limits: Limits,
        result_format: ResultFormat = ResultFormat.REPR,
        arrived: float | None = None,
        inputs: Inputs = _NO_INPUTS,
        on_output: OnData | None = None,
    ) -> ExecutionResult:
        assert self._pool is not None
        arrived = time.monotonic() if arrived is None else arrived
        for attempt in range(1, _ATTEMPTS + 1):
            worker = await self._pool.take()
            queue_seconds = time.monotonic() - arrived
            try:
                result = await run_call(worker, source, limits, result_format, inputs, on_output)
                if worker.has_left_files:
                    await worker.dispose()  # the files must be gone before the client gets the answer
                return dataclasses.replace(result, queue_seconds=queue_seconds)
            except CodeNotBegun as error:
                if attempt == _ATTEMPTS:
                    raise
                log.warning("a call runs in another sandbox worker", extra={"error": str(error)})
            finally:
                self._dispose_later(worker)
        raise AssertionError("unreachable")
