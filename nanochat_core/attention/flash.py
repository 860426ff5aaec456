"""Attention by the ``flash-attn`` packages (FlashAttention 2, arXiv 2307.08691, and 3, arXiv 2407.08608)."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanochat_core.attention.interface import Attention

# For each package, fastest first: its module, and the lowest and the highest compute capability that it supports.
# FlashAttention 3 runs only on Hopper.
FLASH_PACKAGES = (("flash_attn_interface", (9, 0), (9, 9)), ("flash_attn", (8, 0), (99, 9)))


def flash_attention(device: torch.device, dtype: torch.dtype) -> Attention | None:
    """The function of the fastest installed flash-attn package that supports the device and dtype; None without one."""
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    capability = torch.cuda.get_device_capability(device)
    for module, least, most in FLASH_PACKAGES:
        if least <= capability <= most:
            try:
                return _attention_of(importlib.import_module(module).flash_attn_func)
            except ImportError:
                continue
    return None


def _attention_of(kernel: Callable[..., Any]) -> Attention:
    def attend(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        y = kernel(q, k, v, causal=True, window_size=(window, 0))
        # Early versions of FlashAttention 3 also return the logarithms of the softmax's sums.
        output: Tensor = y[0] if isinstance(y, tuple) else y
        return output

    return attend
