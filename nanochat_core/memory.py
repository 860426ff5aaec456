"""Memory of the device: recognizing that none is left, and giving it back."""

from __future__ import annotations

import gc
import threading

import torch

# Texts in out-of-memory errors that have no type of their own: from the CPU's allocator, CUDA, cuBLAS and cuDNN.
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")
# Held while a CUDA graph is recorded: meanwhile no thread may return memory to the device.
RECORDING = threading.Lock()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the machine had too little free memory.

    Such an error damages nothing: a smaller request may succeed, and so may the same request later.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def free_memory(device: torch.device) -> None:
    """Returns unreferenced memory to the device, for other allocations and other processes.

    Call it outside of ``except`` blocks: an exception that is being handled refers to everything in the frames that
    it passed through.
    """
    gc.collect()
    if device.type == "cuda":
        with RECORDING:
            torch.cuda.empty_cache()
