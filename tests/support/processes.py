"""Starting processes, and what processes there are, for tests that start and kill them (Linux)."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

# Starts processes from one that has imported what most of them need, which takes seconds each time otherwise.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    ["jobs.train.pipeline", "nanochat_core.training.optim", "torch._dynamo", "matplotlib.pyplot"]
)


def children(pid: int) -> set[int]:
    """Living and unreaped children of a process."""
    return {child for child, parent in _parents().items() if parent == pid}


def descendants(pid: int) -> set[int]:
    """The children of a process, their children and so on."""
    parents = _parents()
    found: set[int] = set()
    while more := {child for child, of in parents.items() if (of == pid or of in found) and child not in found}:
        found |= more
    return found


def _parents() -> dict[int, int]:
    """The parent of every process."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
    return parents


def command_line(pid: int) -> str:
    """The command line of a process, empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
