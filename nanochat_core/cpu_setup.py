"""Settings of a process that computes on the CPU."""

import ctypes
import sys

import torch

# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def prepare_cpu(threads: int) -> None:
    """Sets this process up for computing on the CPU; call it before the first tensor is made.

    Denormal numbers are flushed to zero. Decayed optimizer state has many of them, and x86 cores process a denormal
    number a hundred times slower than a normal one.

    Args:
        threads: number of threads for one operation; 0 leaves the choice to torch.
    """
    if threads:
        torch.set_num_threads(threads)
    # A thread inherits this setting when it starts, so it must be made before the first parallel operation.
    torch.set_flush_denormal(True)
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Lets this process keep freed memory for its next allocations instead of returning it to the system.

    Every training step allocates the same tensors again. By default, glibc requests the memory of each large tensor
    from the system and returns it afterwards. The first access to each page is then a page fault, and these faults take
    5 to 10 % of a step. Without glibc, this function does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 2**26)
