"""Which device and which precision to compute in, and how fast the device is."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanochat_core.errors import UserError

# fp8 is for the matrix products of training alone (nanochat_core/training/fp8.py); everything else is in bf16 then.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
FP8_CAPABILITY = (9, 0)
# How errors that have no type of their own begin: the CPU's allocator, CUDA's own calls, cuBLAS and cuDNN.
_NO_MEMORY = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")
# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
# Held while a CUDA graph is recorded, during which no thread may give memory back.
RECORDING = threading.Lock()
# Dense bf16 TFLOP/s with fp32 sums, from NVIDIA's data sheets of each card (half of what they print where that is "with
# sparsity") and the white papers of Ampere (GA102) and Ada for the GeForce cards. All words must be in the card's name;
# the first match counts. Cards that are cut down under the same name, laptops' and slices (MIG), are left out.
PEAK_TFLOPS = (
    ("B200", 2250.0),
    ("GH200", 989.4),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.5),
    ("H100", 989.4),
    ("A100", 312.0),
    ("L40S", 362.05),
    ("L4", 121.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)
CUT_DOWN = {"MIG", "Laptop", "D"}


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
    """The dtype of activations for ``auto`` or a name in :data:`DTYPES`.

    ``auto`` is bf16 on GPUs that compute in it and fp32 elsewhere: CPUs differ in which of the two is faster. With fp16
    the loss needs a :class:`LossScaler`, with fp8 the model :func:`~nanochat_core.training.fp8.convert_to_fp8`.

    Raises:
        UserError: fp16 without a GPU, or fp8 without one that multiplies in it.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if name == "fp16" and device.type != "cuda":
        raise UserError("dtype fp16 needs a GPU; use fp32 or bf16 on a CPU")
    if name == "fp8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_CAPABILITY):
        raise UserError("dtype fp8 needs a GPU of compute capability 9.0 (H100) or later; use bf16 or auto")
    return DTYPES[name]


def muon_dtype(device: torch.device) -> torch.dtype:
    """What Muon orthogonalizes in: bf16 where the hardware multiplies it faster than fp32."""
    return torch.bfloat16 if device.type == "cuda" or cpu_multiplies_bf16() else torch.float32


def cpu_multiplies_bf16() -> bool:
    """Whether the CPU has instructions for products of bf16 numbers."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.9 does not tell
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _keep_freed_memory() -> None:
    """Let this process keep the memory that it frees instead of giving it back to the system.

    Every step of training allocates the same tensors anew. On a CPU, glibc would map each of the large ones from the
    system and unmap it afterwards, so that each first touch of a page were a fault: 5 to 10 % of a step. Does nothing
    where the C library is another one.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 2**26)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory left for what was asked, on the device or the machine.

    Nothing is broken then: less may fit, and the same may fit in a moment.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def free_memory(device: torch.device) -> None:
    """Give what nothing refers to any more back to the device, where other allocations and processes find it.

    An exception that is being handled refers to all that the frames it came through hold.
    """
    gc.collect()
    if device.type == "cuda":
        with RECORDING:
            torch.cuda.empty_cache()


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """The same numbers on the device, without waiting for what it is doing."""
    host = torch.from_numpy(values)
    if device.type != "cuda":
        return host.to(device)
    # From other memory CUDA copies larger things only when the device has done what it was given before.
    return host.pin_memory().to(device, non_blocking=True)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s that the device reaches at best; None where that is not known."""
    if device.type != "cuda":
        return None
    words = set(re.split(r"[ -]", torch.cuda.get_device_name(device)))
    if words & CUT_DOWN:
        return None
    return next((1e12 * tflops for card, tflops in PEAK_TFLOPS if set(card.split()) <= words), None)


class LossScaler:
    """Dynamic loss scaling for fp16 (arXiv 1710.03740).

    Gradients smaller than fp16 can hold are lost, so the loss is multiplied by ``factor`` before the backward pass and
    the gradients are divided by it after. It halves when a gradient overflows, and that step is skipped; it doubles
    after ``growth_interval`` steps without. What it does follows from the gradients alone, so a resumed run goes on
    exactly.
    """

    def __init__(self, factor: float = 2.0**16, good_steps: int = 0, growth_interval: int = 2000) -> None:
        self.factor, self.good_steps, self.growth_interval = factor, good_steps, growth_interval

    def update(self, *, finite: bool) -> None:
        """Set the factor of the next step after one whose gradients were finite or not."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.factor /= 2
        elif self.good_steps == self.growth_interval:
            self.factor, self.good_steps = self.factor * 2, 0


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
    _keep_freed_memory()
