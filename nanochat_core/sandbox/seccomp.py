"""The system calls that code may make, assembled into a seccomp filter (classic BPF).

The filter is an allow-list: every system call that is not in the list fails. System calls that act on other processes,
the network, credentials, mounts or kernel objects are absent on purpose. Some system calls are allowed only with
harmless arguments, because Landlock does not control their effects with other arguments. Source: ``seccomp(2)`` and the
kernel's ``Documentation/userspace-api/seccomp_filter.rst``.
"""

import dataclasses
import errno
import platform
import socket
import struct

# The system calls that code may make. Each name is followed by its number on x86_64 and on aarch64. "-" means that the
# machine has no such call. Source: ``arch/x86/entry/syscalls/syscall_64.tbl`` and ``include/uapi/asm-generic/unistd.h``
# of the kernel.
FILES = """
    read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 preadv:295:69 pwritev:296:70
    lseek:8:62 open:2:- openat:257:56 close:3:57 close_range:436:436 stat:4:- lstat:6:- fstat:5:80
    newfstatat:262:79 statx:332:291 access:21:- faccessat:269:48 faccessat2:439:439 readlink:89:-
    readlinkat:267:78 getdents:78:- getdents64:217:61 getcwd:79:17 chdir:80:49 fchdir:81:50 mkdir:83:-
    mkdirat:258:34 rmdir:84:- unlink:87:- unlinkat:263:35 rename:82:- renameat:264:38 renameat2:316:276
    ftruncate:77:46 fallocate:285:47 fadvise64:221:223 fsync:74:82 fdatasync:75:83 umask:95:166 sendfile:40:71
    copy_file_range:326:285 dup:32:23 dup2:33:- dup3:292:24 pipe:22:- pipe2:293:59
"""
WAITING = """
    poll:7:- ppoll:271:73 select:23:- pselect6:270:72 epoll_create:213:- epoll_create1:291:20 epoll_ctl:233:21
    epoll_wait:232:- epoll_pwait:281:22 epoll_pwait2:441:441 recvfrom:45:207 shutdown:48:210
"""
MEMORY = """
    brk:12:214 mmap:9:222 munmap:11:215 mremap:25:216 mprotect:10:226 madvise:28:233
"""
TIME = """
    clock_gettime:228:113 clock_getres:229:114 clock_nanosleep:230:115 nanosleep:35:101 gettimeofday:96:169
    time:201:- times:100:153 getitimer:36:102 setitimer:38:103 alarm:37:-
"""
OWN_PROCESS = """
    getpid:39:172 getppid:110:173 gettid:186:178 getuid:102:174 geteuid:107:175 getgid:104:176 getegid:108:177
    getgroups:115:158 getpgid:121:155 getpgrp:111:- getsid:124:156 getresuid:118:148 getresgid:120:150
    uname:63:160 sysinfo:99:179 getrusage:98:165 getcpu:309:168 sched_yield:24:124 sched_getaffinity:204:123
    getrlimit:97:163 rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigpending:127:136
    rt_sigsuspend:130:133 rt_sigtimedwait:128:137 sigaltstack:131:132 pause:34:- restart_syscall:219:128
    futex:202:98 set_robust_list:273:99 set_tid_address:218:96 rseq:334:293 membarrier:324:283 exit:60:93
    exit_group:231:94 getrandom:318:278
"""
# System calls that are allowed only with the arguments that CONDITIONAL lists.
WITH_CONDITIONS = """
    fcntl:72:25 ioctl:16:29 socketpair:53:199 sendto:44:206 prlimit64:302:261
"""


def _rows(*tables: str) -> list[list[str]]:
    return [entry.split(":") for table in tables for entry in table.split()]


ALLOWED = frozenset(name for name, _, _ in _rows(FILES, WAITING, MEMORY, TIME, OWN_PROCESS))

# System calls with this number or a higher one have the same number on all machines. For these calls, the filter
# returns "not implemented", and libc then makes an older call. For example, it makes the call clone instead of clone3;
# the filter refuses clone.
FIRST_UNIFIED_NUMBER = 424


@dataclasses.dataclass(frozen=True)
class Condition:
    """Requires that an argument of a system call, after masking, is one of ``values``.

    With ``wide`` the filter compares all 64 bits of the argument, otherwise the low 32.
    """

    argument: int
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF
    wide: bool = False


_F_DUPFD, _F_GETFD, _F_SETFD, _F_GETFL, _F_SETFL, _F_DUPFD_CLOEXEC = 0, 1, 2, 3, 4, 1030
_TCGETS, _TIOCGWINSZ, _FIONREAD, _FIONBIO, _FIONCLEX, _FIOCLEX = 0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451

# System calls that are allowed if all their conditions are true.
CONDITIONAL: dict[str, tuple[Condition, ...]] = {
    # Excluded: F_SETOWN and F_SETSIG (they send signals to other processes), and locks (other sandboxes could wait).
    "fcntl": (Condition(1, (_F_DUPFD, _F_GETFD, _F_SETFD, _F_GETFL, _F_SETFL, _F_DUPFD_CLOEXEC)),),
    # Excluded: FIOSETOWN, and TIOCSTI (it injects input into a terminal).
    "ioctl": (Condition(1, (_TCGETS, _TIOCGWINSZ, _FIONREAD, _FIONBIO, _FIONCLEX, _FIOCLEX)),),
    # Event loops wake themselves through a connected pair of sockets. The pair cannot reach another process.
    "socketpair": (Condition(0, (socket.AF_UNIX,)), Condition(1, (socket.SOCK_STREAM,), mask=0xF)),
    # send() is allowed; sending to an address is not.
    "sendto": (Condition(4, (0,), wide=True),),
    # A process may read its own limits. It can neither set limits nor read the limits of another process.
    "prlimit64": (Condition(0, (0,)), Condition(2, (0,), wide=True)),
}


class Machine:
    """A supported machine type.

    Attributes:
        name: name of the machine type, as ``uname -m`` prints it.
        audit_arch: ``AUDIT_ARCH_*`` value of a native system call.
        foreign_bit: bit that is set in the system-call numbers of the ABI x32; 0 if the machine has no such ABI.
        numbers: the number of each system call in the filter, by the call's name.
    """

    def __init__(self, name: str, column: int, audit_arch: int, foreign_bit: int = 0) -> None:
        self.name, self.audit_arch, self.foreign_bit = name, audit_arch, foreign_bit
        rows = _rows(FILES, WAITING, MEMORY, TIME, OWN_PROCESS, WITH_CONDITIONS)
        self.numbers = {row[0]: int(row[column]) for row in rows if row[column] != "-"}


X86_64 = Machine("x86_64", 1, audit_arch=0xC000003E, foreign_bit=0x40000000)
AARCH64 = Machine("aarch64", 2, audit_arch=0xC00000B7)
_MACHINES = {"x86_64": X86_64, "amd64": X86_64, "aarch64": AARCH64, "arm64": AARCH64}


def this_machine() -> Machine | None:
    """The machine type of this process, or ``None`` if the sandbox does not support it."""
    return _MACHINES.get(platform.machine().lower())


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

    A system call through a foreign ABI (32-bit entry, x32) kills the process. In a foreign ABI, the numbers mean other
    system calls, and no library uses such an ABI by accident. Every other system call that is not allowed fails. The
    error is ENOSYS for the system calls that libc replaces by an older one, otherwise EPERM.
    """
    program = [
        instruction(_LOAD_WORD, _ARCH),
        instruction(_EQUAL, machine.audit_arch, if_true=1),
        instruction(_RETURN, KILL_PROCESS),
        instruction(_LOAD_WORD, _NUMBER),
    ]
    if machine.foreign_bit:
        program += [instruction(_AT_LEAST, machine.foreign_bit, if_false=1), instruction(_RETURN, KILL_PROCESS)]
    for name in sorted(ALLOWED & machine.numbers.keys()):
        program += [instruction(_EQUAL, machine.numbers[name], if_false=1), instruction(_RETURN, ALLOW)]
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
    """Return instructions that refuse the system call if ``condition`` is false.

    If the condition is true, the filter continues after the last of these instructions.
    """
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
