"""The engine's own kernels for GPUs, and steps as CUDA graphs.

A small step is bound by reading weights and by starting kernels: PyTorch's operators are some forty of them a layer,
and need a copy of the keys and values of every sequence. Here a layer is four matrix products and five kernels,
attention reads the cache where it lies, and a step of few tokens is one graph, started at once. Where they cannot be
had (no Triton, an unusual head size) the engine runs on PyTorch's operators.
"""

from __future__ import annotations

import importlib.util

import torch

from nanochat_core.config import ModelConfig

_HEAD_DIMS = frozenset({16, 32, 64, 128, 256})


def usable(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels serve such a model here."""
    return (
        device.type == "cuda"
        and dtype in (torch.float32, torch.bfloat16)
        and config.head_dim in _HEAD_DIMS
        and importlib.util.find_spec("triton") is not None
    )
