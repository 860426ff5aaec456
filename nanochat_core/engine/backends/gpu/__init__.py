"""The engine's own kernels for GPUs, and steps as CUDA graphs.

A small step is bound by reading weights and by starting kernels. PyTorch's operators start some forty kernels a layer,
and need a copy of the keys and values of every sequence. Here a layer takes four matrix products and five kernels,
attention reads keys and values directly from the cache, and a step of few tokens is one graph that is started at once.
Without Triton, or with an unusual head size, the engine uses PyTorch's operators.
"""

from __future__ import annotations

import importlib.util

import torch

from nanochat_core.config import ModelConfig

_HEAD_DIMS = frozenset({16, 32, 64, 128, 256})


def usable(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels can run such a model on this device."""
    return (
        device.type == "cuda"
        and dtype in (torch.float32, torch.bfloat16)
        and config.head_dim in _HEAD_DIMS
        and importlib.util.find_spec("triton") is not None
    )
