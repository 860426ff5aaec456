"""Helpers of tests that start and kill processes (Linux): starting processes fast and listing them."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

# Forks processes from a process that has already imported the slow modules. This saves seconds for each process.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    [
        *("jobs.train.pipeline", "nanochat_core.training.optim", "torch._dynamo", "matplotlib.pyplot"),
        *("services.engine.server", "tests.support.fast_disk", "tests.support.frozen"),
    ]
)


class ForkedProgram:
    """``python -m <module> <arguments>`` in a process of :data:`FORKSERVER`.

    It has the methods of ``Popen`` that tests use.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        reader, writer = FORKSERVER.Pipe(duplex=False)
        with reader, writer:
            self._process = FORKSERVER.Process(target=_run_program, args=(module, arguments, dict(os.environ), writer))
            self._process.start()
            self.stderr = os.fdopen(os.dup(reader.fileno()))
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run_program(module: str, arguments: tuple[str, ...], environ: dict[str, str], stderr: Connection) -> None:
    with stderr:
        os.dup2(stderr.fileno(), sys.stderr.fileno())
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def children(pid: int) -> set[int]:
    """The children of a process, including ended children for which the process has not waited."""
    return {child for child, parent in _parents().items() if parent == pid}


def descendants(pid: int) -> set[int]:
    """The children of a process, their children and so on."""
    parents = _parents()
    found: set[int] = set()
    while more := {child for child, of in parents.items() if (of == pid or of in found) and child not in found}:
        found |= more
    return found


def _parents() -> dict[int, int]:
    """The parent of every process, by process id."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid = int(path.parent.name)
            parents[pid] = int(stat_fields(pid)[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # the process ended in the meantime
    return parents


def stat_fields(pid: int) -> list[str]:
    """The fields of ``/proc/<pid>/stat`` after the process's name; see proc(5).

    Index 0 is the state, 1 the parent, and 11 to 14 are the CPU times in clock ticks: in user mode, in the kernel, and
    the same two of the children that have ended. Raises FileNotFoundError or ProcessLookupError if there is no such
    process.
    """
    # The name, which stands in parentheses, may contain spaces and parentheses itself.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def command_line(pid: int) -> str:
    """The command line of a process; empty if the process has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
