"""Which device and which dtype to compute in."""

from __future__ import annotations

import torch

from nanochat_core.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def choose_device(name: str) -> torch.device:
    """``auto`` (CUDA when there is one), ``cpu`` or ``cuda``.

    Raises:
        UserError: CUDA was asked for and is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but torch sees no CUDA device; use auto or cpu")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bf16 on GPUs that compute in it and fp32 elsewhere: CPUs differ in which of the two is faster."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return DTYPES[name]


def prepare_cpu(threads: int) -> None:
    """Set up this process for computing on the CPU; call it before any tensor is made.

    Numbers below the normal range are flushed to zero: decayed optimizer state is full of them, and x86 cores
    handle each one a hundred times slower than any other number.

    Args:
        threads: threads of one operation; 0 leaves the choice to torch.
    """
    if threads:
        torch.set_num_threads(threads)
    # Threads inherit this when they start, so it comes before the first parallel operation.
    torch.set_flush_denormal(True)
