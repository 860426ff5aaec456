"""Runs a program as in a container that may neither create namespaces nor mount file systems.

    python -m tests.support.without_namespaces PROGRAM [ARGUMENTS]

A seccomp filter refuses the system calls, as the default filter of container runtimes does.
"""

import importlib
import os
import sys
from pathlib import Path

from nanochat_core.sandbox import seccomp

# unshare, setns, mount, umount2, pivot_root, chroot on x86_64 and on aarch64.
_REFUSED = {"x86_64": (272, 308, 165, 166, 155, 161), "aarch64": (97, 268, 40, 39, 41, 51)}
_CLONE = {"x86_64": 56, "aarch64": 220}
_NEW_NAMESPACES = 0x7E020080


def container_filter(machine: str) -> bytes:
    """A seccomp filter that refuses every way to get a new namespace or mount."""
    load, jump_equal, jump_any_bit, give = 0x20, 0x15, 0x45, 0x06
    program = [seccomp.instruction(load, 0)]
    for number in _REFUSED[machine]:
        program += [seccomp.instruction(jump_equal, number, if_false=1), seccomp.instruction(give, seccomp.REFUSE)]
    program += [
        seccomp.instruction(jump_equal, 435, if_false=1),  # clone3, whose flags are in memory
        seccomp.instruction(give, seccomp.UNKNOWN),
        seccomp.instruction(jump_equal, _CLONE[machine], if_false=3),
        seccomp.instruction(load, 16),
        seccomp.instruction(jump_any_bit, _NEW_NAMESPACES, if_false=1),
        seccomp.instruction(give, seccomp.REFUSE),
        seccomp.instruction(give, seccomp.ALLOW),
    ]
    return b"".join(program)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(seccomp.__file__).parent / "worker"))
    kernel = importlib.import_module("kernel")
    kernel.give_up_new_privileges()
    kernel.drop_capabilities()
    kernel.restrict_system_calls(kernel.FilterProgram(container_filter(os.uname().machine)))
    os.execv(sys.argv[1], sys.argv[1:])
