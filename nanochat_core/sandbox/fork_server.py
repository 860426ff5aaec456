"""The executor's side of a fork server: starts the server, asks it to fork workers, and reads how they ended."""

from __future__ import annotations

import array
import asyncio
import contextlib
import dataclasses
import logging
import math
import os
import signal
import socket
import subprocess
import time

from nanochat_core.sandbox.capture import Capture, last_line
from nanochat_core.sandbox.cgroups import Cgroups
from nanochat_core.sandbox.fds import wait_for_fd
from nanochat_core.sandbox.interface import WorkerFailed
from nanochat_core.sandbox.profiles import Profile
from nanochat_core.sandbox.scratch import ScratchRoot
from nanochat_core.sandbox.threads import ThreadRequests
from nanochat_core.sandbox.worker import protocol

log = logging.getLogger("nanochat.sandbox")

START_SECONDS = 20.0  # a worker must start within this time, and later begin the code of its call within this time
# A fork server must start within this time. The time is longer than a worker's, because a fork server also imports
# packages, perhaps from a busy disk.
_SERVER_START_SECONDS = 60.0
_EXIT_SECONDS = 1.0
# Longest wait until all processes have closed the standard error of a server that has ended.
_LAST_WORDS_SECONDS = 0.2
# After the executor has noticed that the kernel killed a process for lack of memory, the kill counts as recent for this
# long. The time is not shorter, because the kernel may kill several processes at once, and the executor then determines
# the results of their calls one after the other.
_OOM_SECONDS = 5.0
_MESSAGE_BYTES = 1 << 16
_SEND_BUFFER_BYTES = 1 << 20
# Space in a message for a descriptor, and for the process id, user and group of the sender.
_ANCILLARY_BYTES = socket.CMSG_SPACE(4) + socket.CMSG_SPACE(12)


class OomKills:
    """Tells, from a counter of the kernel, whether the kernel has recently killed a process for lack of memory.

    The kernel has one counter for the whole machine, so a process outside of the sandbox that was killed counts, too.
    The counter has no times: a kill counts as recent from the first reading of the counter after it.
    """

    def __init__(self) -> None:
        self._count = _oom_kills()
        self._changed = -math.inf

    def count(self) -> int | None:
        """Read the counter. Returns ``None`` if the kernel has no counter."""
        count = _oom_kills()
        if count != self._count:
            self._count, self._changed = count, time.monotonic()
        return count

    def recent(self, earlier: int | None) -> bool:
        """Whether a kill has happened after the counter was ``earlier``, and was noticed in the last ``_OOM_SECONDS``.

        Also True if the kernel has no counter.
        """
        count = self.count()
        return count is None or (count != earlier and time.monotonic() - self._changed < _OOM_SECONDS)


def _oom_kills() -> int | None:
    try:
        with open("/proc/vmstat") as counters:
            return next((int(line.split()[1]) for line in counters if line.startswith("oom_kill ")), None)
    except OSError:
        return None


@dataclasses.dataclass(frozen=True)
class Exit:
    """How a worker ended: the kernel's wait status and all CPU seconds of the process."""

    wait_status: int
    cpu_seconds: float

    @property
    def signal(self) -> int:
        """Number of the signal that ended the process; 0 if it exited."""
        return os.WTERMSIG(self.wait_status) if os.WIFSIGNALED(self.wait_status) else 0

    @property
    def code(self) -> int:
        """Exit code of a process that exited."""
        return os.waitstatus_to_exitcode(self.wait_status)


class ServerLate(WorkerFailed):
    """A fork server was not ready within ``_SERVER_START_SECONDS``."""


class ForkServer:
    """A running fork server. It may be used only in the event loop and the thread that started it.

    The kernel kills the server when that thread ends, and the workers when the server ends. The executor watches two
    signs of the server's end, and the first one counts: its process has ended, or its socket is closed. Each sign may
    be late: a child of a killed process may keep the socket open for a while, and a launcher (bubblewrap) ends later
    than its server.

    Attributes:
        private: whether each worker has its own scratch file system. Otherwise, each worker needs a scratch folder on
            the host.
        pid: process id of the server or of its launcher.
        forks: number of workers that the server was asked to fork.
        thread_requests: the workers' requests to start threads; ``None`` if they cannot have threads.
        oom_kills: tells whether a process of the machine was recently killed for lack of memory.
        cgroups: makes the cgroups of workers; ``None`` if they have none.
    """

    def __init__(self, profile: Profile, control: socket.socket, process: subprocess.Popen[bytes], stderr: int) -> None:
        self.profile = profile
        self.private = False
        self.alive = True
        self.forks = 0
        self.pid = process.pid
        self._control, self._process, self._stderr = control, process, stderr
        self._handle = os.pidfd_open(process.pid)
        self._starting: dict[int, asyncio.Future[tuple[int, int]]] = {}
        self._running: dict[int, asyncio.Future[Exit | None]] = {}
        self._closing: asyncio.Task[None] | None = None
        self._retired = False
        self.thread_requests: ThreadRequests | None = None
        self.oom_kills = OomKills()
        self.cgroups: Cgroups | None = None

    @classmethod
    async def start(cls, profile: Profile, scratch: ScratchRoot) -> ForkServer:
        """Start a server and wait until it can fork.

        Workers that cannot mount file systems use the folders of ``scratch``.

        Raises WorkerFailed if the server cannot be started or ends before it can fork, and ServerLate if it takes too
        long.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        ours.setblocking(False)
        errors, child_errors = os.pipe()
        closed, unused = os.pipe()
        os.close(unused)
        try:
            process = subprocess.Popen(  # noqa: S603 - the command comes from the profile
                profile.command(theirs.fileno()),
                # The server looks up the functions of its libraries when it starts, so that workers need not.
                env={"LD_BIND_NOW": "1"},
                cwd="/",
                stdin=closed,
                stdout=child_errors,
                stderr=child_errors,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
            server = cls(profile, ours, process, errors)
        except OSError as error:
            ours.close()
            os.close(errors)
            raise WorkerFailed(f"the sandbox's fork server did not start: {error}") from error
        finally:
            theirs.close()
            os.close(closed)
            os.close(child_errors)
        os.set_blocking(errors, False)
        try:
            async with asyncio.timeout(_SERVER_START_SECONDS):
                ours.send(profile.setup(scratch))
                loop = asyncio.get_running_loop()
                await wait_for_fd(loop.add_reader, loop.remove_reader, ours.fileno(), server._handle)
                answer, listener = b"", -1
                with contextlib.suppress(BlockingIOError):  # the process has ended and left the socket open
                    answer, listener, _ = _receive(ours)
            ready, private = protocol.unpack(answer[4:]) if answer else (b"", b"")
            if ready != protocol.READY:
                raise OSError("it ended at once")
        except OSError as error:
            try:
                detail = await server._last_words() or str(error) or f"not ready after {_SERVER_START_SECONDS:g} s"
            finally:
                await asyncio.shield(server.close())
            kind = ServerLate if isinstance(error, TimeoutError) else WorkerFailed
            raise kind(f"the sandbox's fork server did not start: {detail}") from error
        except BaseException:
            await asyncio.shield(server.close())
            raise
        server.private = bool(private)
        if listener >= 0:
            server.thread_requests = ThreadRequests(listener, profile.config.threads)
            loop.add_reader(listener, server._answer_thread_request)
        loop.add_reader(ours.fileno(), server._receive)
        loop.add_reader(server._handle, server._process_ended)
        return server

    async def fork(self, scratch: str, fds: list[int]) -> tuple[int, int, asyncio.Future[Exit | None]]:
        """Fork a worker with the scratch folder ``scratch``. The worker gets ``fds`` as descriptors 0, 1, 2 and so on.

        Returns a pidfd, the worker's process id, and a future with the worker's :class:`Exit`. The caller must close
        the pidfd. The future's result is ``None`` if the server ended first. Raises WorkerFailed if the server cannot
        fork, or if the worker ends before it has started.
        """
        if not self.alive:
            raise WorkerFailed("the sandbox's fork server has ended")
        self.forks += 1
        number, loop = self.forks, asyncio.get_running_loop()
        started: asyncio.Future[tuple[int, int]] = loop.create_future()
        ended: asyncio.Future[Exit | None] = loop.create_future()
        self._starting[number], self._running[number] = started, ended
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        message = protocol.pack([b"%d" % number, os.fsencode(scratch)])
        try:
            # The socket's buffer has room for far more requests than there are calls, so the buffer is never full.
            self._control.sendmsg([message], rights)
            handle, pid = await asyncio.shield(started)
            return handle, pid, ended
        except OSError as error:
            self._fail(f"its socket failed: {error}")
            raise WorkerFailed("the sandbox's fork server has ended") from error
        except asyncio.CancelledError:
            # The caller no longer wants the worker, so the worker's pidfd is closed as soon as it arrives. The worker
            # ends by itself when its pipes are closed.
            started.add_done_callback(_close_result)
            raise

    @property
    def closed(self) -> bool:
        """Whether the server has ended and has nothing left to clean up."""
        return self._closing is not None and self._closing.done()

    def retire(self) -> None:
        """Close the server as soon as its last worker has ended."""
        self._retired = True
        self._close_if_idle()

    async def close(self) -> None:
        """End the server and, with it, its workers. Idempotent."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._fail("it was closed")
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_EXIT_SECONDS):
                await wait_for_fd(loop.add_reader, loop.remove_reader, self._handle)
        except TimeoutError:
            log.warning("a sandbox fork server did not end by itself", extra={"pid": self.pid})
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)
            await wait_for_fd(loop.add_reader, loop.remove_reader, self._handle)
        # The whole process group is killed, because a launcher that was killed while it started its server may have
        # left a child that waits for ever.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._handle)
        os.close(self._stderr)

    async def _report_and_close(self) -> None:
        log.error("a sandbox fork server ended", extra={"pid": self.pid, "error": await self._last_words()})
        await self._close()

    def _close_if_idle(self) -> None:
        if self._retired and not self._running and self._closing is None:
            self._closing = asyncio.create_task(self._close())

    def _fail(self, reason: str) -> None:
        """Stop using the server. Its unfinished forks fail, and its workers count as lost."""
        if not self.alive:
            return
        self.alive = False
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._handle)
        loop.remove_reader(self._control.fileno())
        self._control.close()
        if self.thread_requests is not None:
            loop.remove_reader(self.thread_requests.fd)
            os.close(self.thread_requests.fd)
        for waiting in self._starting.values():
            if not waiting.done():
                waiting.set_exception(WorkerFailed(f"the sandbox's fork server cannot fork: {reason}"))
                waiting.exception()  # marks the exception as read, so asyncio does not log it if nobody waits
        for ended in self._running.values():
            if not ended.done():
                ended.set_result(None)
        self._starting.clear()
        self._running.clear()

    def _answer_thread_request(self) -> None:
        assert self.thread_requests is not None
        if not self.thread_requests.answer():
            asyncio.get_running_loop().remove_reader(self.thread_requests.fd)

    def _receive(self) -> None:
        while self.alive:
            try:
                message, fd, sender = _receive(self._control)
            except BlockingIOError:
                return
            except OSError:  # the server was killed
                message = b""
            if not message:
                self._server_ended()
                return
            kind, number_text, *facts = protocol.unpack(message[4:])
            number = int(number_text)
            if kind == protocol.STARTED:
                started = self._starting.pop(number)
                if fd >= 0:
                    started.set_result((fd, sender))
                else:
                    started.set_exception(WorkerFailed("there are too many open files to run a sandbox worker"))
                    started.exception()
            elif kind == protocol.FAILED:
                self._running.pop(number)
                failed = self._starting.pop(number)
                failed.set_exception(WorkerFailed(f"the sandbox cannot fork a worker: {facts[0].decode()}"))
                failed.exception()
                self._close_if_idle()
            else:
                unborn = self._starting.pop(number, None)
                if unborn is not None:
                    unborn.set_exception(WorkerFailed("a sandbox worker ended at once"))
                    unborn.exception()
                self._running.pop(number).set_result(Exit(int(facts[0]), float(facts[1])))
                self._close_if_idle()

    def _process_ended(self) -> None:
        """Handle the messages that the server's process sent before its end, and then the end itself."""
        self._receive()
        self._server_ended()

    def _server_ended(self) -> None:
        self._fail("it ended")
        self._closing = self._closing or asyncio.create_task(self._report_and_close())

    async def _last_words(self) -> str:
        """The last line that the server wrote before it ended; empty if there is none."""
        words = Capture("stderr", self._stderr, 1 << 16)
        loop = asyncio.get_running_loop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_SECONDS):
                while not (words.closed or words.overflow):
                    await wait_for_fd(loop.add_reader, loop.remove_reader, self._stderr)
                    words.read_available()
        return last_line(words.data)


def _receive(control: socket.socket) -> tuple[bytes, int, int]:
    """Return a message, its descriptor (-1 if it has none) and the process id of its sender."""
    message, ancillary, _, _ = control.recvmsg(_MESSAGE_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
    parts = {part: array.array("i", data)[0] for _, part, data in ancillary}
    return message, parts.get(socket.SCM_RIGHTS, -1), parts.get(socket.SCM_CREDENTIALS, 0)


def _close_result(started: asyncio.Future[tuple[int, int]]) -> None:
    with contextlib.suppress(WorkerFailed, asyncio.CancelledError):
        os.close(started.result()[0])
