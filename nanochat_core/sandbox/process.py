"""One worker process from its start to its reaping: started ahead, used for one call, killed."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
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
from nanochat_core.sandbox.capture import Capture, decode
from nanochat_core.sandbox.errors import WorkerFailed
from nanochat_core.sandbox.profiles import Profile
from nanochat_core.sandbox.results import Limits, ResultFormat, Usage
from nanochat_core.sandbox.worker import protocol

log = logging.getLogger("nanochat.sandbox")

_START_SECONDS = 20.0
_WATCH_SECONDS = 0.05
_LAUNCHER_SECONDS = 1.0
_REAP_SECONDS = 10.0
_RECEIVING_BYTES = 4 << 20
_PAGE_BYTES = resource.getpagesize()
# Assumed where /proc hides the size of a worker.
_INTERPRETER_BYTES = 64 << 20


class Cause(enum.Enum):
    """Why a call ended as the executor saw it; the code cannot forge any of these."""

    CLAIMED = enum.auto()
    EXITED = enum.auto()
    WALL = enum.auto()
    CPU = enum.auto()
    OUTPUT = enum.auto()
    SCRATCH = enum.auto()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run left behind, not judged yet.

    Attributes:
        exit_code: of the process; 128 + number for a signal. Says nothing unless the cause is EXITED.
        claim: how the code claims to have ended (kind, error, result), or ``None``.
        claim_stream: the pipe of the claim, for its overflow.
    """

    cause: Cause
    exit_code: int
    claim: tuple[bytes, bytes, bytes] | None
    claim_stream: Capture
    stdout: Capture
    stderr: Capture
    usage: Usage


class WorkerProcess:
    """An interpreter that is isolated and waits for the code of its only call.

    Belongs to the event loop, and to the thread, that started it: the kernel kills it when that thread ends.
    """

    def __init__(self, profile: Profile, scratch_root: scratch.ScratchRoot | None) -> None:
        self._profile = profile
        self._scratch = scratch_root.new() if scratch_root and profile.host_scratch else None
        self._fds: set[int] = set()
        self._launcher: subprocess.Popen[bytes] | None = None
        self._launcher_handle = -1  # pidfd of the process that was started
        self._handle = -1  # pidfd of the worker itself, the same unless a launcher is in between
        self._pid = 0
        self._exit: tuple[int, float] | None = None  # exit code and CPU seconds, once reaped
        self._peak_bytes = 0

    @classmethod
    async def start(cls, profile: Profile, scratch_root: scratch.ScratchRoot | None) -> WorkerProcess:
        """Start a worker and wait until it has isolated itself.

        Raises:
            WorkerFailed: it could not be started, or a layer of the isolation could not be applied.
        """
        try:
            worker = cls(profile, scratch_root)
        except OSError as error:
            raise WorkerFailed(f"a sandbox worker did not start: {error}") from error
        try:
            async with asyncio.timeout(_START_SECONDS):
                worker._launch()
                await worker._send(profile.setup)
                await worker._until_ready()
        except OSError as error:
            detail = worker._last_words() or str(error) or f"not ready after {_START_SECONDS:g} s"
            await worker.dispose()
            raise WorkerFailed(f"a sandbox worker did not start: {detail}") from error
        except BaseException:
            await worker.dispose()
            raise
        return worker

    @property
    def alive(self) -> bool:
        poll = select.poll()
        poll.register(self._launcher_handle, select.POLLIN)
        return not poll.poll(0)

    async def run(self, code: bytes, limits: Limits, result_format: ResultFormat) -> Outcome:
        """Run the worker's one call and end the worker.

        Raises:
            WorkerFailed: the worker ended before the code began.
        """
        stdout = Capture("stdout", self._stdout, limits.output_bytes)
        stderr = Capture("stderr", self._stderr, limits.output_bytes)
        claim_stream = Capture("result", self._result, limits.output_bytes + protocol.CLAIM_OVERHEAD + 1)
        # What it takes to receive the request is not the code's memory.
        receiving = 8 * len(code) + _RECEIVING_BYTES
        fields = [result_format.value.encode(), b"%d" % limits.output_bytes, code]
        try:
            self._limit(limits, receiving)
            async with asyncio.timeout(_START_SECONDS):
                await self._send(protocol.pack(fields))
        except OSError as error:
            raise WorkerFailed(f"a sandbox worker did not take its call: {error or 'it hangs'}") from error
        self._close(self._stdin)
        started, cpu_before = time.monotonic(), self._cpu_seconds()
        cause = await self._watch((stdout, stderr, claim_stream), limits, cpu_before)
        wall = time.monotonic() - started
        self._sample_memory()
        cpu_after = self._cpu_seconds()
        self._kill()
        exit_code, cpu_total = await self._reap()
        for stream in (stdout, stderr, claim_stream):
            stream.read_available()
        if not claim_stream.data.startswith(protocol.BEGUN):
            detail = _last_line(stderr.data) or f"exit code {exit_code}"
            raise WorkerFailed(f"a sandbox worker ended before the code began: {detail}")
        return Outcome(
            cause=cause,
            exit_code=exit_code,
            claim=_claim(claim_stream),
            claim_stream=claim_stream,
            stdout=stdout,
            stderr=stderr,
            usage=Usage(wall, max(0.0, (cpu_after or cpu_total) - cpu_before), self._peak_bytes),
        )

    async def dispose(self) -> None:
        """End the worker if it lives, reap it, close its descriptors, remove its scratch folder. Idempotent."""
        if self._launcher is not None:
            patience = _LAUNCHER_SECONDS
            if self._handle >= 0:
                self._kill()
            elif self._stdin in self._fds:
                # Not ready yet. A launcher that is killed while it sets up leaves its child behind, waiting for ever;
                # but a worker without anyone to send it work ends by itself.
                self._close(self._stdin)
                patience = _START_SECONDS
            try:
                await self._reap(patience)
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
        self._stdout, child_stdout = self._pipe()
        self._stderr, child_stderr = self._pipe()
        self._result, child_result = self._pipe()
        self._status, child_status = self._pipe()
        children = (child_stdin, child_stdout, child_stderr, child_result, child_status)
        process = subprocess.Popen(  # noqa: S603 - the command is ours
            self._profile.command(child_result, child_status),
            env={},
            cwd=self._scratch or "/",
            stdin=child_stdin,
            stdout=child_stdout,
            stderr=child_stderr,
            pass_fds=(child_result, child_status),
            start_new_session=True,
        )
        try:
            self._launcher_handle = self._own(os.pidfd_open(process.pid))
        except OSError:
            process.kill()
            process.wait()
            raise
        self._launcher = process
        for fd in children:
            self._close(fd)
        for fd in (self._stdin, self._stdout, self._stderr, self._result, self._status):
            os.set_blocking(fd, False)

    async def _until_ready(self) -> None:
        loop = asyncio.get_running_loop()
        await _until(loop.add_reader, loop.remove_reader, self._result)
        if os.read(self._result, 1) != protocol.READY:
            raise OSError("it ended at once")
        assert self._launcher is not None
        self._pid = self._launcher.pid
        try:
            status = os.read(self._status, 4096)
        except BlockingIOError:
            status = b""
        if status:
            self._pid = int(json.loads(status.splitlines()[0])["child-pid"])
        # Opened before the code can end the worker, so the number cannot have passed to another process.
        self._handle = self._own(os.pidfd_open(self._pid))

    def _last_words(self) -> str:
        """The last line that a worker which failed to start wrote, if it came so far."""
        if self._launcher is None:
            return ""
        stderr = Capture("stderr", self._stderr, 1 << 16)
        stderr.read_available()
        return _last_line(stderr.data)

    async def _send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._stdin, rest) :]
            except BlockingIOError:
                loop = asyncio.get_running_loop()
                await _until(loop.add_writer, loop.remove_writer, self._stdin)

    async def _watch(self, streams: tuple[Capture, ...], limits: Limits, cpu_before: float) -> Cause:
        """Drain the pipes until the call ends or hits a limit."""
        loop = asyncio.get_running_loop()
        end: asyncio.Future[Cause] = loop.create_future()
        claim_stream = streams[-1]

        def ended(cause: Cause) -> None:
            if not end.done():
                end.set_result(cause)

        def drain(stream: Capture) -> None:
            stream.read_available()
            if stream.overflow:
                ended(Cause.OUTPUT)
            elif stream.closed and stream is claim_stream and _claim(stream):
                ended(Cause.CLAIMED)
            if stream.overflow or stream.closed:
                loop.remove_reader(stream.fd)

        async def check_usage() -> None:
            interval = min(_WATCH_SECONDS, limits.cpu_seconds)
            while not end.done():
                await asyncio.sleep(interval)
                self._sample_memory()
                if self._cpu_seconds() - cpu_before >= limits.cpu_seconds:
                    ended(Cause.CPU)
                elif self._scratch_exceeded():
                    ended(Cause.SCRATCH)

        deadline = loop.call_later(limits.wall_seconds, ended, Cause.WALL)
        checking = loop.create_task(check_usage())
        loop.add_reader(self._launcher_handle, ended, Cause.EXITED)
        for stream in streams:
            loop.add_reader(stream.fd, drain, stream)
        try:
            return await end
        finally:
            deadline.cancel()
            checking.cancel()
            for fd in (self._launcher_handle, *(stream.fd for stream in streams)):
                loop.remove_reader(fd)

    def _kill(self) -> None:
        """SIGKILL to the worker: the leader of its session, the only process in it, and in bubblewrap the first of its
        process namespace, so that nothing could outlive it. A launcher ends by itself then, after reaping it."""
        if self._exit is None:
            try:
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)
            except ProcessLookupError:
                pass  # ended on its own

    async def _reap(self, patience: float = _LAUNCHER_SECONDS) -> tuple[int, float]:
        """Wait until the process is gone, after ``patience`` seconds by force.

        Returns:
            its exit code (128 + number for a signal) and CPU seconds.
        """
        if self._exit is not None:
            return self._exit
        assert self._launcher is not None
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(patience):
                await _until(loop.add_reader, loop.remove_reader, self._launcher_handle)
        except TimeoutError:
            log.warning("a sandbox launcher did not end by itself", extra={"pid": self._launcher.pid})
            signal.pidfd_send_signal(self._launcher_handle, signal.SIGKILL)
            try:
                async with asyncio.timeout(_REAP_SECONDS):
                    await _until(loop.add_reader, loop.remove_reader, self._launcher_handle)
            except TimeoutError:
                raise WorkerFailed(f"process {self._launcher.pid} of the sandbox cannot be killed") from None
        _, status, usage = os.wait4(self._launcher.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        self._launcher.returncode = code  # tells subprocess that there is nothing left to wait for
        self._exit = (128 - code if code < 0 else code, usage.ru_utime + usage.ru_stime)
        return self._exit

    def _limit(self, limits: Limits, receiving: int) -> None:
        """Have the kernel bound the worker's memory and, behind the executor's own finer clock, its CPU time."""
        for number, value in (
            (resource.RLIMIT_AS, self._address_space() + receiving + limits.memory_bytes),
            (resource.RLIMIT_CPU, math.ceil(self._cpu_seconds() + limits.cpu_seconds) + 1),
        ):
            inherited = resource.prlimit(self._pid, number)[1]
            allowed = value if inherited == resource.RLIM_INFINITY else min(value, inherited)
            resource.prlimit(self._pid, number, (allowed, allowed))

    def _address_space(self) -> int:
        try:
            with open(f"/proc/{self._pid}/statm", "rb") as statm:
                return int(statm.read().split()[0]) * _PAGE_BYTES
        except OSError:
            return _INTERPRETER_BYTES

    def _cpu_seconds(self) -> float:
        """CPU time of the worker so far; 0 once it is gone."""
        cpu_clock_of_process = (~self._pid << 3) | 2
        try:
            return time.clock_gettime(cpu_clock_of_process)
        except OSError:
            return 0.0

    def _scratch_exceeded(self) -> bool:
        config = self._profile.config
        return self._scratch is not None and scratch.exceeds(self._scratch, config.scratch_bytes, config.scratch_files)

    def _sample_memory(self) -> None:
        try:
            with open(f"/proc/{self._pid}/status", "rb") as status:
                for line in status:
                    if line.startswith(b"VmHWM:"):
                        self._peak_bytes = max(self._peak_bytes, int(line.split()[1]) * 1024)
                        return
        except OSError:
            return  # gone, or hidden

    def _pipe(self) -> tuple[int, int]:
        read, write = os.pipe()
        return self._own(read), self._own(write)

    def _own(self, fd: int) -> int:
        self._fds.add(fd)
        return fd

    def _close(self, fd: int) -> None:
        self._fds.discard(fd)
        os.close(fd)


async def _until(add: Callable[..., object], remove: Callable[[int], object], fd: int) -> None:
    """Wait until ``fd`` is ready in the sense of ``add``, a loop's ``add_reader`` or ``add_writer``."""
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def set_ready() -> None:
        if not ready.done():
            ready.set_result(None)

    add(fd, set_ready)
    try:
        await ready
    finally:
        remove(fd)


def _claim(stream: Capture) -> tuple[bytes, bytes, bytes] | None:
    return protocol.unpack_claim(stream.data[len(protocol.BEGUN) :])


def _last_line(data: bytes) -> str:
    return next((line.strip() for line in reversed(decode(data).splitlines()) if line.strip()), "")
