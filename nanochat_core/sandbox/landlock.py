"""Landlock rules: the kernel's limits on the files that code may use.

The executor builds the rules and each worker applies them to itself. Source: the kernel's
``Documentation/userspace-api/landlock.rst``.
"""

import ctypes
import dataclasses
import struct

_EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_REG, _REFER, _TRUNCATE = 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 13, 1 << 14
_MAKE_SYM = 1 << 12

READ_TREE = READ_FILE | READ_DIR
# Code may create regular files, folders and, if the system-call filter allows it, symbolic links. It may create no
# devices, sockets or FIFOs.
USE_SCRATCH = (
    READ_TREE | WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _MAKE_SYM | _REFER | _TRUNCATE
)

MINIMUM_ABI = 3
"""The first version of Landlock that controls truncation of files."""

# The number of rights that Landlock controls, by version, for each kind of right: on files, on the network, and scopes.
# Only the versions that added rights of a kind are listed.
_FS_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}
_NET_RIGHTS = {4: 2}
_SCOPES = {6: 2}


@dataclasses.dataclass(frozen=True)
class PathRule:
    """Allows the rights ``access`` (a bit mask) on ``path`` and, if the path is a folder, on everything inside."""

    path: str
    access: int


def kernel_abi() -> int:
    """Landlock version of the running kernel; 0 if Landlock is missing or switched off."""
    libc = ctypes.CDLL(None, use_errno=True)
    create_ruleset, version_flag = 444, 1
    return max(0, int(libc.syscall(create_ruleset, None, ctypes.c_size_t(0), ctypes.c_uint32(version_flag))))


def ruleset_attribute(abi: int) -> bytes:
    """A ``struct landlock_ruleset_attr`` that denies every right of version ``abi`` unless a rule allows it."""

    def mask(table: dict[int, int]) -> int:
        return (1 << max((count for version, count in table.items() if version <= abi), default=0)) - 1

    fields = [mask(_FS_RIGHTS), mask(_NET_RIGHTS), mask(_SCOPES)]
    used = 3 if abi >= 6 else 2 if abi >= 4 else 1
    return struct.pack(f"={used}Q", *fields[:used])
