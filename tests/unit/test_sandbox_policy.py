"""The sandbox's policy: the decisions of the system-call filter, the limits and the file rules."""

import errno
import os
import re
import socket
import struct
from pathlib import Path

import pytest

from nanochat_core.sandbox import Limits, landlock, seccomp
from nanochat_core.sandbox.seccomp import AARCH64, X86_64, Machine

MACHINES = pytest.mark.parametrize("machine", [X86_64, AARCH64], ids=lambda machine: machine.name)


def decide(program: bytes, number: int, arch: int, arguments: tuple[int, ...] = ()) -> int:
    """Interpret the filter as the kernel's BPF machine does. This is a slow and obvious reference."""
    data = struct.pack("=IIQ6Q", number, arch, 0, *(arguments + (0,) * 6)[:6])
    instructions = list(struct.iter_unpack("=HBBI", program))
    at, accumulator = 0, 0
    while True:
        code, if_true, if_false, value = instructions[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif code == 0x54:
            accumulator &= value
        elif code == 0x15:
            at += if_true if accumulator == value else if_false
        elif code == 0x35:
            at += if_true if accumulator >= value else if_false
        elif code == 0x06:
            return value
        else:
            raise AssertionError(f"unknown instruction {code:#x}")


@MACHINES
@pytest.mark.parametrize("own_files", [False, True])
def test_every_call_gets_the_decision_that_the_allow_list_says(machine: Machine, own_files: bool) -> None:
    program = seccomp.build_filter(machine, own_files=own_files)
    names = seccomp.ALLOWED | {entry.split(":")[0] for entry in seccomp.OWN_FILES.split() if own_files}
    allowed = {machine.numbers[name] for name in names if name in machine.numbers}
    unsupported = {machine.numbers[entry.split(":")[0]] for entry in seccomp.UNSUPPORTED.split()}
    conditional = {machine.numbers[name] for name in seccomp.CONDITIONAL if name in machine.numbers}
    assert not allowed & conditional
    for number in range(600):
        decision = decide(program, number, machine.audit_arch)
        if number in allowed:
            assert decision == seccomp.ALLOW
        elif number in unsupported:
            assert decision == seccomp.NOT_SUPPORTED
        elif number not in conditional:
            unknown = number >= seccomp.FIRST_UNIFIED_NUMBER
            assert decision == (seccomp.UNKNOWN if unknown else seccomp.REFUSE), number


@MACHINES
def test_clone3_is_unknown_so_that_libc_falls_back(machine: Machine) -> None:
    decision = decide(seccomp.build_filter(machine), 435, machine.audit_arch)
    assert decision & 0xFFFF == errno.ENOSYS


@MACHINES
def test_a_foreign_architecture_is_killed(machine: Machine) -> None:
    for arch in (0x40000003, 0x40000028, X86_64.audit_arch ^ AARCH64.audit_arch ^ machine.audit_arch):
        assert decide(seccomp.build_filter(machine), machine.numbers["read"], arch) == seccomp.KILL_PROCESS


def test_x32_is_killed() -> None:
    program = seccomp.build_filter(X86_64)
    assert decide(program, 0x40000000 | X86_64.numbers["read"], X86_64.audit_arch) == seccomp.KILL_PROCESS


@MACHINES
@pytest.mark.parametrize(
    ("call", "arguments", "passes"),
    [
        ("fcntl", (3, 1), True),
        ("fcntl", (3, 1030), True),
        ("fcntl", (3, 8), False),  # F_SETOWN
        ("fcntl", (3, 10), False),  # F_SETSIG
        ("fcntl", (3, 6), False),  # F_SETLK
        ("fcntl", (3, 1031), False),  # F_SETPIPE_SZ
        ("ioctl", (1, 0x5401), True),
        ("ioctl", (1, 0x5412), False),  # TIOCSTI
        ("ioctl", (1, 0x8901), False),  # FIOSETOWN
        ("socketpair", (socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC), True),
        ("socketpair", (socket.AF_UNIX, socket.SOCK_DGRAM), False),
        ("socketpair", (socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_DGRAM), False),
        ("socketpair", (socket.AF_INET, socket.SOCK_STREAM), False),
        ("sendto", (3, 0x7F0000001000, 5, 0, 0), True),
        ("sendto", (3, 0x7F0000001000, 5, 0, 0x1000), False),
        ("sendto", (3, 0x7F0000001000, 5, 0, 1 << 32), False),
        ("sendto", (3, 0x7F0000001000, 5, socket.MSG_OOB, 0), False),
        ("sendto", (3, 0x7F0000001000, 5, socket.MSG_NOSIGNAL, 0), True),
        ("recvfrom", (3, 0x7F0000001000, 5, 0, 0), True),
        ("recvfrom", (3, 0x7F0000001000, 5, socket.MSG_OOB, 0), False),
        ("recvfrom", (3, 0x7F0000001000, 5, socket.MSG_ERRQUEUE, 0), False),
        ("openat", (0xFFFFFF9C, 0x1000, os.O_RDWR | os.O_CREAT), True),
        ("openat", (0xFFFFFF9C, 0x1000, 0o20200002), False),  # O_TMPFILE
        ("openat", (0xFFFFFF9C, 0x1000, 0o10000000), False),  # O_PATH
        ("mmap", (0, 4096, 3, 0x22), True),  # private, anonymous
        ("mmap", (0, 4096, 5, 0x802), True),  # private, of a file: a library
        ("mmap", (0, 4096, 3, 0x21), True),  # shared, anonymous
        ("mmap", (0, 4096, 3, 0x01), True),  # shared, writable
        ("mmap", (0, 4096, 1, 0x01), False),  # shared, read-only
        ("mmap", (0, 4096, 1, 0x03), False),  # MAP_SHARED_VALIDATE
        ("mmap", (0, 4096, 3, 0x40022), False),  # MAP_HUGETLB
        ("madvise", (0, 4096, 4), True),
        ("madvise", (0, 4096, 12), False),  # MADV_MERGEABLE
        ("madvise", (0, 4096, 21), False),  # MADV_PAGEOUT
        ("futex", (0x1000, 128 | 9 | 256), True),
        ("futex", (0x1000, 128 | 1), True),
        ("futex", (0x1000, 0), False),  # FUTEX_WAIT, shared
        ("futex", (0x1000, 1), False),  # FUTEX_WAKE, shared
        ("futex", (0x1000, 128 | 6), False),  # FUTEX_LOCK_PI
        ("clock_gettime", (1,), True),
        ("clock_gettime", ((~1 << 3 | 2) & 0xFFFFFFFF,), False),
        ("clock_nanosleep", ((~1 << 3 | 2) & 0xFFFFFFFFFFFFFFFF,), False),
        ("getpgid", (0,), True),
        ("getpgid", (1,), False),
        ("getsid", (1,), False),
        ("sched_getaffinity", (1, 8, 0x1000), False),
        ("sched_getaffinity", (0, 8, 0x1000), True),
        ("pipe2", (0x1000, os.O_CLOEXEC), True),
        ("pipe2", (0x1000, os.O_EXCL), False),  # O_NOTIFICATION_PIPE
        ("renameat2", (0, 0, 0, 0, 1), True),
        ("renameat2", (0, 0, 0, 0, 4), False),  # RENAME_WHITEOUT
        ("clone", (0x3D0F00, 0x1000), True),
        ("clone", (17, 0), False),  # SIGCHLD: a process
        ("clone", (0x3D0F00 | 1 << 28, 0x1000), False),  # CLONE_NEWUSER
        ("clone", (0x3D0F00 | 1 << 33, 0x1000), False),  # CLONE_INTO_CGROUP
        ("prlimit64", (0, 7, 0, 0x1000), True),
        ("prlimit64", (0, 7, 0x1000, 0), False),
        ("prlimit64", (0, 7, 1 << 40, 0), False),
        ("prlimit64", (1, 7, 0, 0x1000), False),
    ],
)
def test_arguments_decide_where_a_call_can_do_harm(
    machine: Machine, call: str, arguments: tuple[int, ...], passes: bool
) -> None:
    decision = decide(seccomp.build_filter(machine), machine.numbers[call], machine.audit_arch, arguments)
    assert decision == (seccomp.ALLOW if passes else seccomp.REFUSE)


@MACHINES
def test_the_start_of_a_thread_is_left_to_the_executor(machine: Machine) -> None:
    program = seccomp.build_thread_filter(machine, seccomp.ASK)
    for number in range(600):
        expected = seccomp.ASK if number == machine.numbers["clone"] else seccomp.ALLOW
        assert decide(program, number, machine.audit_arch, (0x3D0F00,)) == expected
        assert decide(program, number, machine.audit_arch, (17,)) == seccomp.ALLOW  # a fork of the fork server


@MACHINES
def test_a_shared_futex_cannot_be_waited_for_and_join_polls(machine: Machine) -> None:
    program = seccomp.build_filter(machine)
    decisions = [decide(program, machine.numbers["futex"], machine.audit_arch, (0, op)) for op in (265, 9, 0, 137)]
    assert decisions == [seccomp.AGAIN, seccomp.REFUSE, seccomp.REFUSE, seccomp.ALLOW]


def test_calls_that_reach_beyond_the_process_are_not_on_the_list() -> None:
    listed = seccomp.ALLOWED | seccomp.CONDITIONAL.keys()
    forbidden = """
        fork vfork clone3 execve execveat kill tkill tgkill ptrace prctl setrlimit
        socket connect bind listen accept sendmsg sendmmsg recvmsg
        truncate chmod fchmod fchmodat chown fchownat utimensat link linkat symlink symlinkat mknod flock memfd_create
        fallocate fadvise64 mincore sysinfo membarrier statfs inotify_init1 fanotify_init timer_create eventfd2
    """
    assert listed.isdisjoint(forbidden.split())


@pytest.mark.parametrize(
    ("machine", "header"),
    [
        (X86_64, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        (AARCH64, "/usr/include/asm-generic/unistd.h"),
    ],
    ids=["x86_64", "aarch64"],
)
def test_numbers_are_those_of_the_kernel_headers(machine: Machine, header: str) -> None:
    if not Path(header).exists():
        pytest.skip(f"{header} is not installed")
    found = {
        name.replace("fstatat", "newfstatat") if header.endswith("generic/unistd.h") else name: int(number)
        for name, number in re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", Path(header).read_text())
    }
    assert {name: found.get(name) for name in machine.numbers} == machine.numbers


@pytest.mark.parametrize(("abi", "size"), [(3, 8), (4, 16), (5, 16), (6, 24), (7, 24), (99, 24)])
def test_landlock_controls_all_that_the_kernel_can_control(abi: int, size: int) -> None:
    attribute = landlock.ruleset_attribute(abi)
    assert len(attribute) == size
    (files,) = struct.unpack_from("=Q", attribute)
    assert files >> 14 & 1, "truncation"
    assert bool(files >> 15 & 1) == (abi >= 5), "device control"
    assert landlock.USE_SCRATCH & ~files == 0


def test_zero_means_the_default_and_more_than_the_maximum_is_lowered() -> None:
    default, maximum = Limits(1, 2, 300, 400), Limits(10, 20, 3000, 4000)
    assert Limits().within(default, maximum) == default
    assert Limits(5, 99, 100, 9999).within(default, maximum) == Limits(5, 20, 100, 4000)


@pytest.mark.parametrize("bad", [{"wall_seconds": -1.0}, {"cpu_seconds": float("nan")}, {"wall_seconds": float("inf")}])
def test_limits_that_are_no_numbers_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Limits(**bad)  # type: ignore[arg-type]
