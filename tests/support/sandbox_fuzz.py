"""Runs random programs in the sandbox: random bytes, random Python, and random system calls with random arguments.

    python -m tests.support.sandbox_fuzz [--seconds 1800] [--profile pod] [--seed 1]

Whatever a program does, its call must end with a status and must not change or read anything outside of the sandbox.
The next call must work.
"""

import argparse
import asyncio
import collections
import math
import os
import random
import tempfile
import time

from nanochat_core.sandbox import Limits, SandboxConfig, SandboxExecutor, Status
from tests.support.sandbox_attacks import SECRET, SECRET_VARIABLE, Target

_LIMITS = Limits(wall_seconds=0.3, cpu_seconds=0.3, memory_bytes=64 << 20, output_bytes=10_000)
_CANARY_EVERY = 10
# The numbers of all system calls, on every type of machine, are below this number.
_SYSTEM_CALLS = 480

_SYSTEM_CALL_PROGRAM = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
buffers = [ctypes.create_string_buffer(4096) for _ in range(4)]
for n, buffer in enumerate(buffers):
    buffer.raw = bytes((n * 37 + i) % 256 for i in range(4096))
path, secret = ctypes.c_char_p(b'.'), ctypes.c_char_p({secret!r})
files = [os.open('f', os.O_CREAT | os.O_RDWR), os.open(os.__file__, os.O_RDONLY), os.open('/dev/null', os.O_RDWR)]
for number, arguments in {calls!r}:
    given = [buffers[-a - 10] if -13 <= a <= -10 else path if a == -20 else secret if a == -21
             else files[-a - 30] if -32 <= a <= -30 else ctypes.c_long(a) for a in arguments]
    libc.syscall(number, *given)
"""
# Argument values that are likely to have an effect. Values below -9 stand for buffers, paths and files, except -100.
_ARGUMENTS = (
    *(0, 0, 0, 1, 2, 3, 4, 5, 8, 16, 64, 128, 4096, 65536, -1, -2, -100, 0o666, 1 << 17, 1 << 28, 1 << 31, 1 << 40),
    *(-10, -10, -11, -12, -13, -20, -20, -21, -21, -30, -31, -32),
)

_ATOMS = (
    *("0", "1", "-1", "10**9", "1.5", "''", "'x' * 1000", "b'\\xff'", "None", "[]", "{}", "()", "object()", "print"),
    *(
        "open('f', 'a+')",
        "open",
        "__import__('os')",
        "__import__('sys')",
        "__import__('ctypes')",
        "globals()",
        "range(9)",
    ),
    *("__import__('signal')", "__import__('fcntl')", "__import__('mmap')", "__import__('socket')", "type", "super"),
    *("@SECRET@", "'@SECRET@'", "'/proc/self/mem'", "'.'", "'..'", "@PARENT@", "sys._getframe()", "lambda *a: a"),
)
_ATTRIBUTES = (
    *(
        "__class__",
        "__dict__",
        "__init__",
        "__globals__",
        "__subclasses__()",
        "__mro__",
        "f_back",
        "f_locals",
        "close()",
    ),
    *("read()", "write('x')", "open", "listdir('.')", "modules", "system", "kill", "fork()", "environ", "stdout", "x"),
)


def random_bytes(source: random.Random, _: Target) -> str:
    data = source.randbytes(source.randrange(400))
    return data.decode(source.choice(("latin-1", "utf-16-le", "utf-8")), errors="replace")


def random_python(source: random.Random, target: Target) -> str:
    """A program of random statements. Most of them fail, and the statements after them still run."""

    def expression(depth: int) -> str:
        if depth == 0 or source.random() < 0.2:
            return source.choice(_ATOMS)
        parts = [expression(depth - 1) for _ in range(3)]
        forms = (
            f"({parts[0]}).{source.choice(_ATTRIBUTES)}",
            f"({parts[0]})({parts[1]}, {parts[2]})",
            f"({parts[0]})({parts[1]})",
            f"({parts[0]}) {source.choice(('+', '*', '%', '//', '<<', '==', 'in', 'and'))} ({parts[1]})",
            f"({parts[0]})[{parts[1]}]",
            f"[{parts[0]} for x in {parts[1]}]",
            f"getattr({parts[0]}, dir({parts[0]})[{source.randrange(40)}])",
        )
        return source.choice(forms)

    lines = ["import os, sys, random"]
    for _ in range(source.randrange(1, 15)):
        statement = source.choice(
            (
                "x = {}",
                "{}",
                "print({})",
                "del x",
                "raise {}",
                "with {} as x: x",
                "for x in {}: break",
                "y = yield_({})",
            )
        )
        lines += ["try:", f"  {statement.format(expression(source.randrange(5)))}", "except Exception as e: x = e"]
    code = "\n".join(lines)
    return code.replace("@SECRET@", target.secret).replace("@PARENT@", str(os.getpid()))


def random_system_calls(source: random.Random, target: Target) -> str:
    calls = [
        (source.randrange(_SYSTEM_CALLS), [source.choice(_ARGUMENTS) for _ in range(6)])
        for _ in range(source.randrange(1, 60))
    ]
    return _SYSTEM_CALL_PROGRAM.format(secret=target.secret.encode(), calls=calls)


KINDS = (random_bytes, random_python, random_system_calls)


async def fuzz(
    executor: SandboxExecutor, target: Target, seconds: float, seed: int, most: float = math.inf
) -> dict[str, int]:
    """Run random programs, four at a time, for some seconds or until ``most`` programs have ended.

    Returns how often each status occurred.

    Raises AssertionError, with the program, if a program leaks or breaks something.
    """
    source = random.Random(seed)
    counts: collections.Counter[str] = collections.Counter()
    deadline = time.monotonic() + seconds

    async def caller() -> None:
        while time.monotonic() < deadline and counts.total() < most:
            code = source.choice(KINDS)(source, target)
            result = await executor.execute(code, _LIMITS)
            counts[result.status.value] += 1
            shown = f"{result.stdout}{result.stderr}{result.result}{result.error}"
            assert SECRET not in shown, f"the secret leaked: {code}"
            assert result.status is not Status.OVERLOADED
            assert "\n" not in result.error, code
            target.check_untouched()
            if sum(counts.values()) % _CANARY_EVERY == 0:
                canary = await executor.execute("import os\n(6 * 7, os.listdir('.'), sorted(os.environ))")
                assert (canary.status, canary.result) == (Status.OK, "(42, [], [])"), f"{canary} after {code}"

    await asyncio.gather(*(caller() for _ in range(4)))
    return dict(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--profile", default="pod")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = SandboxConfig(profile=arguments.profile, scratch_bytes=4 << 20)
        with SandboxExecutor(config) as executor:
            print(asyncio.run(fuzz(executor, Target(folder), arguments.seconds, arguments.seed)))
    del os.environ[SECRET_VARIABLE]


if __name__ == "__main__":
    main()
