"""FlashAttention 3 over the paged cache, if its package is installed."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

# This package runs on Hopper GPUs. No other FlashAttention package supports cache blocks of any size.
_MODULE, _CAPABILITY = "flash_attn_interface", 9

FlashKernel = Callable[..., Any]


def flash_kernel(device: torch.device, dtype: torch.dtype) -> FlashKernel | None:
    """The function ``flash_attn_with_kvcache`` (arXiv 2407.08608), or None if it cannot run on this device."""
    if device.type != "cuda" or dtype != torch.bfloat16 or torch.cuda.get_device_capability(device)[0] != _CAPABILITY:
        return None
    try:
        kernel: FlashKernel = importlib.import_module(_MODULE).flash_attn_with_kvcache
    except ImportError:
        return None
    return kernel
