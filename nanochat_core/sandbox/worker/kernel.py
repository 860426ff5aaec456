"""Functions that ask the kernel to take rights from the worker. Each function raises OSError if the kernel refuses."""

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 1, 4, 22, 24
_PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4
_SECCOMP_MODE_FILTER = 2
_SIGKILL = 9
# These system calls have the same numbers on every machine type.
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_LANDLOCK_RULE_PATH_BENEATH = 1
_LANDLOCK_FILE_RIGHTS = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15
_CAPABILITY_VERSION_3 = 0x20080522


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapabilityData(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


class _FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _check(result: int, layer: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{layer}: {os.strerror(number)}")
    return result


def _prctl(layer: str, option: int, *arguments: int) -> int:
    padded = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    return _check(_libc.prctl(option, *padded), layer)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the thread that started it ends."""
    _prctl("parent-death signal", _PR_SET_PDEATHSIG, _SIGKILL)


def drop_privileges() -> None:
    """Give up all capabilities for good. No exec can add privileges, and other processes cannot inspect this one."""
    _prctl("no_new_privs", _PR_SET_NO_NEW_PRIVS, 1)
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) < 0:
            break  # there are no more capabilities, or this process is unprivileged and cannot gain one
    # This call fails only on kernels without ambient capabilities.
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    nothing = (_CapabilityData * 2)()
    header = _CapabilityHeader(_CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(ctypes.byref(header), ctypes.byref(nothing)), "capabilities")
    _prctl("non-dumpable", _PR_SET_DUMPABLE, 0)


def restrict_files(ruleset_attribute: bytes, rules: list[tuple[str, int]]) -> None:
    """From now on, allow only the file accesses of ``rules`` (path, access), by Landlock. Needs no_new_privs."""
    attribute = ctypes.create_string_buffer(ruleset_attribute, len(ruleset_attribute))
    ruleset = _check(
        _libc.syscall(_LANDLOCK_CREATE_RULESET, attribute, ctypes.c_size_t(len(ruleset_attribute)), 0), "landlock"
    )
    for path, access in rules:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            access &= _LANDLOCK_FILE_RIGHTS
        rule = _PathBeneath(access, parent)
        _check(
            _libc.syscall(_LANDLOCK_ADD_RULE, ruleset, _LANDLOCK_RULE_PATH_BENEATH, ctypes.byref(rule), 0), "landlock"
        )
        os.close(parent)
    _check(_libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0), "landlock")
    os.close(ruleset)


def restrict_system_calls(instructions: bytes) -> None:
    """From now on, allow only the system calls that the seccomp filter allows. Needs no_new_privs."""
    program = _FilterProgram(len(instructions) // 8, instructions)
    mode, unused = ctypes.c_ulong(_SECCOMP_MODE_FILTER), ctypes.c_ulong(0)
    _check(_libc.prctl(_PR_SET_SECCOMP, mode, ctypes.byref(program), unused, unused), "seccomp")
