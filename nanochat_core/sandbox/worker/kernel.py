"""Calls of libc and of the kernel that isolate the worker.

A function raises OSError if the kernel refuses the call, unless the function's docstring or a comment says otherwise.
"""

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)
# The functions of libc are looked up once here, so that no worker has to look them up.
_capset, _mount, _syscall = _libc.capset, _libc.mount, _libc.syscall
# Calls through this second object for libc keep Python's global lock, because a forked process could not acquire it
# again.
_libc_locked = ctypes.PyDLL(None, use_errno=True)
_syscall_locked = _libc_locked.syscall
_before_fork, _after_fork_parent = ctypes.pythonapi.PyOS_BeforeFork, ctypes.pythonapi.PyOS_AfterFork_Parent
_after_fork_child = ctypes.pythonapi.PyOS_AfterFork_Child

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 1, 4, 22, 24
_PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4
_SECCOMP_MODE_FILTER = 2
_SIGKILL, _SIGCHLD = 9, 17
CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWUSER = 0x20000, 0x20000000, 0x10000000
_CLONE_NEWNET = 0x40000000
_MNT_DETACH = 2
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT, _MS_REC, _MS_PRIVATE = 1, 2, 4, 32, 0x4000, 0x40000
_CLONE, _SECCOMP = (56, 317) if os.uname().machine == "x86_64" else (220, 277)
_SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_NEW_LISTENER = 1, 8
_M_ARENA_MAX = -8
# The system calls for Landlock and for mounts have the same numbers on every machine type.
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_LANDLOCK_RULE_PATH_BENEATH = 1
_MOUNT_SETATTR = 442
_AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = -100, 0x8000, 1
_LANDLOCK_FILE_RIGHTS = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15
_CAPABILITY_VERSION_3 = 0x20080522


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapabilityData(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


class FilterProgram(ctypes.Structure):
    """A seccomp filter in the kernel's format (``struct sock_fprog``)."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

    def __init__(self, instructions: bytes) -> None:
        super().__init__(len(instructions) // 8, instructions)


# The arguments of capset are made once, in the fork server, because the kernel may have to copy memory pages for each
# object that a worker makes.
_NO_CAPABILITIES = (_CapabilityData * 2)()
_CAPABILITY_HEADER = _CapabilityHeader(_CAPABILITY_VERSION_3, 0)


def load_library(path: str) -> None:
    """Map a shared library. Has no effect if it cannot be loaded, for example because another library is missing."""
    try:
        ctypes.CDLL(path)
    except OSError:
        pass


def allocate_from_one_arena() -> None:
    """Let all threads allocate from one arena, because glibc otherwise reserves 64 MiB of address space per thread."""
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(_M_ARENA_MAX, 1)


def _check(result: int, layer: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{layer}: {os.strerror(number)}")
    return result


def _prctl(layer: str, option: int, *arguments: int) -> int:
    return _check(_libc.prctl(option, *(*arguments, 0, 0, 0, 0)[:4]), layer)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the thread that started it ends."""
    _prctl("parent-death signal", _PR_SET_PDEATHSIG, _SIGKILL)


def give_up_new_privileges() -> None:
    """From now on, no exec can add privileges. Unprivileged processes cannot inspect this process or its children."""
    _prctl("no_new_privs", _PR_SET_NO_NEW_PRIVS, 1)
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break  # nothing is left to drop: no more capabilities exist, or this process can gain none
    # An error of the next call is ignored, because the call fails only on kernels without ambient capabilities.
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    _prctl("non-dumpable", _PR_SET_DUMPABLE, 0)


def drop_capabilities() -> None:
    """Give up all capabilities."""
    _check(_capset(ctypes.byref(_CAPABILITY_HEADER), ctypes.byref(_NO_CAPABILITIES)), "capabilities")


def unshare_mounts() -> None:
    """Move this process to a new mount namespace, and also to a new user namespace if the kernel requires this."""
    if _libc.unshare(CLONE_NEWNS) < 0:
        user, group = os.geteuid(), os.getegid()
        _check(_libc.unshare(CLONE_NEWUSER | CLONE_NEWNS), "namespaces")
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _check(_mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None), "namespaces")


def unmount(folder: bytes) -> None:
    """Remove a mount and all mounts below it, even if they are in use."""
    _check(_libc.umount2(folder, _MNT_DETACH), "namespaces")


def leave_network() -> None:
    """Move this process to an empty network namespace."""
    _check(_libc.unshare(_CLONE_NEWNET), "network namespace")


def mount_memory(folder: bytes, options: bytes, read_only: bool = False) -> None:
    """Mount an empty file system in memory on ``folder``."""
    flags = _MS_NOSUID | _MS_NODEV | (_MS_RDONLY if read_only else 0)
    _check(_mount(b"tmpfs", folder, b"tmpfs", ctypes.c_ulong(flags), options), "scratch file system")


def remount_read_only(folder: bytes) -> None:
    """Forbid writing to the file system that :func:`mount_memory` has mounted on ``folder``."""
    flags = ctypes.c_ulong(_MS_REMOUNT | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    _check(_mount(None, folder, None, flags, None), "scratch file system")


def make_read_only() -> None:
    """Make all mounts of this process's mount namespace read-only. Needs Linux 5.12."""
    attribute = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attribute))
    result = _syscall(_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, ctypes.byref(attribute), size)
    _check(result, "read-only mounts")


def fork(namespaces: int) -> int:
    """Like :func:`os.fork`, with the child in new namespaces (``CLONE_NEW*``)."""
    if not namespaces:
        return os.fork()
    _before_fork()
    flags = ctypes.c_ulong(namespaces | _SIGCHLD)
    pid = _syscall_locked(_CLONE, flags, None, None, None, None)
    if pid == 0:
        _after_fork_child()
    else:
        _after_fork_parent()
    return _check(pid, "namespaces")


def file_rules(ruleset_attribute: bytes, rules: list[tuple[bytes, int]]) -> int:
    """Return a descriptor of Landlock rules that allow only the file accesses of ``rules`` (path, access)."""
    attribute = ctypes.create_string_buffer(ruleset_attribute, len(ruleset_attribute))
    ruleset = _check(
        _syscall(_LANDLOCK_CREATE_RULESET, attribute, ctypes.c_size_t(len(ruleset_attribute)), 0), "landlock"
    )
    for path, access in rules:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            access &= _LANDLOCK_FILE_RIGHTS
        rule = _PathBeneath(access, parent)
        _check(_syscall(_LANDLOCK_ADD_RULE, ruleset, _LANDLOCK_RULE_PATH_BENEATH, ctypes.byref(rule), 0), "landlock")
        os.close(parent)
    return ruleset


def restrict_files(ruleset: int) -> None:
    """From now on, allow only the file accesses of the rules ``ruleset``.

    The process must have called :func:`give_up_new_privileges`.
    """
    _check(_syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0), "landlock")


def restrict_system_calls(program: FilterProgram) -> None:
    """From now on, allow only the system calls that the seccomp filter allows.

    The process must have called :func:`give_up_new_privileges`.
    """
    _prctl("seccomp", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program))


def ask_about_system_calls(program: FilterProgram) -> int:
    """Apply a seccomp filter. Another process decides about the calls that the filter answers with USER_NOTIF.

    That process reads these calls from the returned descriptor.
    """
    mode, flags = ctypes.c_uint(_SECCOMP_SET_MODE_FILTER), ctypes.c_uint(_SECCOMP_FILTER_FLAG_NEW_LISTENER)
    return _check(_syscall(_SECCOMP, mode, flags, ctypes.byref(program)), "seccomp")
