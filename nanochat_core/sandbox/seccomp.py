"""The system calls that code may make, assembled into a seccomp filter (classic BPF).

An allow-list: what is not named fails. Calls that act on other processes, the network, credentials, mounts or
kernel objects are absent on purpose. Some calls pass only with harmless arguments, because Landlock does not cover
what they could do otherwise. See seccomp(2) and the kernel's ``Documentation/userspace-api/seccomp_filter.rst``.
"""

from __future__ import annotations

import dataclasses
import errno
import socket
import struct

from nanochat_core.sandbox.syscalls import Machine

FILES = """
    read write readv writev pread64 pwrite64 preadv pwritev lseek open openat close close_range
    stat lstat fstat newfstatat statx access faccessat faccessat2 readlink readlinkat getdents getdents64
    getcwd chdir fchdir mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2
    ftruncate fallocate fadvise64 fsync fdatasync umask sendfile copy_file_range dup dup2 dup3 pipe pipe2
"""
WAITING = """
    poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2
    recvfrom shutdown
"""
MEMORY = "brk mmap munmap mremap mprotect madvise"
TIME = "clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times getitimer setitimer alarm"
OWN_PROCESS = """
    getpid getppid gettid getuid geteuid getgid getegid getgroups getpgid getpgrp getsid getresuid getresgid
    uname sysinfo getrusage getcpu sched_yield sched_getaffinity getrlimit
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigsuspend rt_sigtimedwait sigaltstack pause
    restart_syscall futex set_robust_list set_tid_address rseq membarrier exit exit_group getrandom
"""
ALLOWED = frozenset(" ".join((FILES, WAITING, MEMORY, TIME, OWN_PROCESS)).split())

# Calls above this number came after the two machines' tables were unified. "Not implemented" is an answer that libc
# knows for them: clone3 falls back to clone, which is then refused.
FIRST_UNIFIED_NUMBER = 424


@dataclasses.dataclass(frozen=True)
class Condition:
    """One argument of a call, masked, is one of ``values``. ``wide`` compares 64 bits, otherwise the low 32."""

    argument: int
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF
    wide: bool = False


_F_DUPFD, _F_GETFD, _F_SETFD, _F_GETFL, _F_SETFL, _F_DUPFD_CLOEXEC = 0, 1, 2, 3, 4, 1030
_TCGETS, _TIOCGWINSZ, _FIONREAD, _FIONBIO, _FIONCLEX, _FIOCLEX = 0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451

# All conditions of a call must hold.
CONDITIONAL: dict[str, tuple[Condition, ...]] = {
    # Not F_SETOWN or F_SETSIG, which send signals to other processes, nor locks that another call could wait for.
    "fcntl": (Condition(1, (_F_DUPFD, _F_GETFD, _F_SETFD, _F_GETFL, _F_SETFL, _F_DUPFD_CLOEXEC)),),
    # Not FIOSETOWN or terminal input injection.
    "ioctl": (Condition(1, (_TCGETS, _TIOCGWINSZ, _FIONREAD, _FIONBIO, _FIONCLEX, _FIOCLEX)),),
    # A connected stream pair inside the process, which event loops wake themselves with. It can reach nobody else.
    "socketpair": (Condition(0, (socket.AF_UNIX,)), Condition(1, (socket.SOCK_STREAM,), mask=0xF)),
    # send(), never with an address.
    "sendto": (Condition(4, (0,), wide=True),),
    # Reading the own limits; never another process's and never setting any.
    "prlimit64": (Condition(0, (0,)), Condition(2, (0,), wide=True)),
}

_LOAD_WORD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_AND = 0x54  # BPF_ALU | BPF_AND | BPF_K
_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_AT_LEAST = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K

KILL_PROCESS = 0x80000000
ALLOW = 0x7FFF0000
_ERRNO = 0x00050000
REFUSE = _ERRNO | errno.EPERM
UNKNOWN = _ERRNO | errno.ENOSYS

# Offsets in struct seccomp_data.
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One ``struct sock_filter``; jumps are relative to the next instruction."""
    return struct.pack("=HBBI", code, if_true, if_false, value)


def build_filter(machine: Machine) -> bytes:
    """The filter for ``machine``: an array of ``struct sock_filter``.

    A call through a foreign ABI (32-bit entry, x32) kills the process: no library does that by accident, and the
    numbers mean other calls there. Everything else that is not allowed fails with EPERM, or with ENOSYS where libc
    expects that a kernel may lack the call.
    """
    program = [
        _instruction(_LOAD_WORD, _ARCH),
        _instruction(_EQUAL, machine.audit_arch, if_true=1),
        _instruction(_RETURN, KILL_PROCESS),
        _instruction(_LOAD_WORD, _NUMBER),
    ]
    if machine.foreign_bit:
        program += [
            _instruction(_AT_LEAST, machine.foreign_bit, if_false=1),
            _instruction(_RETURN, KILL_PROCESS),
        ]
    for name in sorted(ALLOWED & machine.numbers.keys()):
        program += [
            _instruction(_EQUAL, machine.numbers[name], if_false=1),
            _instruction(_RETURN, ALLOW),
        ]
    for name, conditions in sorted(CONDITIONAL.items()):
        checks = b"".join(map(_check, conditions)) + _instruction(_RETURN, ALLOW)
        program += [_instruction(_EQUAL, machine.numbers[name], if_false=len(checks) // 8), checks]
    program += [
        _instruction(_AT_LEAST, FIRST_UNIFIED_NUMBER, if_false=1),
        _instruction(_RETURN, UNKNOWN),
        _instruction(_RETURN, REFUSE),
    ]
    return b"".join(program)


def _check(condition: Condition) -> bytes:
    """Instructions that fall through when ``condition`` holds and refuse the call otherwise."""
    low = _ARGUMENTS + 8 * condition.argument  # both machines are little-endian
    code = []
    if condition.wide:
        (value,) = condition.values
        code += [
            _instruction(_LOAD_WORD, low + 4),
            _instruction(_EQUAL, value >> 32, if_true=1),
            _instruction(_RETURN, REFUSE),
        ]
    code.append(_instruction(_LOAD_WORD, low))
    if condition.mask != 0xFFFFFFFF:
        code.append(_instruction(_AND, condition.mask))
    for index, value in enumerate(condition.values):
        remaining = len(condition.values) - index - 1
        code.append(_instruction(_EQUAL, value & 0xFFFFFFFF, if_true=remaining + 1))
    code.append(_instruction(_RETURN, REFUSE))
    return b"".join(code)
