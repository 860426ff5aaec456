"""The system calls that code may make, assembled into a seccomp filter (classic BPF).

The filter is an allow-list: every call that is not named fails. Calls that act on other processes, the network,
credentials, mounts or kernel objects are absent on purpose. Some calls are allowed only with harmless arguments,
because Landlock does not control their other uses. Source: ``seccomp(2)`` and the kernel's
``Documentation/userspace-api/seccomp_filter.rst``.
"""

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

# System calls with this number or a higher one have the same number on all machines. For these calls, the filter
# returns "not implemented". libc then makes an older call instead: for example clone, which is refused, for clone3.
FIRST_UNIFIED_NUMBER = 424


@dataclasses.dataclass(frozen=True)
class Condition:
    """Requires that an argument of a call, after masking, is one of ``values``.

    With ``wide`` the filter compares all 64 bits of the argument, otherwise the low 32.
    """

    argument: int
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF
    wide: bool = False


_F_DUPFD, _F_GETFD, _F_SETFD, _F_GETFL, _F_SETFL, _F_DUPFD_CLOEXEC = 0, 1, 2, 3, 4, 1030
_TCGETS, _TIOCGWINSZ, _FIONREAD, _FIONBIO, _FIONCLEX, _FIOCLEX = 0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451

# Calls that are allowed if all their conditions are true.
CONDITIONAL: dict[str, tuple[Condition, ...]] = {
    # Excluded: F_SETOWN and F_SETSIG, which send signals to other processes, and locks, which could block other calls.
    "fcntl": (Condition(1, (_F_DUPFD, _F_GETFD, _F_SETFD, _F_GETFL, _F_SETFL, _F_DUPFD_CLOEXEC)),),
    # Excluded: FIOSETOWN, and TIOCSTI, which injects input into a terminal.
    "ioctl": (Condition(1, (_TCGETS, _TIOCGWINSZ, _FIONREAD, _FIONBIO, _FIONCLEX, _FIOCLEX)),),
    # Event loops wake themselves through a connected pair of sockets. The pair cannot reach another process.
    "socketpair": (Condition(0, (socket.AF_UNIX,)), Condition(1, (socket.SOCK_STREAM,), mask=0xF)),
    # send() is allowed; sending to an address is not.
    "sendto": (Condition(4, (0,), wide=True),),
    # A process may read its own limits. It can neither set limits nor read those of another process.
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


def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One ``struct sock_filter`` of 8 bytes. A jump distance of 0 means the next instruction."""
    return struct.pack("=HBBI", code, if_true, if_false, value)


def build_filter(machine: Machine) -> bytes:
    """Build the filter for ``machine``: an array of ``struct sock_filter``.

    A call through a foreign ABI (32-bit entry, x32) kills the process. The numbers of such an ABI mean other calls, and
    no library uses it by accident. Every other call that is not allowed fails. The error is ENOSYS for the calls that
    libc replaces by an older call, otherwise EPERM.
    """
    program = [
        instruction(_LOAD_WORD, _ARCH),
        instruction(_EQUAL, machine.audit_arch, if_true=1),
        instruction(_RETURN, KILL_PROCESS),
        instruction(_LOAD_WORD, _NUMBER),
    ]
    if machine.foreign_bit:
        program += [
            instruction(_AT_LEAST, machine.foreign_bit, if_false=1),
            instruction(_RETURN, KILL_PROCESS),
        ]
    for name in sorted(ALLOWED & machine.numbers.keys()):
        program += [
            instruction(_EQUAL, machine.numbers[name], if_false=1),
            instruction(_RETURN, ALLOW),
        ]
    for name, conditions in sorted(CONDITIONAL.items()):
        checks = b"".join(map(_check, conditions)) + instruction(_RETURN, ALLOW)
        program += [instruction(_EQUAL, machine.numbers[name], if_false=len(checks) // 8), checks]
    program += [
        instruction(_AT_LEAST, FIRST_UNIFIED_NUMBER, if_false=1),
        instruction(_RETURN, UNKNOWN),
        instruction(_RETURN, REFUSE),
    ]
    return b"".join(program)


def _check(condition: Condition) -> bytes:
    """Instructions that refuse the call if ``condition`` is false, and continue after the last of them otherwise."""
    low = _ARGUMENTS + 8 * condition.argument  # both machines are little-endian
    code = []
    if condition.wide:
        (value,) = condition.values
        code += [
            instruction(_LOAD_WORD, low + 4),
            instruction(_EQUAL, value >> 32, if_true=1),
            instruction(_RETURN, REFUSE),
        ]
    code.append(instruction(_LOAD_WORD, low))
    if condition.mask != 0xFFFFFFFF:
        code.append(instruction(_AND, condition.mask))
    for index, value in enumerate(condition.values):
        remaining = len(condition.values) - index - 1
        code.append(instruction(_EQUAL, value & 0xFFFFFFFF, if_true=remaining + 1))
    code.append(instruction(_RETURN, REFUSE))
    return b"".join(code)
