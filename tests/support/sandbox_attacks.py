"""Programs that try to break out of the sandbox, and the answers that the sandbox must give.

As a script, this file makes every attack and prints the failures as JSON. The script needs only the standard library,
so it can run as another user and with another interpreter:
``python sandbox_attacks.py PROFILE FOLDER_WITH_NANOCHAT_CORE SCRATCH_DIR``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from nanochat_core.sandbox import ExecutionResult, Limits, SandboxExecutor

SECRET = "planted-secret-5f1c"
SECRET_VARIABLE = "NANOCHAT_PLANTED_SECRET"

_REFUSED = r"PermissionError|Operation not permitted|Function not implemented"
_UNREACHABLE = _REFUSED + r"|FileNotFoundError|Read-only file system|Invalid cross-device link"


@dataclasses.dataclass(frozen=True)
class Attack:
    """A hostile program.

    Attributes:
        code: the program. :class:`Target` replaces marks such as ``@SECRET@`` with paths and process ids.
        statuses: the statuses that the answer may have.
        error: pattern that the error line must match.
        result: the result that the program must have; ``None`` allows any result.
        wall_seconds: time limit of the call; short for programs that never end.
    """

    name: str
    code: str
    statuses: tuple[str, ...]
    error: str = ""
    result: str | None = None
    wall_seconds: float = 20.0


def denied(name: str, code: str) -> Attack:
    return Attack(name, code, ("denied",), _REFUSED)


def hidden(name: str, code: str) -> Attack:
    """An attack on a file that the profile forbids or hides."""
    return Attack(name, code, ("denied", "error"), _UNREACHABLE)


def endless(name: str, code: str) -> Attack:
    return Attack(name, code, ("timeout",), r"wall time limit of 0.3 s|CPU time limit", wall_seconds=0.3)


def nothing_succeeds(name: str, code: str) -> Attack:
    """Return an attack whose result lists the forbidden actions that succeeded. The list must be empty."""
    return Attack(name, code, ("ok",), result="[]")


# System calls that are forbidden with any arguments: their numbers on x86_64 and on aarch64.
FORBIDDEN_CALLS = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "bpf": (321, 280),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "execveat": (322, 281),
    "setuid": (105, 146),
    "setgid": (106, 144),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "init_module": (175, 105),
    "kexec_load": (246, 104),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "sethostname": (170, 161),
    "clone": (56, 220),
    "clone3": (435, 435),
    "seccomp": (317, 277),
    "prctl": (157, 167),
    "landlock_restrict_self": (446, 446),
    "fanotify_init": (300, 262),
    "inotify_init1": (294, 26),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "tgkill": (234, 131),
    "tkill": (200, 130),
    "kill": (62, 129),
    "rt_sigqueueinfo": (129, 138),
    "setpriority": (141, 140),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "ioprio_set": (251, 30),
    "mlockall": (151, 230),
    "truncate": (76, 45),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "linkat": (265, 37),
    "mknodat": (259, 33),
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "sendmsg": (46, 211),
    "setsid": (112, 157),
    "setpgid": (109, 154),
}
_X86 = platform.machine() == "x86_64"
_NUMBERS = {name: pair[0 if _X86 else 1] for name, pair in FORBIDDEN_CALLS.items()}

RESOURCES = [
    denied("fork bomb", "import os\nwhile True: os.fork()"),
    denied("subprocess", "import subprocess\nsubprocess.run(['/bin/true'])"),
    Attack("os.system", "import os\nos.system('echo pwned') == 0", ("ok",), result="False"),
    denied("daemon by double fork", "import os\nif os.fork() == 0:\n  os.setsid()\n  os.fork()"),
    denied("posix_spawn", "import os\nos.posix_spawn('/bin/true', ['true'], {})"),
    denied("exec", "import os\nos.execv('/bin/true', ['true'])"),
    Attack(
        "thread bomb",
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(0.5,)).start()",
        ("error",),
        "can't start new thread",
    ),
    Attack(
        "threads that start threads",
        "import _thread\nmost = 0\ndef bomb():\n  global most\n  for _ in range(50):\n"
        "    try: _thread.start_new_thread(bomb, ())\n    except RuntimeError: pass\n"
        "    most = max(most, _thread._count())\nbomb()\nmost <= 16",
        ("ok",),
        result="True",
    ),
    endless(
        "a thread goes on when the main thread has ended",
        "import _thread, ctypes, time\ndef spin():\n  while True: pass\n_thread.start_new_thread(spin, ())\n"
        f"time.sleep(0.05)\nctypes.CDLL(None).syscall({60 if _X86 else 93}, 0)",
    ),
    nothing_succeeds(
        "new processes and namespaces instead of threads",
        "import ctypes, errno\nlibc = ctypes.CDLL(None, use_errno=True)\nfound = []\n"
        "for flags in (17, 0x4111, 0x100, 0x3d0f00 | 1 << 28, 0x3d0f00 | 1 << 17, 0x3d0f00 | 1 << 13,"
        " 0x3d0f00 | 1 << 33, 0x3d0f00 ^ 0x10000, 0x3d0f00 ^ 0x100, 0x3d0f00 ^ 0x200):\n"
        f"  result = libc.syscall({56 if _X86 else 220}, ctypes.c_ulong(flags), None, None, None, None)\n"
        "  if result != -1 or ctypes.get_errno() != errno.EPERM: found.append(flags)\nfound",
    ),
    Attack("memory bomb", "x = []\nwhile True: x.append(bytearray(1 << 20))", ("memory",), "memory limit of 67108864"),
    Attack("memory bomb by mmap", "import mmap\nmmap.mmap(-1, 1 << 30)", ("memory",), "memory limit of 67108864"),
    Attack("memory bomb by string", "'x' * (1 << 40)", ("memory",), "memory limit of 67108864"),
    endless("infinite loop", "while True: pass"),
    endless(
        "infinite loop that catches everything",
        "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
    ),
    endless("regular expression that backtracks", "import re\nre.match('(a+)+$', 'a' * 40 + 'b')"),
    endless("huge integer", "x = 3\nwhile True: x = x * x"),
    endless("sleep", "import time\ntime.sleep(100)"),
    endless("sleep in C", "import ctypes\nctypes.CDLL(None).sleep(100)"),
    endless("read that never returns", "import os\nos.read(os.pipe()[0], 1)"),
    endless(
        "every signal ignored",
        "import signal, time\nfor s in range(1, 65):\n  try: signal.signal(s, signal.SIG_IGN)\n"
        "  except (OSError, ValueError): pass\nwhile True: time.sleep(1)",
    ),
    endless("stdout and stderr closed", "import os\nos.close(1)\nos.close(2)\nos.close(3)\nwhile True: pass"),
    Attack("flood of stdout", "while True: print('x' * 100)", ("output_limit",), "stdout limit of 10000 bytes"),
    Attack(
        "flood of stderr",
        "import sys\nwhile True: sys.stderr.write('x' * 100)",
        ("output_limit",),
        "stderr limit of 10000 bytes",
    ),
    Attack(
        "flood of both by descriptor",
        "import os\nwhile True: os.write(1, b'x' * 5000), os.write(2, b'y' * 5000)",
        ("output_limit",),
        "limit of 10000 bytes",
    ),
    Attack("one giant line", "print('x' * (1 << 24))", ("output_limit",), "stdout limit of 10000 bytes"),
    Attack("giant result", "'x' * (1 << 24)", ("output_limit",), "result limit of 10000 bytes"),
    Attack(
        "flood of the result pipe",
        "import os\nwhile True: os.write(3, b'x' * 5000)",
        ("output_limit",),
        "result limit of 10000 bytes",
    ),
    Attack(
        "one big file",
        "f = open('f', 'wb')\nwhile True: f.write(bytes(1 << 20))",
        ("output_limit",),
        "scratch folder limit",
    ),
    Attack(
        "many big files",
        "n = 0\nwhile True:\n  open(str(n), 'wb').write(bytes(1 << 19))\n  n += 1",
        ("output_limit",),
        "scratch folder limit",
    ),
    denied("file without a name", "import os\nos.open('.', os.O_TMPFILE | os.O_RDWR)"),
    denied("reserved space", "import os\nos.posix_fallocate(os.open('f', os.O_CREAT | os.O_RDWR), 0, 4096)"),
    Attack(
        "removed files that mappings keep alive",
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nlibc.mmap.restype = ctypes.c_void_p\n"
        "for n in range(128):\n  f = os.open('f', os.O_CREAT | os.O_RDWR)\n  os.unlink('f')\n"
        "  os.write(f, bytes(1 << 20))\n"
        "  if libc.mmap(None, 4096, 1, 2, f, 0) == ctypes.c_void_p(-1).value:\n"
        "    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))\n  os.close(f)\n'pwned'",
        ("output_limit", "denied"),
        "scratch folder limit|Operation not permitted",
    ),
    Attack(
        "flood of empty files",
        "n = 0\nwhile True:\n  open(str(n), 'wb').close()\n  n += 1",
        ("output_limit", "timeout"),
        "scratch folder limit|wall time limit|CPU time limit",
        wall_seconds=0.4,
    ),
    Attack(
        "folders nested without end",
        "import os\nwhile True:\n  os.mkdir('d' * 200)\n  os.chdir('d' * 200)",
        ("output_limit", "timeout", "error"),
        "scratch folder limit|wall time limit|CPU time limit|No space left|File name too long",
        wall_seconds=0.4,
    ),
    Attack(
        "descriptors without end",
        "import os\nx = []\nwhile True: x.append(os.dup(1))",
        ("error",),
        "Too many open files",
    ),
]

CRASHES = [
    Attack("segmentation fault", "import ctypes\nctypes.string_at(0)", ("error",), "killed by signal 11"),
    Attack("abort", "import os\nos.abort()", ("error",), "killed by signal"),
    Attack("os._exit", "import os\nos._exit(0)", ("error",), "exited with code 0 before the code ended"),
    Attack("exit code of a memory kill", "import os\nos._exit(137)", ("error",), "exited with code 137"),
    Attack("exit code of a foreign system call", "import os\nos._exit(159)", ("error",), "exited with code 159"),
    Attack("sys.exit", "import sys\nsys.exit(0)", ("error",), "SystemExit: 0"),
    Attack("endless recursion", "def f(): return f()\nf()", ("error",), "RecursionError"),
    Attack(
        "recursion without a limit",
        "import sys\nsys.setrecursionlimit(1 << 30)\ndef f(): return f()\nf()",
        ("error", "memory"),
        "killed by signal 11|memory limit|SystemError",
    ),
    Attack("deep nesting", "x = []\nfor _ in range(10**5): x = [x]\nx", ("error",), "RecursionError"),
    Attack("exit handler", "import atexit\natexit.register(print, 'pwned')", ("ok",)),
    Attack(
        "exception that cannot be printed",
        "class E(Exception):\n  def __str__(self): raise E\n  __repr__ = __str__\nraise E",
        ("error",),
        "^E$",
    ),
    Attack("value that cannot be printed", "class V:\n  def __repr__(self): return 5\nV()", ("error",), "TypeError"),
    Attack("code with a NUL byte", "x = 1\0", ("error",), "null byte"),
]

FILES = [
    *(
        hidden(f"read {path}", f"open({path!r}, 'rb').read()")
        for path in (
            "@SECRET@",
            "/etc/passwd",
            "/etc/shadow",
            "/etc/hostname",
            "/root/.bash_history",
            "/proc/self/environ",
            "/proc/self/maps",
            "/proc/self/mem",
            "/proc/1/environ",
            "/proc/1/cmdline",
            "/proc/@PARENT@/environ",
            "/proc/@PARENT@/maps",
            "/proc/@PARENT@/mem",
            "/proc/@PARENT@/cmdline",
            "/proc/sys/kernel/hostname",
            "/sys/kernel/uevent_helper",
            "/var/run/secrets/kubernetes.io/serviceaccount/token",
            "/dev/mem",
            "/dev/kmsg",
            "@EXECUTOR@",
            "@WORKER@",
        )
    ),
    *(
        hidden(f"list {path}", f"import os\nos.listdir({path!r})")
        for path in ("/etc", "/tmp", "/proc", "/proc/@PARENT@/fd", "/sys", "/dev/shm", "/home", "@OUTSIDE@")
    ),
    *(
        hidden(f"create {path}", f"open({path!r}, 'w')")
        for path in ("@OUTSIDE@/new", "/tmp/new", "/dev/shm/new", "/var/tmp/new", "/new", "../new", "@OUTSIDE@/../new")
    ),
    hidden("append to a file outside", "open('@SECRET@', 'a').write('x')"),
    hidden("truncate a file outside", "import os\nos.truncate('@SECRET@', 0)"),
    hidden("truncate by opening", "import os\nos.open('@SECRET@', os.O_RDONLY | os.O_TRUNC)"),
    hidden("remove a file outside", "import os\nos.remove('@SECRET@')"),
    hidden("rename a file outside", "import os\nos.rename('@SECRET@', '@SECRET@.moved')"),
    hidden("move a file into scratch", "import os\nos.rename('@SECRET@', 'mine')"),
    hidden("change the mode of a file outside", "import os\nos.chmod('@SECRET@', 0o777)"),
    hidden("change the times of a file outside", "import os\nos.utime('@SECRET@', (0, 0))"),
    nothing_succeeds(
        "modes and times of files outside",
        "import os\nfound = []\n"
        "for path in ('/', '/dev/null', '/dev/zero', '/tmp', os.__file__, os.path.dirname(os.__file__), '@SECRET@'):\n"
        "  try: mode = os.stat(path).st_mode & 0o7777\n  except OSError: continue\n"
        "  def by_descriptor(change):\n"
        "    f = os.open(path, os.O_RDONLY)\n    try: change(f)\n    finally: os.close(f)\n"
        "  for act in (lambda: os.chmod(path, mode), lambda: os.utime(path), lambda: os.utime(path, (0, 0)),"
        " lambda: by_descriptor(lambda f: os.fchmod(f, mode)), lambda: by_descriptor(os.utime)):\n"
        "    try: act()\n    except OSError: continue\n    found.append(path)\nfound",
    ),
    hidden("make a folder outside", "import os\nos.mkdir('@OUTSIDE@/folder')"),
    hidden("symbolic link", "import os\nos.symlink('@SECRET@', 'link')\nopen('link').read()"),
    hidden("symbolic link to a folder", "import os\nos.symlink('@OUTSIDE@', 'link')\nopen('link/new', 'w')"),
    hidden("hard link", "import os\nos.link('@SECRET@', 'link')\nopen('link').read()"),
    hidden("climb out of scratch", "open('../' * 30 + '@SECRET@'.lstrip('/')).read()"),
    hidden("change folder and read", "import os\nos.chdir('@OUTSIDE@')\nopen('secret').read()"),
    hidden("FIFO", "import os\nos.mkfifo('fifo')"),
    hidden("device", "import os, stat\nos.mknod('zero', stat.S_IFCHR | 0o666, os.makedev(1, 5))"),
    hidden("write to the interpreter's library", "import os\nopen(os.__file__, 'a')"),
    hidden("add a module to the library", "import os\nopen(os.path.dirname(os.__file__) + '/evil.py', 'w')"),
    nothing_succeeds(
        "descriptors of its parent",
        "found = []\nfor n in range(64):\n  try: open(f'/proc/@PARENT@/fd/{n}', 'rb')\n"
        "  except OSError: continue\n  found.append(n)\nfound",
    ),
    Attack("environment", "import os\ndict(os.environ)", ("ok",), result="{}"),
    nothing_succeeds(
        "environment through libc",
        f"import ctypes\nlibc = ctypes.CDLL(None)\nlibc.getenv.restype = ctypes.c_char_p\n"
        f"[v for v in (libc.getenv(b'{SECRET_VARIABLE}'), libc.getenv(b'PATH'), libc.getenv(b'HOME')) if v]",
    ),
    nothing_succeeds(
        "inherited descriptors",
        "import os\nfound = []\nfor n in range(4, 4096):\n  try: os.fstat(n)\n  except OSError: continue\n"
        "  found.append(n)\nfound",
    ),
]

NETWORK = [
    nothing_succeeds(
        "sockets of every family",
        "import socket\nfound = []\nfor family in range(50):\n  for kind in (1, 2, 3, 5):\n"
        "    try: socket.socket(family, kind)\n    except OSError: continue\n    found.append((family, kind))\nfound",
    ),
    denied("unix socket by path", "import socket\nsocket.socket(socket.AF_UNIX).connect('/run/docker.sock')"),
    denied("abstract unix socket", "import socket\nsocket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).bind('\\0name')"),
    denied("datagram socket pair", "import socket\nsocket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)"),
    denied("message with an address", "import socket\nsocket.socketpair()[0].sendto(b'x', '/run/log')"),
    denied("descriptor passing", "import socket\na, b = socket.socketpair()\nsocket.send_fds(a, [b'x'], [1])"),
    Attack(
        "name lookup",
        "import socket\nsocket.getaddrinfo('example.com', 80)",
        ("denied", "error"),
        "gaierror|" + _UNREACHABLE,
    ),
    Attack(
        "metadata address",
        "import urllib.request\nurllib.request.urlopen('http://169.254.169.254/', timeout=1)",
        ("denied", "error"),
        "URLError.*not permitted|" + _UNREACHABLE,
    ),
]

PROCESSES = [
    denied("signal everything", "import os\nos.kill(-1, 9)"),
    denied("kill its parent", "import os\nos.kill(@PARENT@, 9)"),
    denied("kill its process group", "import os\nos.killpg(0, 9)"),
    denied(
        "have the kernel signal its parent",
        "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, @PARENT@)",
    ),
    denied("push input into a terminal", "import fcntl, termios\nfcntl.ioctl(1, termios.TIOCSTI, b'x')"),
    denied(
        "lower a limit of its parent", "import resource\nresource.prlimit(@PARENT@, resource.RLIMIT_NOFILE, (0, 0))"
    ),
    denied("read a limit of its parent", "import resource\nresource.prlimit(@PARENT@, resource.RLIMIT_NOFILE)"),
    Attack(
        "raise its own limit",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        ("error",),
        "not allowed to raise maximum limit",
    ),
    denied("change priorities", "import os\nos.setpriority(os.PRIO_PROCESS, @PARENT@, 19)"),
    denied("change affinity", "import os\nos.sched_setaffinity(@PARENT@, {0})"),
    denied("lock a file that others can read", "import fcntl, os\nfcntl.flock(open(os.__file__), fcntl.LOCK_EX)"),
    hidden("shared memory", "import os\nos.open('/dev/shm/x', os.O_CREAT | os.O_RDWR)"),
    nothing_succeeds(
        "forbidden system calls",
        f"import ctypes, errno\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"def refused(number):\n"
        f"  return libc.syscall(number, 0, 0, 0, 0, 0, 0) == -1 and ctypes.get_errno() in (errno.EPERM, errno.ENOSYS)\n"
        f"[name for name, number in {_NUMBERS!r}.items() if not refused(number)]",
    ),
]
if _X86:
    PROCESSES += [
        Attack(
            "system call through the x32 interface",
            "import ctypes\nctypes.CDLL(None).syscall(0x40000000 | 39)",
            ("denied",),
            "foreign system call interface",
        ),
        Attack(
            "system call through the 32-bit interface",
            "import ctypes, mmap\n"
            "page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)\n"
            r"page.write(b'\xb8\x14\x00\x00\x00\xcd\x80\xc3')  # mov eax, getpid; int 0x80; ret" + "\n"
            "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()",
            ("denied", "error"),  # if the kernel has no 32-bit interface, the program crashes
            "foreign system call interface|killed by signal 11",
        ),
    ]

# Ways in which two calls that run at the same time could exchange data, or a call could watch other processes.
_LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nlibc.mmap.restype = ctypes.c_void_p\n"
_CALL = {
    name: pair[0 if _X86 else 1]
    for name, pair in {
        "futex": (202, 98),
        "clock_gettime": (228, 113),
        "clock_nanosleep": (230, 115),
        "getpgid": (121, 155),
        "getsid": (124, 156),
        "sched_getaffinity": (204, 123),
        "fallocate": (285, 47),
        "fadvise64": (221, 223),
        "mincore": (27, 232),
        "preadv2": (327, 286),
        "sysinfo": (99, 179),
        "statfs": (137, 43),
        "fcntl": (72, 25),
        "readahead": (187, 213),
        "sync_file_range": (277, 84),
        "kcmp": (312, 272),
        "get_robust_list": (274, 100),
        "sched_getparam": (143, 121),
        "sched_getscheduler": (145, 120),
        "sched_rr_get_interval": (148, 127),
        "getpriority": (140, 141),
        "ioprio_get": (252, 31),
        "move_pages": (279, 239),
        "migrate_pages": (256, 238),
        "process_madvise": (440, 440),
        "process_mrelease": (448, 448),
    }.items()
}
CHANNELS = [
    denied("shared mapping of a library file", "import mmap, os\nmmap.mmap(os.open(os.__file__, 0), 0, prot=1)"),
    nothing_succeeds(
        "shared futex on a library file",
        _LIBC + "page = libc.mmap(None, 4096, 1, 2, os.open(os.__file__, 0), 0)\n"
        f"[op for op in (0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 134, 135, 136, 139, 140, 141)"
        f" if libc.syscall({_CALL['futex']}, ctypes.c_void_p(page), op, 0, None, None, 1) != -1"
        " or ctypes.get_errno() != 1]",
    ),
    nothing_succeeds(
        "wait for a thread of another process that ends",
        _LIBC + "page = libc.mmap(None, 4096, 1, 2, os.open(os.__file__, 0), 0)\n"
        "if page == ctypes.c_void_p(-1).value: page = None\n"
        f"result = libc.syscall({_CALL['futex']}, ctypes.c_void_p(page), 265,"
        " ctypes.c_uint32.from_address(page).value if page else 0, None, None, -1)\n"
        "[] if (result, ctypes.get_errno()) == (-1, 11) else ['waited']",
    ),
    denied(
        "priority-inheriting futex of a foreign thread",
        _LIBC + "word = ctypes.c_uint32(@PARENT@)\n"
        f"if libc.syscall({_CALL['futex']}, ctypes.byref(word), 134, 0, None) == -1: raise OSError("
        "ctypes.get_errno(), os.strerror(ctypes.get_errno()))",
    ),
    nothing_succeeds(
        "locks, leases and notifications of a library file",
        "import fcntl, os\nf = os.open(os.__file__, 0)\nfound = []\n"
        "for command in (5, 6, 7, 8, 9, 10, 11, 15, 16, 36, 37, 38, 1024, 1025, 1026, 1031, 1032, 1033, 1034, 1036):\n"
        "  try: fcntl.fcntl(f, command, bytes(32) if command in (5, 6, 7, 36, 37, 38) else 1)\n"
        "  except PermissionError: continue\n  except OSError: pass\n  found.append(command)\nfound",
    ),
    nothing_succeeds(
        "system calls that ask about another process or the machine",
        _LIBC + "buffer = ctypes.create_string_buffer(4096)\nme = ctypes.addressof(buffer)\n"
        "address = ctypes.c_void_p(me - me % 4096)\nf = os.open(os.__file__, 0)\n"
        f"numbers = {_CALL!r}\n"
        "foreign = ctypes.c_int((~@PARENT@ << 3) | 2)\n"
        "tries = {'clock_gettime': (foreign, buffer), 'clock_nanosleep': (foreign, 0, buffer, None),"
        " 'getpgid': (@PARENT@,), 'getsid': (@PARENT@,), 'sched_getaffinity': (@PARENT@, 128, buffer),"
        " 'fallocate': (f, 0, 0, 4096), 'fadvise64': (f, 0, 0, 4), 'mincore': (address, 4096, buffer),"
        " 'preadv2': (f, buffer, 0, 0, 0, 8), 'sysinfo': (buffer,), 'statfs': (b'.', buffer),"
        " 'readahead': (f, 0, 4096), 'sync_file_range': (f, 0, 0, 1), 'kcmp': (1, 1, 0, 0, 0),"
        " 'get_robust_list': (@PARENT@, buffer, buffer), 'sched_getparam': (@PARENT@, buffer),"
        " 'sched_getscheduler': (@PARENT@,), 'sched_rr_get_interval': (@PARENT@, buffer),"
        " 'getpriority': (0, @PARENT@), 'ioprio_get': (1, @PARENT@), 'move_pages': (@PARENT@, 0, 0, 0, 0, 0),"
        " 'migrate_pages': (@PARENT@, 0, 0, 0), 'process_madvise': (3, 0, 0, 0, 0), 'process_mrelease': (3, 0)}\n"
        "def refused(name, arguments):\n"
        "  return libc.syscall(numbers[name], *arguments) == -1 and ctypes.get_errno() in (1, 38)\n"
        "[name for name, arguments in tries.items() if not refused(name, arguments)]",
    ),
    denied("CPU time of another process", "import time\ntime.clock_gettime((~@PARENT@ << 3) | 2)"),
    denied("session of another process", "import os\nos.getsid(@PARENT@)"),
    denied("group of another process", "import os\nos.getpgid(@PARENT@)"),
    denied("affinity of another process", "import os\nos.sched_getaffinity(@PARENT@)"),
    denied("path without access", "import os\nos.open('/proc/@PARENT@', os.O_PATH)"),
    nothing_succeeds(
        "flags of sockets that nobody needs",
        "import socket\na, b = socket.socketpair()\nfound = []\nfor bit in range(31):\n"
        "  flag = 1 << bit\n  if flag in (socket.MSG_PEEK, socket.MSG_DONTWAIT, socket.MSG_WAITALL,"
        " socket.MSG_NOSIGNAL): continue\n"
        "  for act in (lambda: a.send(b'x', flag), lambda: b.recv(1, flag)):\n"
        "    try: act()\n    except PermissionError: continue\n    except OSError: pass\n"
        "    found.append(flag)\nfound",
    ),
    nothing_succeeds(
        "advice that shares or evicts pages",
        "import mmap\npage = mmap.mmap(-1, 4096)\nfound = []\n"
        "for advice in (9, 10, 11, 12, 13, 16, 17, 18, 20, 21, 100):\n"
        "  try: page.madvise(advice)\n  except PermissionError: continue\n  except OSError: pass\n"
        "  found.append(advice)\nfound",
    ),
    denied("a pipe for kernel notifications", "import os\nos.pipe2(os.O_EXCL)"),
]

FORGERY = [
    Attack(
        "a forged claim is a claim about this call",
        "import os\nos.write(3, b'v\\0\\0forged')\nos.close(3)\nimport time\ntime.sleep(9)",
        ("ok",),
        result="forged",
    ),
    Attack(
        "a nonsensical claim counts for nothing",
        "import os\nos.write(3, b'\\xff' * 50)\nos._exit(0)",
        ("error",),
        "code 0",
    ),
    Attack(
        "a claim that promises more than it brings",
        "import os\nos.write(3, b'e\\xff\\xff')\nos._exit(7)",
        ("error",),
        "code 7",
    ),
    Attack("an empty claim", "import os\nos.close(3)\nos._exit(0)", ("error",), "code 0"),
    Attack("readiness printed", "print('+*v\\0\\0ok')\n'real'", ("ok",), result="'real'"),
    Attack("invalid UTF-8 in a claim", "import os\nos.write(3, b'v\\0\\0\\xff\\xfe')\nos.close(3)", ("ok", "error")),
]

ATTACKS = [*RESOURCES, *CRASHES, *FILES, *NETWORK, *PROCESSES, *CHANNELS, *FORGERY]


class Target:
    """The targets of the attacks: a secret file, a secret environment variable and the executor's own process."""

    def __init__(self, folder: str) -> None:
        from nanochat_core.sandbox import executor

        self.outside = folder
        self.secret = os.path.join(folder, "secret")
        Path(self.secret).write_text(SECRET)
        os.environ[SECRET_VARIABLE] = SECRET
        self.places = {
            "@SECRET@": self.secret,
            "@OUTSIDE@": folder,
            "@PARENT@": str(os.getpid()),
            "@EXECUTOR@": executor.__file__,
            "@WORKER@": os.path.join(os.path.dirname(executor.__file__), "worker", "runner.py"),
        }

    def code(self, attack: Attack) -> str:
        code = attack.code
        for mark, value in self.places.items():
            code = code.replace(mark, value)
        return code

    def check_untouched(self) -> None:
        assert os.listdir(self.outside) == ["secret"], "the attack left something outside of its scratch folder"
        assert Path(self.secret).read_text() == SECRET, "the attack changed a file outside"
        assert os.stat(self.secret).st_mode & 0o777 == 0o644 & ~_umask(), "the attack changed a file's mode"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def limits_for(attack: Attack) -> Limits:
    from nanochat_core.sandbox import Limits

    return Limits(wall_seconds=attack.wall_seconds, cpu_seconds=4, memory_bytes=64 << 20, output_bytes=10_000)


class Executor(Protocol):
    """Runs code in a sandbox, here or elsewhere."""

    def execute_sync(self, code: str, limits: Limits = ..., /) -> ExecutionResult: ...


def check(executor: Executor, target: Target, attack: Attack) -> None:
    """Make an attack and check that the answer is right, that nothing leaked, and that the next call works."""
    result = executor.execute_sync(target.code(attack), limits_for(attack))
    told = f"{result.status.value}: {result.error!r}, result {result.result!r}"
    assert result.status.value in attack.statuses, told
    assert re.search(attack.error, result.error), told
    assert "\n" not in result.error, told
    if attack.result is not None:
        assert result.result == attack.result, told
    shown = f"{result.stdout}{result.stderr}{result.result}{result.error}"
    assert SECRET not in shown
    assert "pwned" not in result.stdout
    assert max(len(text.encode()) for text in (result.stdout, result.stderr, result.result or "")) < 10_100
    target.check_untouched()
    check_canary(executor)


def check_canary(executor: Executor) -> None:
    """Check that the executor still answers correctly, and that the next program finds no files and no variables."""
    result: ExecutionResult = executor.execute_sync("import os\n(6 * 7, os.listdir('.'), sorted(os.environ))")
    assert (result.status.value, result.result) == ("ok", "(42, [], [])"), result


def failures(executor: SandboxExecutor, target: Target) -> Iterator[tuple[str, str]]:
    for attack in ATTACKS:
        try:
            check(executor, target, attack)
        except AssertionError as error:
            yield attack.name, str(error)


def main(profile: str, package_dir: str, scratch_dir: str) -> None:
    sys.path.insert(0, package_dir)
    from nanochat_core.sandbox import SandboxConfig, SandboxExecutor

    config = SandboxConfig(profile=profile, scratch_dir=scratch_dir, scratch_bytes=4 << 20)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory(dir=scratch_dir) as folder, SandboxExecutor(config) as executor:
        found = dict(failures(executor, Target(folder)))
        facts = {"user": os.getuid(), "attacks": len(ATTACKS), "own_file_systems": executor.own_file_systems}
        print(json.dumps(facts | {"failures": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
