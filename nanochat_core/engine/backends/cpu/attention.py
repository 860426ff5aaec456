"""The paged KV cache for the CPU kernels, and the description of a ragged batch that they read."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from nanochat_core.engine.backends.cpu.library import Batch, Layer
from nanochat_core.engine.kv_cache import BlockMemory, slots_of
from nanochat_core.engine.scheduler import Chunk


class CpuCache(BlockMemory):
    """The cache for the CPU kernels.

    The keys of a block have shape (n_kv_head, head_dim, block_size), its values (n_kv_head, block_size, head_dim).
    """

    def attention(self, chunks: Iterable[Chunk]) -> CpuAttention:
        """Prepare attention for a batch of these chunks."""
        return CpuAttention(self, chunks)


class CpuAttention:
    """Tells the kernels where the tokens of one ragged batch are in the cache.

    Attributes:
        chunks: the chunks in the order that the batch must have.
    """

    def __init__(self, cache: CpuCache, chunks: Iterable[Chunk]) -> None:
        self.chunks = list(chunks)
        self._cache = cache
        self._start = np.array([chunk.start for chunk in self.chunks], np.int32)
        self._first_token = np.zeros(len(self.chunks) + 1, np.int32)
        np.cumsum([chunk.length for chunk in self.chunks], out=self._first_token[1:])
        # For each group: the tokens' slots, the concatenated block tables, and the index at which each table begins.
        self._places = [self._places_in(group) for group in range(len(cache.groups))]

    def _places_in(self, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tables = [chunk.seq.block_tables[group] for chunk in self.chunks]
        first_entry = np.zeros(len(tables), np.int64)
        np.cumsum([len(table) for table in tables[:-1]], out=first_entry[1:])
        slots = slots_of(self.chunks, group, self._cache.block_size)
        return slots, np.array([block for table in tables for block in table], np.int32), first_entry

    def batch(self, ids: Tensor, positions: Tensor, turns: Tensor, scale: Tensor, queries: Tensor) -> Batch:
        """The batch as a C struct. It is valid as long as the tensors and this object exist."""
        return Batch(
            ids.numel(),
            len(self.chunks),
            torch.get_num_threads(),
            ids.data_ptr(),
            positions.data_ptr(),
            _address(self._first_token),
            _address(self._start),
            turns.data_ptr(),
            scale.data_ptr(),
            queries.data_ptr(),
        )

    def layer(self, index: int, qkv_columns: int, value_table: int | None, value_columns: int) -> Layer:
        """One layer's cache as a C struct.

        Args:
            qkv_columns: number of columns of the product with the q, k, v and value gate weights.
            value_table: address of the layer's value embeddings; None if it has none.
            value_columns: number of columns of the value embeddings.
        """
        cache, group = self._cache, self._cache.group_of[index]
        slots, tables, first_entry = self._places[group]
        keys, values = cache.blocks[index]
        return Layer(
            keys.data_ptr(),
            values.data_ptr(),
            _address(slots),
            _address(tables),
            _address(first_entry),
            value_table,
            value_columns,
            qkv_columns,
            cache.windows[group],
        )


def _address(array: np.ndarray) -> int:
    return array.ctypes.data
