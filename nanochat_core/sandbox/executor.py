"""Runs code under the strongest isolation that holds here, a bounded number of calls at once."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import dataclasses
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, TypeVar

from nanochat_core.sandbox import interpreter
from nanochat_core.sandbox.config import SandboxConfig
from nanochat_core.sandbox.errors import ProfileUnavailable, SandboxUnavailable, WorkerFailed
from nanochat_core.sandbox.pool import WorkerPool
from nanochat_core.sandbox.process import WorkerProcess
from nanochat_core.sandbox.profiles import PROFILES, Profile
from nanochat_core.sandbox.results import ExecutionResult, Limits, ResultFormat, Status
from nanochat_core.sandbox.scratch import ScratchRoot
from nanochat_core.sandbox.selftest import self_test
from nanochat_core.sandbox.verdict import judge

T = TypeVar("T")

_NO_LIMITS = Limits()


@dataclasses.dataclass(frozen=True)
class ExecutorStats:
    """Calls running and waiting for a slot, and interpreters started and idle, at this moment."""

    running: int
    queued: int
    warm: int


class SandboxExecutor:
    """Executes untrusted Python, one fresh process for each call.

    Use as a context manager, or call :meth:`start` and :meth:`close`. Calls may come from any event loop or thread:
    workers belong to a thread of the executor's own, because the kernel ties a worker's life to the thread that started
    it.

    Attributes:
        profile: name of the active isolation profile.
        landlock_abi: Landlock version in force, 0 when the profile works without.
        rejected: for each stronger profile that ``auto`` passed over, why.
    """

    def __init__(self, config: SandboxConfig | None = None) -> None:
        self.config = config or SandboxConfig()
        self.rejected: dict[str, str] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sandbox", daemon=True)
        self._active: Profile | None = None
        self._scratch: ScratchRoot | None = None
        self._pool: WorkerPool | None = None
        self._slots = asyncio.Semaphore(self.config.concurrency)
        self._closing = False
        self._running = 0
        self._queued = 0
        self._calls: set[asyncio.Task[Any]] = set()

    @property
    def profile(self) -> str:
        return self._started().name

    @property
    def landlock_abi(self) -> int:
        return self._started().landlock_abi

    @property
    def stats(self) -> ExecutorStats:
        return ExecutorStats(self._running, self._queued, len(self._pool) if self._pool else 0)

    def start(self) -> SandboxExecutor:
        """Choose the profile, test it, and begin to warm up. Blocks for some 100 ms.

        Raises:
            SandboxUnavailable: the configured profile, or with ``auto`` every profile, fails its self-test.
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
        """Kill what runs, remove every scratch folder and stop. Calls under way raise WorkerFailed. Idempotent."""
        atexit.unregister(self.close)
        if self._loop.is_closed():
            return
        if self._thread.is_alive():
            self._submit(self._shut()).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()

    def __enter__(self) -> SandboxExecutor:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def execute(
        self, code: str, limits: Limits = _NO_LIMITS, result_format: ResultFormat = ResultFormat.REPR
    ) -> ExecutionResult:
        """Run ``code``. Cancelling kills its process.

        Args:
            code: a program; the value of an expression at its end is the result.
            limits: zeros mean the configured defaults; more than the configured maxima is lowered to them.
            result_format: how the value becomes text.

        Returns:
            The answer, whatever the code did. OVERLOADED when every slot and the queue are taken.

        Raises:
            WorkerFailed: the sandbox itself failed, or was closed meanwhile.
        """
        return await asyncio.wrap_future(self._submit(self._execute(code, limits, result_format)))

    def execute_sync(
        self, code: str, limits: Limits = _NO_LIMITS, result_format: ResultFormat = ResultFormat.REPR
    ) -> ExecutionResult:
        """:meth:`execute` for callers without an event loop; blocks."""
        future = self._submit(self._execute(code, limits, result_format))
        try:
            return future.result()
        finally:
            future.cancel()  # has an effect only when the wait was interrupted

    def _submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        if self._loop.is_closed():
            work.close()
            raise RuntimeError("the executor is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _started(self) -> Profile:
        if self._active is None:
            raise RuntimeError("the executor is not started")
        return self._active

    async def _open(self) -> None:
        installation = interpreter.inspect(self.config.interpreter)
        try:
            self._scratch = ScratchRoot(self.config.scratch_dir)
        except OSError as error:
            raise SandboxUnavailable(f"the sandbox cannot use its scratch folder: {error}") from error
        self._active = await self._choose(installation, self._scratch)
        self._pool = WorkerPool(self._new_worker, self.config.warm)
        self._pool.refill()

    async def _choose(self, installation: interpreter.Interpreter, scratch_root: ScratchRoot) -> Profile:
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

    async def _shut(self) -> None:
        self._closing = True
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)
        if self._pool is not None:
            await self._pool.close()
        if self._scratch is not None:
            self._scratch.close()
        await self._loop.shutdown_default_executor()

    async def _new_worker(self) -> WorkerProcess:
        return await WorkerProcess.start(self._started(), self._scratch)

    async def _execute(self, code: str, limits: Limits, result_format: ResultFormat) -> ExecutionResult:
        profile = self._started()
        if self._slots.locked() and self._queued >= self.config.queue:
            line = f"{self._running} calls are running and {self._queued} waiting, which is as many as may; try again"
            return ExecutionResult(Status.OVERLOADED, error=line, profile=profile.name)
        try:
            source = code.encode()
        except UnicodeEncodeError as error:
            return ExecutionResult(
                Status.ERROR, error=f"SyntaxError: the code is not text: {error}", profile=profile.name
            )
        call = asyncio.current_task()
        assert call is not None
        self._calls.add(call)
        try:
            return await self._in_turn(
                source, limits.within(self.config.default_limits, self.config.maximum_limits), result_format
            )
        except asyncio.CancelledError:
            if self._closing:
                raise WorkerFailed("the sandbox is shutting down") from None
            raise
        finally:
            self._calls.discard(call)

    async def _in_turn(self, source: bytes, limits: Limits, result_format: ResultFormat) -> ExecutionResult:
        """Wait for a slot, then run."""
        self._queued += 1
        try:
            await self._slots.acquire()
        finally:
            self._queued -= 1
        self._running += 1
        try:
            return await self._run(source, limits, result_format)
        finally:
            self._running -= 1
            self._slots.release()

    async def _run(self, source: bytes, limits: Limits, result_format: ResultFormat) -> ExecutionResult:
        assert self._pool is not None
        worker = await self._pool.take()
        try:
            outcome = await worker.run(source, limits, result_format)
        finally:
            await worker.dispose()
        return judge(outcome, limits, self.config.scratch_bytes, self._started().name)
