"""The fork server: an interpreter that is ready to run code and forks one isolated worker for each call.

The fork server has one thread and an empty environment. It has imported the modules that code usually needs, and never
has data of a call.
"""

import _socket
import gc
import os
import select
import struct

import adaptations
import protocol
import runner
from isolation import Isolation

_SETUP_BYTES, _REQUEST_BYTES = 1 << 20, 1 << 13
_MOST_WORKER_FDS = 8  # maximum number of descriptors that a worker gets


def serve(control_fd: int) -> None:
    """Fork workers on request until the executor closes its end of the socket ``control_fd``."""
    # Close all other descriptors: a launcher may have left some open, with numbers below 1024.
    os.closerange(3, control_fd)
    os.closerange(control_fd + 1, 1024)
    while (free := os.dup(0)) < _MOST_WORKER_FDS:
        pass  # occupies the numbers that workers later give to their pipes, so no other descriptor gets one of them
    os.dup2(control_fd, free)
    os.dup2(0, control_fd)
    control = _socket.socket(fileno=free)
    adaptations.install()
    isolation = Isolation(protocol.unpack(control.recv(_SETUP_BYTES)[4:]))
    runner.warm_up()
    gc.collect()
    gc.freeze()  # otherwise, the collector would write to the pages that workers share, so they would be copied
    ready = protocol.pack([protocol.READY, b"private" if isolation.private else b""])
    control.sendmsg([ready], _rights(isolation.listener) if isolation.listener >= 0 else [])
    workers: dict[int, tuple[bytes, int]] = {}  # for each pidfd, the number and the process id of its worker
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd != control.fileno():
                number, pid = workers.pop(fd)
                poll.unregister(fd)
                os.close(fd)
                _, status, usage = os.wait4(pid, 0)
                cpu = usage.ru_utime + usage.ru_stime
                control.send(protocol.pack([protocol.EXITED, number, b"%d" % status, b"%f" % cpu]))
                continue
            message, ancillary, _, _ = control.recvmsg(_REQUEST_BYTES, _socket.CMSG_SPACE(4 * _MOST_WORKER_FDS))
            if not message:
                os._exit(0)  # the executor has ended or no longer needs this server; its workers end with it
            number, scratch = protocol.unpack(message[4:])
            fds = [fd for _, _, data in ancillary for (fd,) in struct.iter_unpack("i", data)]
            _fork(control, isolation, number, scratch, fds, workers, poll)
            for fd in fds:
                os.close(fd)


def _fork(
    control: _socket.socket,
    isolation: Isolation,
    number: bytes,
    scratch: bytes,
    fds: list[int],
    workers: dict[int, tuple[bytes, int]],
    poll: select.poll,
) -> None:
    started = protocol.pack([protocol.STARTED, number])
    try:
        isolation.prepare(scratch)
        pid = isolation.fork()
    except OSError as error:
        control.send(protocol.pack([protocol.FAILED, number, str(error).encode()]))
        return
    if pid == 0:
        workers.clear()  # a worker needs no data of the other workers
        try:
            _become_worker(control, isolation, started, scratch, fds)
        except BaseException as error:
            os.write(2, f"{error}\n".encode())
        finally:
            os._exit(1)
    pidfd = os.pidfd_open(pid)
    workers[pidfd] = number, pid
    poll.register(pidfd, select.POLLIN)


def _rights(fd: int) -> list[tuple[int, int, bytes]]:
    """Ancillary data that carries a descriptor."""
    return [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack("i", fd))]


def _become_worker(
    control: _socket.socket, isolation: Isolation, started: bytes, scratch: bytes, fds: list[int]
) -> None:
    """Take over the pipes and run one call. Never returns normally."""
    os.setsid()
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
    rights = _rights(os.pidfd_open(os.getpid()))
    isolation.apply(scratch)
    control.sendmsg([started], rights)
    isolation.seal(first_unused=len(fds))
    if not isolation.read_only:
        adaptations.ignore_modes_and_times()
    runner.serve()
