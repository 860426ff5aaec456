"""The engine's own kernels for CPUs: paged attention, elementwise operations, and products with fp32 and int8 weights.

With PyTorch, a layer calls about forty operators, and each step copies the keys and values of every sequence.
With these kernels, a layer needs four matrix products and four other kernels, and attention reads keys and values
directly from the cache. Without a compiler or a prebuilt library, on a system other than Linux, or with an unusual head
size, block size or dtype, the engine uses PyTorch's operators.
"""

import torch

from nanochat_core.config import ModelConfig
from nanochat_core.engine.backends.cpu.library import load_kernels

# Head sizes for which kernels.cpp has code. The block size must be a multiple of _LANES.
_HEAD_DIMS = frozenset({16, 32, 64, 128})
_LANES = 16
# What :func:`usable` needs, as a part of a sentence.
NEEDS = (
    f"a CPU, fp32 or bf16, heads of {', '.join(map(str, sorted(_HEAD_DIMS)))} numbers, a block size that is a multiple "
    f"of {_LANES}, and kernels that are built in or can be built (on Linux, with g++ or clang++)"
)


def usable(config: ModelConfig, block_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels can run a model of this configuration. Builds the kernels if necessary."""
    return (
        device.type == "cpu"
        and dtype in (torch.float32, torch.bfloat16)
        and config.head_dim in _HEAD_DIMS
        and block_size % _LANES == 0
        and load_kernels() is not None
    )
