"""The system calls that code may make, assembled into a seccomp filter (classic BPF).

The filter is an allow-list: every system call that is not in the list fails. System calls that act on other processes,
the network, credentials, mounts or kernel objects are absent on purpose. Some system calls are allowed only with
harmless arguments, because Landlock would not prevent what they do with other arguments. Source: ``seccomp(2)`` and the
kernel's ``Documentation/userspace-api/seccomp_filter.rst``.
"""

import dataclasses
import errno
import os
import platform
import socket
import struct

# The system calls that code may make. Each name is followed by its number on x86_64 and on aarch64. "-" means that the
# machine has no such call. Source: ``arch/x86/entry/syscalls/syscall_64.tbl`` and ``include/uapi/asm-generic/unistd.h``
# of the kernel.
FILES = """
    read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 preadv:295:69 pwritev:296:70
    lseek:8:62 close:3:57 close_range:436:436 stat:4:- lstat:6:- fstat:5:80
    newfstatat:262:79 statx:332:291 access:21:- faccessat:269:48 faccessat2:439:439 readlink:89:-
    readlinkat:267:78 getdents:78:- getdents64:217:61 getcwd:79:17 chdir:80:49 fchdir:81:50 mkdir:83:-
    mkdirat:258:34 rmdir:84:- unlink:87:- unlinkat:263:35 rename:82:- renameat:264:38 ftruncate:77:46 fsync:74:82
    fdatasync:75:83 umask:95:166 sendfile:40:71 copy_file_range:326:285 dup:32:23 dup2:33:- dup3:292:24 pipe:22:-
"""
WAITING = """
    poll:7:- ppoll:271:73 select:23:- pselect6:270:72 epoll_create:213:- epoll_create1:291:20 epoll_ctl:233:21
    epoll_wait:232:- epoll_pwait:281:22 epoll_pwait2:441:441 shutdown:48:210
"""
MEMORY = """
    brk:12:214 munmap:11:215 mremap:25:216 mprotect:10:226
"""
TIME = """
    nanosleep:35:101 gettimeofday:96:169 time:201:- times:100:153 getitimer:36:102 setitimer:38:103 alarm:37:-
"""
OWN_PROCESS = """
    getpid:39:172 getppid:110:173 gettid:186:178 getuid:102:174 geteuid:107:175 getgid:104:176 getegid:108:177
    getgroups:115:158 getpgrp:111:- getresuid:118:148 getresgid:120:150 uname:63:160 getrusage:98:165 getcpu:309:168
    sched_yield:24:124 getrlimit:97:163 rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139
    rt_sigpending:127:136 rt_sigsuspend:130:133 rt_sigtimedwait:128:137 sigaltstack:131:132 pause:34:-
    restart_syscall:219:128 set_robust_list:273:99 set_tid_address:218:96 rseq:334:293 exit:60:93 exit_group:231:94
    getrandom:318:278
"""
# System calls that are allowed only if all files outside of the scratch folder are on read-only mounts. There are two
# reasons: Landlock does not control modes and times, and the executor must not meet symbolic links when it works in a
# scratch folder on the host.
OWN_FILES = """
    chmod:90:- fchmod:91:52 fchmodat:268:53 utime:132:- utimes:235:- futimesat:261:- utimensat:280:88
    symlink:88:- symlinkat:266:36
"""
# System calls that the filter answers with "not supported", as a file system without extended attributes does.
UNSUPPORTED = """
    listxattr:194:11 llistxattr:195:12 flistxattr:196:13
"""
# System calls that are allowed only with the arguments that CONDITIONAL lists.
WITH_CONDITIONS = """
    open:2:- openat:257:56 renameat2:316:276 pipe2:293:59 fcntl:72:25 ioctl:16:29
    socketpair:53:199 sendto:44:206 recvfrom:45:207 mmap:9:222 madvise:28:233 futex:202:98
    clock_gettime:228:113 clock_getres:229:114 clock_nanosleep:230:115
    clone:56:220 getpgid:121:155 getsid:124:156 sched_getaffinity:204:123 prlimit64:302:261
"""


def _rows(*tables: str) -> list[list[str]]:
    return [entry.split(":") for table in tables for entry in table.split()]


def _names(*tables: str) -> frozenset[str]:
    return frozenset(name for name, _, _ in _rows(*tables))


ALLOWED = _names(FILES, WAITING, MEMORY, TIME, OWN_PROCESS)

# System calls with this number or a higher one have the same number on all machines. If such a call is not allowed, the
# filter returns "not implemented", and libc then makes an older call. For example, libc calls clone instead of clone3,
# and the filter can check the arguments of clone.
FIRST_UNIFIED_NUMBER = 424


@dataclasses.dataclass(frozen=True)
class Condition:
    """Requires that an argument of a system call, after masking, is one of ``values``.

    If ``wide`` is true, the filter compares all 64 bits of the argument; otherwise, only the low 32 bits.
    """

    argument: int
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF
    wide: bool = False


_F_DUPFD, _F_GETFD, _F_SETFD, _F_GETFL, _F_SETFL, _F_DUPFD_CLOEXEC = 0, 1, 2, 3, 4, 1030
_TCGETS, _TIOCGWINSZ, _FIONREAD, _FIONBIO, _FIONCLEX, _FIOCLEX = 0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451
_O_TMPFILE, _O_PATH = 0o20000000, 0o10000000
_MAP_SHARED, _MAP_ANONYMOUS, _MAP_HUGETLB, _PROT_WRITE = 0x1, 0x20, 0x40000, 0x2
_MAP_KIND = _MAP_SHARED | _MAP_ANONYMOUS | _MAP_HUGETLB
# MADV_NORMAL, RANDOM, SEQUENTIAL, WILLNEED, DONTNEED, FREE, HUGEPAGE and NOHUGEPAGE.
_ADVICE = (0, 1, 2, 3, 4, 8, 14, 15)
# FUTEX_WAIT, WAKE, REQUEUE, CMP_REQUEUE, WAKE_OP, WAIT_BITSET and WAKE_BITSET, each with FUTEX_PRIVATE_FLAG.
_FUTEX_OPERATIONS = tuple(128 | operation for operation in (0, 1, 3, 4, 5, 9, 10))
_FUTEX_CLOCK_REALTIME = 256
# The operation by which pthread_join waits on a shared futex: FUTEX_WAIT_BITSET with FUTEX_CLOCK_REALTIME.
_FUTEX_JOIN = 9 | _FUTEX_CLOCK_REALTIME
_CLONE_THREAD = 0x10000
# The flags with which glibc starts a thread: CLONE_VM, FS, FILES, SIGHAND, THREAD, SYSVSEM, SETTLS, PARENT_SETTID and
# CHILD_CLEARTID. A thread has the filters, the file rules and the limits of its process.
_THREAD_FLAGS = 0x3D0F00
# The clocks that code may read: CLOCK_REALTIME to CLOCK_TAI. Excluded are negative numbers, which mean the CPU time of
# another process or the clock of a device.
_CLOCKS = tuple(range(12))
_SOCKET_FLAGS = socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_WAITALL | socket.MSG_NOSIGNAL


def _only(argument: int, allowed_bits: int) -> Condition:
    """Requires that an argument has no bits except ``allowed_bits``."""
    return Condition(argument, (0,), mask=0xFFFFFFFF & ~allowed_bits)


# The alternatives of each system call. The call is allowed if all conditions of at least one alternative are true.
CONDITIONAL: dict[str, tuple[tuple[Condition, ...], ...]] = {
    # Excluded: O_TMPFILE (files that the measurement of scratch folders cannot see) and O_PATH (Landlock ignores it).
    "open": ((Condition(1, (0,), mask=_O_TMPFILE | _O_PATH),),),
    "openat": ((Condition(2, (0,), mask=_O_TMPFILE | _O_PATH),),),
    # Excluded: RENAME_WHITEOUT, which makes a device.
    "renameat2": ((_only(4, 0x3),),),
    # Excluded: O_DIRECT (a pipe of packets), and O_NOTIFICATION_PIPE (the kernel reports events through such a pipe).
    "pipe2": ((_only(1, os.O_CLOEXEC | os.O_NONBLOCK),),),
    # Excluded are, for example, F_SETOWN and F_SETSIG (they send signals to other processes), F_NOTIFY and F_SETLEASE
    # (they observe other processes), and locks (another sandbox could have to wait).
    "fcntl": ((Condition(1, (_F_DUPFD, _F_GETFD, _F_SETFD, _F_GETFL, _F_SETFL, _F_DUPFD_CLOEXEC)),),),
    # Excluded are, for example, FIOSETOWN (it sends signals to other processes) and TIOCSTI (it injects input into a
    # terminal).
    "ioctl": ((Condition(1, (_TCGETS, _TIOCGWINSZ, _FIONREAD, _FIONBIO, _FIONCLEX, _FIOCLEX)),),),
    # Event loops wake themselves through a connected pair of sockets. The pair cannot reach another process.
    "socketpair": ((Condition(0, (socket.AF_UNIX,)), Condition(1, (socket.SOCK_STREAM,), mask=0xF)),),
    # send() is allowed; sending to an address is not. Excluded: MSG_OOB, and flags for other kinds of sockets.
    "sendto": ((_only(3, _SOCKET_FLAGS), Condition(4, (0,), wide=True)),),
    "recvfrom": ((_only(3, _SOCKET_FLAGS),),),
    # Processes that map the same file with MAP_SHARED share memory. The kernel allows a writable shared mapping only if
    # the file is open for writing, so the file belongs to this sandbox. A read-only shared mapping is excluded, because
    # it can be of any readable file.
    "mmap": (
        (Condition(3, (0, _MAP_ANONYMOUS, _MAP_SHARED | _MAP_ANONYMOUS), mask=_MAP_KIND),),
        (Condition(3, (_MAP_SHARED,), mask=_MAP_KIND), Condition(2, (_PROT_WRITE,), mask=_PROT_WRITE)),
    ),
    # Excluded are, for example, MADV_MERGEABLE (it shares pages with other processes) and MADV_PAGEOUT.
    "madvise": ((Condition(2, _ADVICE),),),
    # Code may start threads of its process; a filter of build_thread_filter limits their number. Excluded: new
    # processes and namespaces.
    "clone": ((Condition(0, (_THREAD_FLAGS,), wide=True),),),
    # A private futex belongs to one process. Excluded: shared futexes, which reach all processes that map the same
    # file, and operations with priority inheritance, which take the id of any thread.
    "futex": ((Condition(1, _FUTEX_OPERATIONS, mask=0xFFFFFFFF & ~_FUTEX_CLOCK_REALTIME),),),
    **dict.fromkeys(("clock_gettime", "clock_getres", "clock_nanosleep"), ((Condition(0, _CLOCKS),),)),
    # A process may ask only about itself.
    **dict.fromkeys(("getpgid", "getsid", "sched_getaffinity"), ((Condition(0, (0,)),),)),
    # A process may read its own limits. It can neither set limits nor read the limits of another process.
    "prlimit64": ((Condition(0, (0,)), Condition(2, (0,), wide=True)),),
}
# System calls that the filter answers with the error EAGAIN ("try again") if the condition is true. A thread that ends
# wakes a futex of its choice, so one sandbox could signal another sandbox that waits for this futex. Therefore
# pthread_join may not wait. After EAGAIN, pthread_join polls; after another error, it would end the process.
ANSWERED_AGAIN = {"futex": Condition(1, (_FUTEX_JOIN,))}
_MMAP_WITHOUT_FILES = ((Condition(3, (_MAP_ANONYMOUS,), mask=_MAP_ANONYMOUS | _MAP_HUGETLB),),)


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
        rows = _rows(FILES, WAITING, MEMORY, TIME, OWN_PROCESS, OWN_FILES, UNSUPPORTED, WITH_CONDITIONS)
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
NOT_SUPPORTED = _ERRNO | errno.ENOTSUP
AGAIN = _ERRNO | errno.EAGAIN
ASK = 0x7FC00000  # SECCOMP_RET_USER_NOTIF: another process decides

# Offsets in struct seccomp_data.
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16


def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One ``struct sock_filter`` of 8 bytes. A jump distance of 0 means the next instruction."""
    return struct.pack("=HBBI", code, if_true, if_false, value)


def build_filter(machine: Machine, *, file_mappings: bool = True, own_files: bool = False) -> bytes:
    """Build the filter for ``machine``: an array of ``struct sock_filter``.

    Without ``file_mappings``, the filter refuses to map any file. With ``own_files``, it allows :data:`OWN_FILES`.

    A system call through a foreign ABI (32-bit entry, x32) kills the process. In a foreign ABI, the numbers mean other
    system calls, and no library uses such an ABI by accident. Every other system call that is not allowed fails. The
    error is ENOTSUP for the system calls of :data:`UNSUPPORTED`, EAGAIN under the conditions of :data:`ANSWERED_AGAIN`,
    ENOSYS for numbers from :data:`FIRST_UNIFIED_NUMBER` on, and EPERM in all other cases.
    """
    program = [
        instruction(_LOAD_WORD, _ARCH),
        instruction(_EQUAL, machine.audit_arch, if_true=1),
        instruction(_RETURN, KILL_PROCESS),
        instruction(_LOAD_WORD, _NUMBER),
    ]
    if machine.foreign_bit:
        program += [instruction(_AT_LEAST, machine.foreign_bit, if_false=1), instruction(_RETURN, KILL_PROCESS)]
    actions = dict.fromkeys(ALLOWED | (_names(OWN_FILES) if own_files else frozenset()), ALLOW)
    actions |= dict.fromkeys(_names(UNSUPPORTED), NOT_SUPPORTED)
    decisions = {
        machine.numbers[name]: instruction(_RETURN, action)
        for name, action in actions.items()
        if name in machine.numbers
    }
    conditional = CONDITIONAL if file_mappings else CONDITIONAL | {"mmap": _MMAP_WITHOUT_FILES}
    for name, alternatives in conditional.items():
        if name in machine.numbers:
            checks = b"".join(_alternative(conditions, ALLOW) for conditions in alternatives)
            if name in ANSWERED_AGAIN:
                checks += _alternative((ANSWERED_AGAIN[name],), AGAIN)
            decisions[machine.numbers[name]] = checks + instruction(_RETURN, REFUSE)
    ranges: list[tuple[int, bytes]] = []
    for number in range(max(*decisions, FIRST_UNIFIED_NUMBER) + 2):
        unlisted = UNKNOWN if number >= FIRST_UNIFIED_NUMBER else REFUSE
        decision = decisions.get(number, instruction(_RETURN, unlisted))
        if not ranges or decision != ranges[-1][1]:
            ranges.append((number, decision))
    return b"".join([*program, _search(ranges)])


def _search(ranges: list[tuple[int, bytes]]) -> bytes:
    """Return instructions that find the range of a system call's number, and then run the instructions of that range.

    Each range is its first number and the instructions that decide about its numbers. With binary search, a worker
    starts faster than with a linear search, because the kernel tries all numbers when a process installs a filter.
    """
    if len(ranges) == 1:
        return ranges[0][1]
    middle = len(ranges) // 2
    below = _search(ranges[:middle])
    return instruction(_AT_LEAST, ranges[middle][0], if_true=len(below) // 8) + below + _search(ranges[middle:])


def build_thread_filter(machine: Machine, action: int) -> bytes:
    """Build a second filter, which answers the start of a thread with ``action`` and allows everything else.

    The fork server installs this filter, and each worker adds the filter of :func:`build_filter`. If two filters decide
    differently, the kernel follows the stricter one.
    """
    check = _alternative((Condition(0, (_CLONE_THREAD,), mask=_CLONE_THREAD),), action)
    return b"".join(
        [
            instruction(_LOAD_WORD, _NUMBER),
            instruction(_EQUAL, machine.numbers["clone"], if_false=len(check) // 8),
            check,
            instruction(_RETURN, ALLOW),
        ]
    )


def _alternative(conditions: tuple[Condition, ...], action: int) -> bytes:
    """Return instructions that decide ``action`` if all conditions are true.

    Otherwise, the filter continues after the last of these instructions.
    """
    code = instruction(_RETURN, action)
    for condition in reversed(conditions):
        code = _check(condition, len(code) // 8) + code
    return code


def _check(condition: Condition, skip: int) -> bytes:
    """Return instructions that check ``condition``.

    If the condition is true, the program continues after the returned instructions. If the condition is false, the
    program also jumps over the ``skip`` instructions that follow them.
    """
    # Each argument has eight bytes. The low 32 bits come first, because x86-64 and arm64 are little-endian.
    low = _ARGUMENTS + 8 * condition.argument
    code = [instruction(_LOAD_WORD, low)]
    if condition.mask != 0xFFFFFFFF:
        code.append(instruction(_AND, condition.mask))
    last = len(condition.values) - 1
    for index, value in enumerate(condition.values):
        code.append(instruction(_EQUAL, value & 0xFFFFFFFF, if_true=last - index, if_false=0 if index < last else skip))
    if condition.wide:
        (value,) = condition.values
        high = [instruction(_LOAD_WORD, low + 4), instruction(_EQUAL, value >> 32, if_false=len(code) + skip)]
        code = high + code
    return b"".join(code)
