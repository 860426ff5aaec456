"""The engine's own kernels for GPUs. Small steps run as CUDA graphs.

Reading weights and starting kernels take most of the time of a small step. PyTorch's operators start about forty
kernels per layer and copy the keys and values of every sequence. With the engine's own kernels, a layer needs four
matrix products and four or five kernels, and attention reads keys and values directly from the cache. A step of few
tokens is one CUDA graph: one call starts all its kernels. Without Triton, or with an unusual head size or dtype, the
engine uses PyTorch's operators.
"""

import importlib.util

import torch

from nanochat_core.config import ModelConfig

_HEAD_DIMS = frozenset({16, 32, 64, 128, 256})


def usable(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels can run a model of this configuration on this device."""
    return (
        device.type == "cuda"
        and dtype in (torch.float32, torch.bfloat16)
        and config.head_dim in _HEAD_DIMS
        and importlib.util.find_spec("triton") is not None
    )
