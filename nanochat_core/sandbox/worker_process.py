"""The life of one worker process: it is forked, used for one call and killed."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import resource
import select
import signal
import time
from collections.abc import Sequence

from nanochat_core.sandbox import scratch
from nanochat_core.sandbox.capture import Capture, last_line
from nanochat_core.sandbox.cgroups import Cgroup
from nanochat_core.sandbox.fds import wait_for_fd
from nanochat_core.sandbox.fork_server import START_SECONDS, Exit, ForkServer
from nanochat_core.sandbox.interface import Limits, WorkerFailed

log = logging.getLogger("nanochat.sandbox")

_EXIT_SECONDS = 10.0
_PAGE_BYTES = resource.getpagesize()
# Memory of an idle interpreter, assumed if /proc hides the process.
_INTERPRETER_BYTES = 64 << 20


class ProcessUsage:
    """Reads CPU time and memory of a process from outside, without its help.

    ``peak_memory_bytes`` is the largest memory that :meth:`sample_memory` measured: the resident memory of the process
    or, if it is larger, the memory of the process's cgroup. It is 0 before the first measurement.
    """

    def __init__(self, pid: int, cgroup: Cgroup | None = None) -> None:
        self._pid, self._cgroup = pid, cgroup
        self.peak_memory_bytes = 0

    def address_space_bytes(self) -> int:
        """Size of the process's virtual memory; an estimate if ``/proc`` does not show the process."""
        try:
            with open(f"/proc/{self._pid}/statm", "rb") as statm:
                return int(statm.read().split()[0]) * _PAGE_BYTES
        except OSError:
            return _INTERPRETER_BYTES

    def resident_bytes(self) -> int:
        """Memory that the process uses now, including the pages that it shares with the fork server.

        If ``/proc`` does not show the process, the result is an estimate.
        """
        try:
            with open(f"/proc/{self._pid}/statm", "rb") as statm:
                return int(statm.read().split()[1]) * _PAGE_BYTES
        except OSError:
            return _INTERPRETER_BYTES

    def cpu_seconds(self) -> float:
        """CPU time so far; 0 if the process has ended and the fork server has reaped it.

        The id of the process's CPU clock is computed in the same way as in Linux's ``clock_getcpuclockid(3)``.
        """
        cpu_clock = (~self._pid << 3) | 2
        try:
            return time.clock_gettime(cpu_clock)
        except OSError:
            return 0.0

    def sample_memory(self) -> None:
        """Update :attr:`peak_memory_bytes` from the cgroup, if there is one, and from ``/proc``.

        Without a cgroup, the value stays unchanged if the process has ended or ``/proc`` does not show it.
        """
        if self._cgroup is not None:
            self.peak_memory_bytes = max(self.peak_memory_bytes, self._cgroup.peak_memory_bytes)
        try:
            with open(f"/proc/{self._pid}/status", "rb") as status:
                for line in status:
                    if line.startswith((b"VmHWM:", b"VmRSS:")):  # VmRSS is for gVisor, which has no VmHWM
                        self.peak_memory_bytes = max(self.peak_memory_bytes, int(line.split()[1]) * 1024)
                        return
        except OSError:
            return


class WorkerProcess:
    """An interpreter that has isolated itself and waits for the code of its only call.

    A worker may be used only in the event loop and the thread of its fork server.

    Attributes:
        stdin: descriptor of the pipe that the worker reads; it must be closed by :meth:`close_stdin`.
        stdout, stderr, result: descriptors of the pipes that the worker writes to.
        handle: pidfd of the worker, readable once the worker has ended.
        usage: CPU time and memory of the worker.
        ended: a future that tells how the worker ended; its result is ``None`` if the fork server ended first.
    """

    usage: ProcessUsage
    stdin: int
    stdout: int
    stderr: int
    result: int
    ended: asyncio.Future[Exit | None]

    def __init__(self, server: ForkServer, scratch_root: scratch.ScratchRoot) -> None:
        self.server = server
        self._root = scratch_root
        self._mount_point = scratch_root.mount_point
        self._scratch: str | None = None
        self._cgroup: Cgroup | None = None
        self._oom_kills_before: int | None = None
        self._fds: set[int] = set()
        self.handle = -1
        self._pid = 0
        self._has_pipes = False

    @classmethod
    async def start(
        cls, server: ForkServer, scratch_root: scratch.ScratchRoot, peers: Sequence[int] = ()
    ) -> WorkerProcess:
        """Fork a worker and wait until it has isolated itself, apart from the system-call filter, its last layer.

        ``peers`` are further descriptors that the worker gets, from number 4 on. Raises WorkerFailed if the worker
        could not be forked, or could not apply a layer of the isolation.
        """
        worker = cls(server, scratch_root)
        try:
            async with asyncio.timeout(START_SECONDS):
                await worker._fork(peers)
        except (OSError, WorkerFailed) as error:
            detail = worker._last_words() or str(error) or f"not ready after {START_SECONDS:g} s"
            await worker.dispose()
            raise WorkerFailed(f"a sandbox worker did not start: {detail}") from error
        except BaseException:
            await worker.dispose()
            raise
        return worker

    @property
    def usable(self) -> bool:
        """Whether the worker runs, and nobody has removed its scratch folder or the mount point of its file system.

        If somebody removes the mount point, the kernel detaches the mount. Code would then run in a folder without a
        path.
        """
        return self.server.alive and os.path.isdir(self._scratch or self._mount_point) and not self._has_ended

    @property
    def has_quota(self) -> bool:
        """Whether the scratch space is a file system of the worker's own, so that the kernel limits it."""
        return self.server.private or self._root.sized

    @property
    def scratch_exceeded(self) -> bool:
        """Whether the scratch folder on the host, if there is one, contains more than the call may store."""
        config = self.server.profile.config
        return self._scratch is not None and scratch.exceeds(self._scratch, config.scratch_bytes, config.scratch_files)

    @property
    def has_left_files(self) -> bool:
        """Whether the scratch folder on the host, if there is one, contains anything or cannot be read."""
        try:
            return self._scratch is not None and bool(os.listdir(self._scratch))
        except OSError:
            return True  # the folder was removed, or is unreadable

    @property
    def out_of_memory(self) -> bool:
        """Whether the kernel may have killed the worker for lack of memory; certain only if a cgroup reports it."""
        exceeded = self._cgroup is not None and self._cgroup.out_of_memory
        return exceeded or self.server.oom_kills.recent(self._oom_kills_before)

    def set_limits(self, limits: Limits, receiving: int) -> None:
        """Set the kernel's limits for the worker's memory and CPU time; in a cgroup, also for its number of threads.

        The limits are set when the worker's call begins. From then on, a kill for lack of memory may be the reason for
        the worker's end (:attr:`out_of_memory`). The executor measures CPU time itself and usually stops the call
        first. The kernel's limit of CPU time, in whole seconds, is a fallback. The worker needs ``receiving`` bytes of
        memory to receive the request. Raises OSError if the kernel refuses, for example because the worker has ended.
        """
        self._oom_kills_before = self.server.oom_kills.count()
        for number, value in (
            (resource.RLIMIT_AS, self.usage.address_space_bytes() + receiving + limits.memory_bytes),
            (resource.RLIMIT_CPU, math.ceil(self.usage.cpu_seconds() + limits.cpu_seconds) + 1),
        ):
            inherited = resource.prlimit(self._pid, number)[1]
            allowed = value if inherited == resource.RLIM_INFINITY else min(value, inherited)
            resource.prlimit(self._pid, number, (allowed, allowed))
        if self._cgroup is not None:
            config = self.server.profile.config
            memory = self.usage.resident_bytes() + receiving + limits.memory_bytes + config.scratch_bytes
            self._cgroup.limit(memory, 1 + config.threads)

    def close_stdin(self) -> None:
        """Tell the worker that no further data follows."""
        if self.stdin in self._fds:
            self._close(self.stdin)

    def kill(self) -> None:
        """Send SIGKILL to the worker, which is the only process of its call. Has no effect after :meth:`dispose`."""
        if self.handle not in self._fds:
            return
        try:
            signal.pidfd_send_signal(self.handle, signal.SIGKILL)
        except ProcessLookupError:
            pass  # the worker has already ended

    async def reap(self) -> Exit:
        """Wait until the worker has ended, and return how it ended.

        Raises WorkerFailed if the fork server ended too, or does not report the end within ``_EXIT_SECONDS``.
        """
        try:
            async with asyncio.timeout(_EXIT_SECONDS):
                ended = await asyncio.shield(self.ended)
        except TimeoutError:
            raise WorkerFailed("the sandbox's fork server does not report the end of a process") from None
        if ended is None:
            raise WorkerFailed("the sandbox's fork server ended during the call")
        return ended

    async def dispose(self) -> None:
        """Kill the worker and wait for its end, close its descriptors and empty its scratch folder. Idempotent."""
        ended = True
        self.kill()
        if self.handle in self._fds and not self._has_ended:
            loop = asyncio.get_running_loop()
            try:
                async with asyncio.timeout(_EXIT_SECONDS):
                    await wait_for_fd(loop.add_reader, loop.remove_reader, self.handle)
            except TimeoutError:
                log.error("a sandbox worker did not end in time and is abandoned", extra={"pid": self._pid})
                ended = False
        for fd in list(self._fds):
            self._close(fd)
        if self._cgroup is not None and self.server.cgroups is not None:
            self.server.cgroups.remove(self._cgroup)
            self._cgroup = None
        if self._scratch is not None and ended:
            folder, self._scratch = self._scratch, None
            await self._root.give_back(folder)

    async def _fork(self, peers: Sequence[int]) -> None:
        if not self.server.private:
            self._scratch = await self._root.take()
        child_stdin, self.stdin = self._pipe()
        self.stdout, child_stdout = self._pipe()
        self.stderr, child_stderr = self._pipe()
        self.result, child_result = self._pipe()
        children = (child_stdin, child_stdout, child_stderr, child_result)
        for fd in (self.stdin, self.stdout, self.stderr, self.result):
            os.set_blocking(fd, False)
        self._has_pipes = True
        # The returned process id should still belong to the worker, because no code runs yet that could end the worker.
        handle, self._pid, self.ended = await self.server.fork(self._scratch or "", [*children, *peers])
        self.handle = self._own(handle)
        for fd in children:
            self._close(fd)
        if self.server.cgroups is not None:
            self._cgroup = self.server.cgroups.make(self._pid)
        self.usage = ProcessUsage(self._pid, self._cgroup)
        if not self.usable:
            raise FileNotFoundError("its scratch folder was removed")

    @property
    def _has_ended(self) -> bool:
        poll = select.poll()
        poll.register(self.handle, select.POLLIN)
        return bool(poll.poll(0))

    def _last_words(self) -> str:
        """The last line that a worker wrote to stderr before it failed to start; empty if there is none."""
        if not self._has_pipes:
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
