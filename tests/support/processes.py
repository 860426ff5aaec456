"""Helpers of tests that start and kill processes (Linux): starting processes fast and listing them."""

import multiprocessing
from pathlib import Path

# Forks processes from one that has already imported the slow modules, which saves seconds for each process.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    ["jobs.train.pipeline", "nanochat_core.training.optim", "torch._dynamo", "matplotlib.pyplot"]
)


def children(pid: int) -> set[int]:
    """The children of a process, including those that ended and were not waited for."""
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
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # the process ended in the meantime
    return parents


def command_line(pid: int) -> str:
    """The command line of a process; empty if the process has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
