"""Decides whether a worker may start a thread.

A system-call filter of the fork server and its workers leaves this decision to the executor, because no resource limit
(``setrlimit``) counts the threads of one process. Source: ``seccomp_unotify(2)``.
"""

import errno
import fcntl
import select
import struct

# struct seccomp_notif: id, id of the thread that asks, flags, and the system call with its arguments.
_REQUEST = struct.Struct("=QII64x")
# struct seccomp_notif_resp: id, value, error, flags.
_ANSWER = struct.Struct("=QqiI")
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_CONTINUE = 1


class ThreadRequests:
    """Answers the requests of a fork server's workers to start threads. The requests arrive at the filter's descriptor.

    The executor counts the threads of a worker before it allows a new thread. If several threads are started at the
    same moment, their number can therefore exceed the limit, but it is at most twice the limit.
    """

    def __init__(self, fd: int, limit: int) -> None:
        """``fd`` is the filter's descriptor. A worker may have ``limit`` threads beside its main thread."""
        self.fd, self._limit = fd, limit

    def answer(self) -> bool:
        """Answer the next request, if there is one. Returns whether further requests can come."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        events = poll.poll(0)
        if not events:
            return True
        if not events[0][1] & select.POLLIN:
            return False  # the server and its workers have ended
        request = bytearray(_REQUEST.size)
        try:
            fcntl.ioctl(self.fd, _RECEIVE, request)
            number, thread, _ = _REQUEST.unpack(request)
            allowed = _count(thread) <= self._limit
            error, flags = (0, _CONTINUE) if allowed else (-errno.EAGAIN, 0)
            fcntl.ioctl(self.fd, _SEND, _ANSWER.pack(number, 0, error, flags))
        except FileNotFoundError:
            pass  # the thread that asked was killed
        return True


def _count(thread: int) -> float:
    """How many threads the process of ``thread`` has; infinity if the kernel does not show the number."""
    try:
        with open(f"/proc/{thread}/status", "rb") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(b"Threads:"))
    except (OSError, StopIteration):
        return float("inf")
