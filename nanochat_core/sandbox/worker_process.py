"""The life of one worker process: it is started, used for one call, killed and reaped."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import resource
import select
import signal
import subprocess
import time
from collections.abc import Callable

from nanochat_core.sandbox import scratch
from nanochat_core.sandbox.capture import Capture, last_line
from nanochat_core.sandbox.interface import Limits, WorkerFailed
from nanochat_core.sandbox.profiles import Profile
from nanochat_core.sandbox.worker import protocol

log = logging.getLogger("nanochat.sandbox")

START_SECONDS = 20.0
_LAUNCHER_EXIT_SECONDS = 1.0
_FORCED_EXIT_SECONDS = 10.0
_PAGE_BYTES = resource.getpagesize()
# Address space of an idle interpreter, assumed if /proc hides the process.
_INTERPRETER_BYTES = 64 << 20


class ProcessUsage:
    """Reads CPU time and memory of a process from outside, without its help.

    ``peak_memory_bytes`` is the largest resident memory that :meth:`sample_memory` measured; 0 before the first
    measurement.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.peak_memory_bytes = 0

    def address_space_bytes(self) -> int:
        """Size of the virtual memory."""
        try:
            with open(f"/proc/{self._pid}/statm", "rb") as statm:
                return int(statm.read().split()[0]) * _PAGE_BYTES
        except OSError:
            return _INTERPRETER_BYTES

    def cpu_seconds(self) -> float:
        """CPU time so far; 0 if the process has ended.

        The id of the process's CPU clock is computed in the same way as in Linux's ``clock_getcpuclockid(3)``.
        """
        cpu_clock = (~self._pid << 3) | 2
        try:
            return time.clock_gettime(cpu_clock)
        except OSError:
            return 0.0

    def sample_memory(self) -> None:
        """Update :attr:`peak_memory_bytes`, unless the process has ended or /proc hides it."""
        try:
            with open(f"/proc/{self._pid}/status", "rb") as status:
                for line in status:
                    if line.startswith(b"VmHWM:"):
                        self.peak_memory_bytes = max(self.peak_memory_bytes, int(line.split()[1]) * 1024)
                        return
        except OSError:
            return


class WorkerProcess:
    """An interpreter that has isolated itself and waits for the code of its only call.

    A worker may be used only in the event loop and the thread that started it. The kernel kills the worker when that
    thread ends. Some profiles start the worker through a launcher such as bubblewrap. In the other profiles, "launcher"
    means the worker itself.

    Attributes:
        profile: the isolation profile of the worker.
        stdout, stderr, result: descriptors of the pipes that the worker writes to.
        handle: pidfd of the launcher, readable once the launcher has ended.
        usage: CPU time and memory of the worker.
    """

    usage: ProcessUsage
    stdout: int
    stderr: int
    result: int

    def __init__(self, profile: Profile, scratch_root: scratch.ScratchRoot | None) -> None:
        self.profile = profile
        self._scratch = scratch_root.new() if scratch_root and profile.host_scratch else None
        self._fds: set[int] = set()
        self._launcher: subprocess.Popen[bytes] | None = None
        self.handle = -1
        self._worker_handle = -1  # pidfd of the worker, set once the worker is ready
        self._pid = 0
        self._exit: tuple[int, float] | None = None

    @classmethod
    async def start(cls, profile: Profile, scratch_root: scratch.ScratchRoot | None) -> WorkerProcess:
        """Start a worker and wait until it has isolated itself.

        Raises WorkerFailed if the worker could not be started, or could not apply a layer of the isolation.
        """
        try:
            worker = cls(profile, scratch_root)
        except OSError as error:
            raise WorkerFailed(f"a sandbox worker did not start: {error}") from error
        try:
            async with asyncio.timeout(START_SECONDS):
                worker._launch()
                await worker.send(profile.setup)
                await worker._wait_until_ready()
        except OSError as error:
            detail = worker._last_words() or str(error) or f"not ready after {START_SECONDS:g} s"
            await worker.dispose()
            raise WorkerFailed(f"a sandbox worker did not start: {detail}") from error
        except BaseException:
            await worker.dispose()
            raise
        return worker

    @property
    def alive(self) -> bool:
        poll = select.poll()
        poll.register(self.handle, select.POLLIN)
        return not poll.poll(0)

    @property
    def scratch_exceeded(self) -> bool:
        """Whether the scratch folder on the host, if there is one, contains more than the call may store."""
        config = self.profile.config
        return self._scratch is not None and scratch.exceeds(self._scratch, config.scratch_bytes, config.scratch_files)

    def set_limits(self, limits: Limits, receiving: int) -> None:
        """Set the kernel's limits for the worker's memory and CPU time.

        The executor measures CPU time itself. The kernel's limit, in whole seconds, is a second line of defense. The
        worker needs ``receiving`` bytes of memory to receive the request.
        """
        for number, value in (
            (resource.RLIMIT_AS, self.usage.address_space_bytes() + receiving + limits.memory_bytes),
            (resource.RLIMIT_CPU, math.ceil(self.usage.cpu_seconds() + limits.cpu_seconds) + 1),
        ):
            inherited = resource.prlimit(self._pid, number)[1]
            allowed = value if inherited == resource.RLIM_INFINITY else min(value, inherited)
            resource.prlimit(self._pid, number, (allowed, allowed))

    async def send(self, data: bytes) -> None:
        """Write to the worker's stdin. Raises OSError if the worker has ended."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._stdin, rest) :]
            except BlockingIOError:
                loop = asyncio.get_running_loop()
                await _wait_for_fd(loop.add_writer, loop.remove_writer, self._stdin)

    def close_stdin(self) -> None:
        """Tell the worker that no further data follows."""
        self._close(self._stdin)

    def kill(self) -> None:
        """Send SIGKILL to the worker.

        No process of the call can outlive the worker: it is the only process of its session, and in bubblewrap it is
        the first process of its namespace. A launcher reaps the worker and then ends by itself.
        """
        if self._exit is None:
            try:
                signal.pidfd_send_signal(self._worker_handle, signal.SIGKILL)
            except ProcessLookupError:
                pass  # the worker has already ended

    async def reap(self, patience: float = _LAUNCHER_EXIT_SECONDS) -> tuple[int, float]:
        """Wait until the process has ended; kill the launcher after ``patience`` seconds.

        The result is the exit code (128 + number for a signal) and the CPU seconds. Raises WorkerFailed if the process
        cannot be killed.
        """
        if self._exit is not None:
            return self._exit
        assert self._launcher is not None
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(patience):
                await _wait_for_fd(loop.add_reader, loop.remove_reader, self.handle)
        except TimeoutError:
            log.warning("a sandbox launcher did not end by itself", extra={"pid": self._launcher.pid})
            signal.pidfd_send_signal(self.handle, signal.SIGKILL)
            try:
                async with asyncio.timeout(_FORCED_EXIT_SECONDS):
                    await _wait_for_fd(loop.add_reader, loop.remove_reader, self.handle)
            except TimeoutError:
                raise WorkerFailed(f"process {self._launcher.pid} of the sandbox cannot be killed") from None
        _, status, usage = os.wait4(self._launcher.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        self._launcher.returncode = code  # subprocess must not wait for the process again
        self._exit = (128 - code if code < 0 else code, usage.ru_utime + usage.ru_stime)
        return self._exit

    async def dispose(self) -> None:
        """Kill and reap the worker, close its descriptors and remove its scratch folder. Idempotent."""
        if self._launcher is not None:
            patience = _LAUNCHER_EXIT_SECONDS
            if self._worker_handle >= 0:
                self.kill()
            elif self._stdin in self._fds:
                # The worker is not ready yet. A launcher that is killed during its setup would leave a child that waits
                # forever. A worker ends by itself when its stdin is closed, so close the stdin and wait longer.
                self.close_stdin()
                patience = START_SECONDS
            try:
                await self.reap(patience)
            except WorkerFailed as error:
                log.error("a sandbox worker was left behind", extra={"error": str(error)})
        for fd in list(self._fds):
            self._close(fd)
        if self._scratch is not None:
            folder, self._scratch = self._scratch, None
            try:
                if os.listdir(folder):
                    await asyncio.to_thread(scratch.remove, folder)
                else:
                    os.rmdir(folder)
            except OSError as error:
                log.error("a scratch folder could not be removed", extra={"folder": folder, "error": str(error)})

    def _launch(self) -> None:
        child_stdin, self._stdin = self._pipe()
        self.stdout, child_stdout = self._pipe()
        self.stderr, child_stderr = self._pipe()
        self.result, child_result = self._pipe()
        self._status, child_status = self._pipe()
        children = (child_stdin, child_stdout, child_stderr, child_result, child_status)
        process = subprocess.Popen(  # noqa: S603 - the command comes from the profile
            self.profile.command(child_result, child_status),
            env={},
            cwd=self._scratch or "/",
            stdin=child_stdin,
            stdout=child_stdout,
            stderr=child_stderr,
            pass_fds=(child_result, child_status),
            start_new_session=True,
        )
        try:
            self.handle = self._own(os.pidfd_open(process.pid))
        except OSError:
            process.kill()
            process.wait()
            raise
        self._launcher = process
        for fd in children:
            self._close(fd)
        for fd in (self._stdin, self.stdout, self.stderr, self.result, self._status):
            os.set_blocking(fd, False)

    async def _wait_until_ready(self) -> None:
        loop = asyncio.get_running_loop()
        await _wait_for_fd(loop.add_reader, loop.remove_reader, self.result)
        if os.read(self.result, 1) != protocol.READY:
            raise OSError("it ended at once")
        assert self._launcher is not None
        self._pid = self._launcher.pid
        try:
            status = os.read(self._status, 4096)
        except BlockingIOError:
            status = b""
        if status:
            self._pid = int(json.loads(status.splitlines()[0])["child-pid"])
        # Only untrusted code could have ended the worker, and none has run yet. The id therefore still belongs to the
        # worker.
        self._worker_handle = self._own(os.pidfd_open(self._pid))
        self.usage = ProcessUsage(self._pid)

    def _last_words(self) -> str:
        """The last line that a worker wrote to stderr before it failed to start; empty if there is none."""
        if self._launcher is None:
            return ""
        stderr = Capture("stderr", self.stderr, 1 << 16)
        stderr.read_available()
        return last_line(stderr.data)

    def _pipe(self) -> tuple[int, int]:
        read, write = os.pipe()
        return self._own(read), self._own(write)

    def _own(self, fd: int) -> int:
        self._fds.add(fd)
        return fd

    def _close(self, fd: int) -> None:
        self._fds.discard(fd)
        os.close(fd)


async def _wait_for_fd(add: Callable[..., object], remove: Callable[[int], object], fd: int) -> None:
    """Wait until ``fd`` can be read or written; ``add`` is the event loop's ``add_reader`` or ``add_writer``."""
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def set_ready() -> None:
        if not ready.done():
            ready.set_result(None)

    add(fd, set_ready)
    try:
        await ready
    finally:
        remove(fd)
