"""The engine's own kernels for CPUs: paged attention and everything between matrix products.

PyTorch's operators need a copy of the keys and values of every sequence for each step, and some forty calls a layer;
these read the cache where it lies, in five passes a layer. Where they cannot be had (no compiler, an unusual head size)
the engine runs on PyTorch's.
"""

from __future__ import annotations

import torch

from nanochat_core.config import ModelConfig
from nanochat_core.engine.backends.cpu.library import load_kernels

# What kernels.cpp is compiled for.
_HEAD_DIMS = frozenset({16, 32, 64, 128})
_LANES = 16


def usable(config: ModelConfig, block_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels serve such a model here; builds them when they are not yet."""
    return (
        device.type == "cpu"
        and dtype in (torch.float32, torch.bfloat16)
        and config.head_dim in _HEAD_DIMS
        and block_size % _LANES == 0
        and load_kernels() is not None
    )
