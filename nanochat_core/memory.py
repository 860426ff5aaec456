"""Recognizes out-of-memory errors, and returns unused memory to the device."""

import gc
import threading

import torch

# Texts in out-of-memory errors that are plain RuntimeErrors: from the CPU's allocator, CUDA, cuBLAS and cuDNN.
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")
# A thread that records a CUDA graph holds this lock, because no thread may return memory to the device meanwhile.
RECORDING = threading.Lock()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the machine had too little free memory.

    After such an error the program can continue. A smaller request may succeed, and so may the same request later.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def free_memory(device: torch.device) -> None:
    """Returns unreferenced memory to the device, for other allocations and other processes.

    Call it outside of ``except`` blocks. While an exception is handled, it refers to all local variables of the
    functions that it passed through, and their memory is not free.
    """
    gc.collect()
    if device.type == "cuda":
        with RECORDING:
            torch.cuda.empty_cache()
