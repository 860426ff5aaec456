"""Runs code under the strongest isolation that works on this machine, and limits how many calls run at once."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import dataclasses
import tempfile
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from nanochat_core.sandbox import interpreter
from nanochat_core.sandbox.call import run_call
from nanochat_core.sandbox.interface import (
    ExecutionResult,
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
from nanochat_core.sandbox.worker_process import WorkerProcess

T = TypeVar("T")

_NO_LIMITS = Limits()


@dataclasses.dataclass(frozen=True)
class ExecutorStats:
    """How many calls are running, how many calls wait for a slot, and how many interpreters are idle."""

    running: int
    queued: int
    warm: int


class SandboxExecutor:
    """Executes untrusted Python in a fresh process for each call.

    Use the executor as a context manager, or call :meth:`start` and :meth:`close`. Calls may come from any event loop
    or thread. The executor starts the workers from a thread of its own, because the kernel kills a worker when the
    thread that started it ends. ``rejected`` has the name of each profile that failed its self-test and the reason of
    the failure.
    """

    def __init__(self, config: SandboxConfig | None = None) -> None:
        self.config = config or SandboxConfig()
        self.rejected: dict[str, str] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sandbox", daemon=True)
        self._isolation: Profile | None = None
        self._scratch: ScratchRoot | None = None
        self._pool: WorkerPool | None = None
        self._slots = asyncio.Semaphore(self.config.concurrency)
        self._closing = False
        self._running = 0
        self._queued = 0
        self._calls: set[asyncio.Task[Any]] = set()

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
    def stats(self) -> ExecutorStats:
        return ExecutorStats(self._running, self._queued, len(self._pool) if self._pool else 0)

    def start(self) -> SandboxExecutor:
        """Choose and test the isolation profile, then begin to start workers. Blocks for about 100 ms.

        Raises SandboxUnavailable if the configured profile fails its self-test or, with ``auto``, every profile fails.
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
        """Kill all workers, remove all scratch folders and stop. Running calls raise WorkerFailed. Idempotent."""
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
        self, code: str, limits: Limits = _NO_LIMITS, result_format: ResultFormat = ResultFormat.REPR
    ) -> ExecutionResult:
        """Run ``code``. Canceling the call kills its process.

        The result is returned even if the code failed. Its status is OVERLOADED if all slots and the queue are full.
        Raises WorkerFailed if the sandbox itself failed, or was closed during the call.

        Args:
            code: a program. If its last statement is an expression, the expression's value is the result.
            limits: a zero means the configured default. A value above the configured maximum is lowered to the maximum.
            result_format: how the value is converted to text.
        """
        return await asyncio.wrap_future(self._submit(self._execute(code, limits, result_format)))

    def execute_sync(
        self, code: str, limits: Limits = _NO_LIMITS, result_format: ResultFormat = ResultFormat.REPR
    ) -> ExecutionResult:
        """Like :meth:`execute`, for callers without an event loop. Blocks."""
        future = self._submit(self._execute(code, limits, result_format))
        try:
            return future.result()
        finally:
            future.cancel()  # stops the call if the wait was interrupted; otherwise it has no effect

    def _submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        if self._loop.is_closed():
            work.close()
            raise RuntimeError("the executor is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _open(self) -> None:
        installation = interpreter.inspect(self.config.interpreter)
        try:
            self._scratch = ScratchRoot(self.config.scratch_dir or tempfile.gettempdir())
        except OSError as error:
            raise SandboxUnavailable(f"the sandbox cannot use its scratch folder: {error}") from error
        self._isolation = await self._choose_profile(installation, self._scratch)
        self._pool = WorkerPool(lambda: WorkerProcess.start(self.isolation, self._scratch), self.config.warm)
        self._pool.refill()

    async def _choose_profile(self, installation: interpreter.Interpreter, scratch_root: ScratchRoot) -> Profile:
        names = list(PROFILES) if self.config.profile == "auto" else [self.config.profile]
        for name in names:
            try:
                profile = PROFILES[name](installation, self.config)
                await self_test(profile, scratch_root)
                return profile
            except ProfileUnavailable as error:
                self.rejected[name] = str(error)
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.rejected.items())
        raise SandboxUnavailable(f"code cannot be isolated on this machine, so none will run ({reasons})")

    async def _shut_down(self) -> None:
        self._closing = True
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)
        if self._pool is not None:
            await self._pool.close()
        if self._scratch is not None:
            self._scratch.close()
        await self._loop.shutdown_default_executor()

    async def _execute(self, code: str, limits: Limits, result_format: ResultFormat) -> ExecutionResult:
        profile = self.profile
        if self._slots.locked() and self._queued >= self.config.queue:
            line = f"{self._running} calls are running and {self._queued} waiting, which is as many as may; try again"
            return ExecutionResult(Status.OVERLOADED, error=line, profile=profile)
        try:
            source = code.encode()
        except UnicodeEncodeError as error:
            line = f"SyntaxError: the code is not text: {error}"
            return ExecutionResult(Status.ERROR, error=line, profile=profile)
        limits = limits.within(self.config.default_limits, self.config.maximum_limits)
        call = asyncio.current_task()
        assert call is not None
        self._calls.add(call)
        try:
            return await self._run_in_slot(source, limits, result_format)
        except asyncio.CancelledError:
            if self._closing:
                raise WorkerFailed("the sandbox is shutting down") from None
            raise
        finally:
            self._calls.discard(call)

    async def _run_in_slot(self, source: bytes, limits: Limits, result_format: ResultFormat) -> ExecutionResult:
        assert self._pool is not None
        self._queued += 1
        try:
            await self._slots.acquire()
        finally:
            self._queued -= 1
        self._running += 1
        try:
            worker = await self._pool.take()
            try:
                return await run_call(worker, source, limits, result_format)
            finally:
                await worker.dispose()
        finally:
            self._running -= 1
            self._slots.release()
