"""Cgroups of calls (version 2): the kernel limits and counts all memory, threads and CPU of each call.

Source: the kernel's ``Documentation/admin-guide/cgroup-v2.rst``.
"""

import contextlib
import logging
import os
from pathlib import Path

log = logging.getLogger("nanochat.sandbox")

_CONTROLLERS = ("cpu", "memory", "pids")
# Allowance for memory that the kernel uses for a process: page tables, pipes, and the inodes of its scratch files.
_KERNEL_BYTES = 32 << 20
# A call may use one CPU: in each period of this many microseconds, its quota is the whole period.
_PERIOD = 100_000


class Cgroups:
    """Makes cgroups for calls in a folder of the cgroup file system that belongs to this executor alone."""

    def __init__(self, folder: str) -> None:
        """Raises OSError if cgroups with limits cannot be made in ``folder``."""
        self._folder = Path(folder)
        self._made = 0
        self._left: list[Path] = []
        missing = set(_CONTROLLERS) - set((self._folder / "cgroup.controllers").read_text().split())
        if missing:
            raise OSError(f"{folder} lacks the cgroup controllers {' and '.join(sorted(missing))}")
        try:
            (self._folder / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in _CONTROLLERS))
        except OSError as error:
            raise OSError(f"{folder} must have no processes and be writable: {error}") from error
        for abandoned in self._folder.glob("call-*"):
            self._remove(abandoned)

    def make(self, pid: int) -> "Cgroup":
        """Make a cgroup and move the process ``pid`` into it. Raises OSError if the kernel refuses."""
        self._made += 1
        path = self._folder / f"call-{os.getpid()}-{self._made}"
        path.mkdir()
        try:
            (path / "cgroup.procs").write_text(str(pid))
        except OSError:
            self._remove(path)
            raise
        return Cgroup(path)

    def remove(self, cgroup: "Cgroup") -> None:
        """Remove the cgroup of a process that has ended. Also try again to remove cgroups that were in use earlier."""
        left, self._left = [*self._left, cgroup.path], []
        for path in left:
            self._remove(path)

    def close(self) -> None:
        """Remove the cgroups that :meth:`remove` could not remove."""
        for path in self._left:
            with contextlib.suppress(OSError):
                path.rmdir()

    def _remove(self, path: Path) -> None:
        try:
            path.rmdir()
        except FileNotFoundError:
            pass
        except OSError as error:
            # The cgroup is removed later, because its process may not have left it yet. At the start of an executor,
            # the process may belong to an earlier executor that was killed just now.
            log.debug("a cgroup is still in use", extra={"cgroup": str(path), "error": str(error)})
            self._left.append(path)


class Cgroup:
    """The cgroup of one call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def limit(self, memory_bytes: int, threads: int) -> None:
        """Limit memory, threads and CPU. The process may use one CPU. Raises OSError if the kernel refuses.

        ``memory_bytes`` is for the process and its files in memory. An allowance for memory that the kernel uses for
        the process is added to it.
        """
        (self.path / "memory.max").write_text(str(memory_bytes + _KERNEL_BYTES))
        with contextlib.suppress(FileNotFoundError):  # the kernel has no swap
            (self.path / "memory.swap.max").write_text("0")
        (self.path / "pids.max").write_text(str(threads))
        (self.path / "cpu.max").write_text(f"{_PERIOD} {_PERIOD}")

    @property
    def peak_memory_bytes(self) -> int:
        """Largest memory so far; 0 if the kernel does not report it (before Linux 5.19)."""
        try:
            return int((self.path / "memory.peak").read_text())
        except OSError:
            return 0

    @property
    def out_of_memory(self) -> bool:
        """Whether the kernel has killed the process for lack of memory, usually because of the cgroup's limit."""
        try:
            events = dict(line.split() for line in (self.path / "memory.events").read_text().splitlines())
        except OSError:
            return False
        return int(events.get("oom_kill", "0")) > 0
