"""The paged KV cache's memory, whatever reads it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as Items

import numpy as np
import torch
from torch import Tensor

from nanochat_core.config import ModelConfig
from nanochat_core.engine.cache_groups import CacheGroup
from nanochat_core.engine.scheduler import Chunk


class BlockMemory:
    """Memory of the keys and values of all layers, in blocks of ``block_size`` tokens.

    Attributes:
        groups: layers that share block tables, each with blocks of its own.
        group_of: for each layer the index of its group.
        windows: for each group how many tokens before itself a token sees.
        blocks: for each layer (2, num_blocks, block_size * kv_dim) its keys and its values.
    """

    def __init__(
        self,
        config: ModelConfig,
        groups: Items[CacheGroup],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        spare: int = 0,
    ) -> None:
        """
        Args:
            spare: blocks of each group that the block manager does not know of, after those that it does.
        """
        self.config, self.groups, self.block_size = config, groups, block_size
        self.dtype, self.device = dtype, device
        self.group_of = [next(g for g, group in enumerate(groups) if i in group.layers) for i in range(config.depth)]
        self.windows = [config.context_length if group.window is None else group.window for group in groups]
        numbers = block_size * config.kv_dim
        # Those of a group's layers lie together, so that one operation copies a block of all of them.
        self._memory = [
            zeros((len(group.layers), 2, group.num_blocks + spare, numbers), dtype, device) for group in groups
        ]
        self.blocks = [self._memory[g][groups[g].layers.index(i)] for i, g in enumerate(self.group_of)]

    def copy(self, chunks: Iterable[Chunk]) -> None:
        """Begin blocks with what chunks take over from others; to be done before anything of a step is written.

        One after another, because a block that has been copied may be the next one to be overwritten.
        """
        for chunk in chunks:
            if chunk.copied:
                for memory, table, source in zip(self._memory, chunk.seq.block_tables, chunk.copied, strict=True):
                    memory[:, :, table[chunk.start // self.block_size]] = memory[:, :, source]


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, because a masked key that is not a number would still spoil the sum over values.

    In host memory they take no space before they are written: numpy, unlike torch, asks the system for clean pages.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def slots_of(chunks: Items[Chunk], group: int, size: int) -> np.ndarray:
    """Cache slot of each token of the batch in a group of layers."""
    return np.array(
        [
            chunk.seq.block_tables[group][position // size] * size + position % size
            for chunk in chunks
            for position in range(chunk.start, chunk.end)
        ]
    )
