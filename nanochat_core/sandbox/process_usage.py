"""CPU time and memory of one process, as the kernel reports them."""

import resource
import time

_PAGE_BYTES = resource.getpagesize()
# Address space of an idle interpreter, assumed if /proc hides the process.
_INTERPRETER_BYTES = 64 << 20


class ProcessUsage:
    """Reads the usage of a process from outside, without its help.

    Attributes:
        peak_memory_bytes: largest resident memory that :meth:`sample_memory` measured; 0 if it measured none.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.peak_memory_bytes = 0

    def address_space_bytes(self) -> int:
        """Size of the virtual memory."""
        try:
            with open(f"/proc/{self._pid}/statm", "rb") as statm:
                return int(statm.read().split()[0]) * _PAGE_BYTES
        except OSError:
            return _INTERPRETER_BYTES

    def cpu_seconds(self) -> float:
        """CPU time so far; 0 if the process has ended.

        The id of the process's CPU clock is computed as Linux's ``clock_getcpuclockid(3)`` computes it.
        """
        cpu_clock = (~self._pid << 3) | 2
        try:
            return time.clock_gettime(cpu_clock)
        except OSError:
            return 0.0

    def sample_memory(self) -> None:
        """Update :attr:`peak_memory_bytes`, unless the process has ended or /proc hides it."""
        try:
            with open(f"/proc/{self._pid}/status", "rb") as status:
                for line in status:
                    if line.startswith(b"VmHWM:"):
                        self.peak_memory_bytes = max(self.peak_memory_bytes, int(line.split()[1]) * 1024)
                        return
        except OSError:
            return
