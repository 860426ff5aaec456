"""Memory of the paged KV cache, shared by all backends.

A sequence's length is not known in advance. One contiguous region per sequence would therefore waste memory, or would
have to move when the sequence grows. The cache is instead divided into blocks of equal size, like an operating system's
pages, and each sequence has a table of its blocks (PagedAttention, Kwon et al. 2023, arXiv 2309.06180). Token ``i`` is
in block ``table[i // block_size]`` at offset ``i % block_size``. Sequences that begin with the same tokens can share
blocks.
"""

import math
from collections.abc import Iterable
from collections.abc import Sequence as Items

import numpy as np
import torch
from torch import Tensor

from nanochat_core.engine.cache_groups import CacheGroup
from nanochat_core.engine.scheduler import Chunk
from nanochat_core.model import GPT


class BlockMemory:
    """Keys and values of all layers, in blocks of ``block_size`` tokens. Each cache group has blocks of its own."""

    def __init__(self, model: GPT, groups: Items[CacheGroup], block_size: int, spare: int = 0) -> None:
        """Each group gets ``spare`` extra blocks after the blocks that the block manager allocates."""
        self.config, self.groups, self.block_size = model.config, groups, block_size
        self.dtype, self.device = model.compute_dtype, model.cos.device
        config = self.config
        # ``group_of`` has the index of each layer's group. ``windows`` has, for each group, the number of earlier
        # tokens that a token sees.
        self.group_of = [next(g for g, group in enumerate(groups) if i in group.layers) for i in range(config.depth)]
        self.windows = [config.context_length if group.window is None else group.window for group in groups]
        # One tensor contains all layers of a group, so that one operation copies a block of all these layers.
        self._memory = [
            self._zeros((len(group.layers), 2, group.num_blocks + spare, block_size * config.kv_dim))
            for group in groups
        ]
        # For each layer, a tensor (2, num_blocks, block_size * kv_dim) of its keys and its values.
        self.blocks = [self._memory[g][groups[g].layers.index(i)] for i, g in enumerate(self.group_of)]

    def copy(self, chunks: Iterable[Chunk]) -> None:
        """Copy blocks for the newly admitted sequences.

        A block is copied if it begins with the sequence's next tokens and then differs. Call this method before the
        step writes any key or value. The copies are made one after another, because the target of one copy may be the
        source of an earlier copy.
        """
        for chunk in chunks:
            if chunk.copied:
                for memory, table, source in zip(self._memory, chunk.seq.block_tables, chunk.copied, strict=True):
                    memory[:, :, table[chunk.start // self.block_size]] = memory[:, :, source]

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        """Allocate zeroed memory, because a NaN in unused memory would make results NaN.

        A mask does not prevent this: hidden keys have the weight 0, and 0 * NaN is NaN.

        Host memory comes from numpy. Unlike torch, numpy asks the system for zeroed pages. The system provides physical
        memory for such a page only when the page is written.
        """
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        return torch.from_numpy(np.zeros(math.prod(shape) * self.dtype.itemsize, np.uint8)).view(self.dtype).view(shape)


def slots_of(chunks: Items[Chunk], group: int, size: int) -> np.ndarray:
    """Cache slot of each token of the batch in one group: block id * block size + offset in the block."""
    return np.array(
        [
            chunk.seq.block_tables[group][position // size] * size + position % size
            for chunk in chunks
            for position in range(chunk.start, chunk.end)
        ]
    )
