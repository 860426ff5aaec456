"""The device to compute on: its choice, the dtype of activations, its memory, and the settings of a CPU process."""

import ctypes
import gc
import sys
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanochat_core.errors import UserError

# With fp8, training computes only the products with the large matrices of the blocks in fp8
# (nanochat_core/training/fp8.py). The activations and the other matrix products are bf16.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
FP8_CAPABILITY = (9, 0)
# A thread that records a CUDA graph holds this lock, because no thread may return memory to the device during the
# recording.
RECORDING = threading.Lock()
# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def choose_device(name: str) -> torch.device:
    """The device with the name ``cpu``, ``cuda``, ``mps`` (Apple's GPUs) or ``auto``.

    ``auto`` is CUDA if torch sees a CUDA device, and the CPU otherwise.

    Raises UserError if ``name`` is ``cuda`` or ``mps`` and torch sees no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but torch sees no CUDA device; use auto or cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("device mps was asked for, but torch sees no Apple GPU; use auto or cpu")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of activations and matrix products for a name in :data:`DTYPES` or ``auto``.

    ``auto`` is bf16 on GPUs that compute in bf16, and fp32 elsewhere, because some CPUs are slower in bf16 than in
    fp32. Training in fp16 also needs a :class:`~nanochat_core.training.loss_scaling.LossScaler`. Training in fp8 also
    needs :func:`~nanochat_core.training.fp8.convert_to_fp8`.

    Raises UserError for ``fp16`` without a GPU, and for ``fp8`` without a GPU that multiplies fp8 numbers. On ``mps``,
    raises UserError for every dtype except fp32.
    """
    if device.type == "mps" and name not in ("auto", "fp32"):
        raise UserError(f"dtype {name} is not supported on mps; use fp32")
    if name == "auto":
        # Older GPUs only emulate bf16, which is slower than fp32.
        computes_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if computes_bf16 else torch.float32
    if name == "fp16" and device.type != "cuda":
        raise UserError("dtype fp16 needs a GPU; use fp32 or bf16 on a CPU")
    if name == "fp8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_CAPABILITY):
        raise UserError("dtype fp8 needs a GPU of compute capability 9.0 (H100) or later; use bf16 or auto")
    return DTYPES[name]


def precise_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums over many numbers: float64, or float32 on ``mps``, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def to_device(values: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """Copies an array to the device. On CUDA, the copy does not wait for work that is queued on the device."""
    host = torch.from_numpy(values)
    if device.type != "cuda":
        return host.to(device)
    # A copy from pageable memory waits until CUDA has done its queued work. A copy from pinned memory does not.
    return host.pin_memory().to(device, non_blocking=True)


def free_memory(device: torch.device) -> None:
    """Frees unreferenced tensors and, on CUDA, returns their memory to the device, where other processes can use it.

    Call this function outside of ``except`` blocks. An exception that is being handled refers to all local variables of
    the functions that it passed through, so their memory is still in use.
    """
    gc.collect()
    if device.type == "cuda":
        with RECORDING:
            torch.cuda.empty_cache()


def cpu_capabilities() -> dict[str, Any]:
    """Torch's description of the CPU (``cpu_name``, instruction sets); empty if torch has none, as in version 2.9."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return capabilities


def cpu_multiplies_bf16() -> bool:
    """Whether torch reports that the CPU has x86 instructions for products of bf16 numbers."""
    capabilities = cpu_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def prepare_cpu(threads: int) -> None:
    """Sets this process up for computing on the CPU; call it before the first tensor is made.

    An operation uses up to ``threads`` threads; if ``threads`` is 0, torch chooses the number.

    Denormal numbers are flushed to zero. Decayed optimizer state has many of them, and x86 cores process a denormal
    number a hundred times slower than a normal one.

    The process keeps freed memory for its next allocations. Every training step allocates the same tensors again. By
    default, glibc requests the memory of each large tensor from the system and returns it afterwards. The first access
    to each page is then a page fault, and these faults take 5 to 10 % of a step.
    """
    if threads:
        torch.set_num_threads(threads)
    # A thread inherits the setting for denormal numbers when it starts, so this call precedes all parallel operations.
    torch.set_flush_denormal(True)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:  # only glibc has mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 2**26)
