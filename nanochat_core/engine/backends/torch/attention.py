"""The paged KV cache for PyTorch's operators, and attention of a ragged batch over it.

On a CPU, a token's attention must have the same bits whether the token is decoded, prefilled or recomputed, alone or in
a batch. PyTorch adds numbers in the same order only for some shapes, which were found by trying all shapes with MKL on
AVX-512. Attention therefore uses only shapes with the following properties:

- The number of query rows is a multiple of a number that depends on the CPU (:func:`row_multiple`), because PyTorch
  uses other matrix kernels for fewer rows.
- Keys are processed in tiles of ``KEY_TILE``. After each tile, the kernel rescales its running softmax. Tiles begin at
  multiples of ``KEY_TILE`` in the sequence, also in layers with a window, so that the softmax is rescaled after the
  same keys.
- The last tile is either full or at most half full, because PyTorch splits longer sums in two. The number of keys in
  the last tile is a multiple of :data:`KEY_MULTIPLE`.
"""

import functools
import math
from collections.abc import Iterable
from collections.abc import Sequence as Items

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_core.device import to_device
from nanochat_core.engine.cache_groups import CacheGroup
from nanochat_core.engine.config import KEY_TILE, MOST_ROWS
from nanochat_core.engine.kv_cache import BlockMemory, slots_of
from nanochat_core.engine.scheduler import Chunk
from nanochat_core.model import GPT, QK_SCALE

KEY_MULTIPLE = 16
# Chunks of at most MOST_ROWS tokens share a padded batch if the lengths of their contexts lie between the same two
# successive powers of two. A context with fewer tokens than this number is treated like a context with this number of
# tokens.
SMALLEST_BUCKET = 256


class TorchCache(BlockMemory):
    """The cache for attention by PyTorch's operators.

    Queries and keys are unit vectors. A score is the product of a query and a key, multiplied by ``score_scale``. The
    number of query rows is padded to a multiple of ``row_multiple``.
    """

    def __init__(self, model: GPT, groups: Items[CacheGroup], block_size: int) -> None:
        super().__init__(model, groups, block_size)
        config, dtype, device = self.config, self.dtype, self.device
        self.score_scale = QK_SCALE**2 * config.head_dim**0.5
        self.row_multiple = row_multiple(config.head_dim, dtype) if device.type == "cpu" else 1
        # For each group, the mask by distance: entry ``_reach + d`` is for a key that is ``d`` positions after the
        # query.
        self._reach = config.context_length + 2 * KEY_TILE
        distance = torch.arange(-self._reach, self._reach, device=device)
        self._visible = [
            torch.zeros(distance.shape, dtype=dtype, device=device).masked_fill_(
                (distance > 0) | (distance < -window), -math.inf
            )
            for window in self.windows
        ]
        # Keys and values of each layer: (2, num_blocks, block_size, n_kv_head, head_dim).
        self._layers = [each.view(2, -1, block_size, config.n_kv_head, config.head_dim) for each in self.blocks]

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store keys and values (tokens, n_kv_head, head_dim) at ``slots`` = block * block_size + offset."""
        keys, values = self._layers[layer].flatten(1, 2)
        keys.index_copy_(0, slots, k)
        values.index_copy_(0, slots, v)

    def mask(self, group: int, first: np.ndarray, keys: int) -> Tensor:
        """The mask that is added to the scores: 0 for visible keys, -inf for hidden keys.

        Its shape is (chunks, 1, rows * query heads per kv head, keys). ``keys`` is the number of successive keys.
        ``first`` (chunks, rows) is, for each query, the position of the first key minus the query's position.
        """
        shared = self.config.n_head // self.config.n_kv_head
        places = to_device(np.repeat(first + self._reach, shared, axis=1), self.device)
        return self._visible[group].unfold(0, keys, 1)[places].unsqueeze(1)

    def gather(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Read keys and values of ``blocks`` (rows, n). Both have shape (rows, n * block_size, n_kv_head, head_dim)."""
        rows, flat = blocks.size(0), blocks.flatten()
        shape = (rows, -1, self.config.n_kv_head, self.config.head_dim)
        keys, values = self._layers[layer]
        return keys.index_select(0, flat).view(shape), values.index_select(0, flat).view(shape)


class PagedAttention:
    """Attention for one ragged batch, see :class:`~nanochat_core.engine.backends.torch.network.Attend`.

    The batch must have the order of the attribute ``chunks``. This order can differ from the order of the given chunks.
    """

    def __init__(self, cache: TorchCache, chunks: Iterable[Chunk]) -> None:
        self._cache = cache
        grouped = _group(chunks)
        self.chunks = [chunk for group in grouped for chunk in group]
        self._slots = [
            to_device(slots_of(self.chunks, g, cache.block_size), cache.device) for g in range(len(cache.groups))
        ]
        self._batches = [_PaddedBatch(cache, group) for group in grouped]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._cache.write(layer, self._slots[self._cache.group_of[layer]], k, v)
        if len(self._batches) == 1:
            return self._batches[0].attend(layer, q)
        parts = q.split([batch.tokens for batch in self._batches])
        return torch.cat([batch.attend(layer, part) for batch, part in zip(self._batches, parts, strict=True)])


class _PaddedBatch:
    """Chunks whose attention is computed together.

    Queries are padded to (chunks, rows), and keys are padded to the longest context.
    """

    def __init__(self, cache: TorchCache, chunks: Items[Chunk]) -> None:
        self._cache = cache
        self._chunks = chunks
        self.tokens = sum(chunk.length for chunk in chunks)
        self._rows = _round_up(max(chunk.length for chunk in chunks), cache.row_multiple)
        starts = np.array([chunk.start for chunk in chunks])
        lengths = np.array([chunk.length for chunk in chunks])
        row = np.arange(self._rows)
        # The position of every row; padding rows repeat the position of the chunk's last row.
        self._positions = starts[:, None] + np.minimum(row, lengths[:, None] - 1)
        # Rows of the padded batch that contain queries. None in two cases: all rows contain queries, or each chunk has
        # one query, in its first row (decoding).
        self._decodes = self.tokens == len(chunks)
        is_token = row < lengths[:, None]
        self._places = None if self._decodes or is_token.all() else to_device(np.flatnonzero(is_token), cache.device)
        self._padded: Tensor | None = None
        self._views: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Compute attention for the queries (tokens, n_head, head_dim); the result has the same shape."""
        config, count, rows = self._cache.config, len(self._chunks), self._rows
        blocks, mask = self._view(self._cache.group_of[layer])
        keys, values = self._cache.gather(layer, blocks)
        # The query heads that share a kv head become rows of one matrix product with that kv head.
        heads, shared = config.n_kv_head, config.n_head // config.n_kv_head
        q = self._pad(q).view(count, rows, heads, shared, -1).permute(0, 2, 1, 3, 4)
        y = F.scaled_dot_product_attention(
            q.reshape(count, heads, rows * shared, -1),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=mask,
            scale=self._cache.score_scale,
        )
        y = y.view(count, heads, rows, shared, -1)
        if self._decodes:
            return y[:, :, 0].reshape(count, config.n_head, -1)
        y = y.permute(0, 2, 1, 3, 4).reshape(count * rows, config.n_head, -1)
        return y if self._places is None else y.index_select(0, self._places)

    def _pad(self, q: Tensor) -> Tensor:
        """The queries padded to (chunks * rows, n_head, head_dim); the padding rows may contain any numbers."""
        if self._rows == 1 or (self._places is None and not self._decodes):
            return q
        if self._padded is None:
            self._padded = q.new_zeros(len(self._chunks) * self._rows, *q.shape[1:])
        if self._places is None:
            self._padded[:: self._rows] = q
            return self._padded
        return self._padded.index_copy_(0, self._places, q)

    def _view(self, group: int) -> tuple[Tensor, Tensor]:
        """The ids (chunks, n) of the blocks to gather in a cache group, and the mask.

        The mask is as :meth:`TorchCache.mask` returns it.
        """
        if group not in self._views:
            self._views[group] = self._build_view(group)
        return self._views[group]

    def _build_view(self, group: int) -> tuple[Tensor, Tensor]:
        cache, size = self._cache, self._cache.block_size
        first = np.maximum(self._positions[:, 0] - cache.windows[group], 0) // KEY_TILE * KEY_TILE
        longest = int((self._positions[:, -1] + 1 - first).max())
        width = _round_up(_padded_keys(longest), size) // size
        blocks: list[int] = []
        for chunk, begin in zip(self._chunks, (first // size).tolist(), strict=True):
            visible = chunk.seq.block_tables[group][begin : begin + width]
            blocks += visible
            blocks += [0] * (width - len(visible))
        mask = cache.mask(group, first[:, None] - self._positions, width * size)
        return to_device(np.array(blocks).reshape(-1, width), cache.device), mask


@functools.cache
def row_multiple(head_dim: int, dtype: torch.dtype) -> int:
    """Number of query rows for which attention on this CPU has the same bits as for many rows.

    The result is the smallest of 1, 2 and 4 that passes a test, and otherwise MOST_ROWS.
    """
    draw = torch.Generator().manual_seed(0)
    for rows in (1, 2, 4):
        if all(_same_bits(rows, keys, head_dim, dtype, draw) for keys in (KEY_MULTIPLE, 3 * KEY_MULTIPLE, KEY_TILE)):
            return rows
    return MOST_ROWS


def _same_bits(rows: int, keys: int, head_dim: int, dtype: torch.dtype, draw: torch.Generator) -> bool:
    q, k, v = (torch.randn(2, 4, length, head_dim, generator=draw).to(dtype) for length in (64, keys, keys))
    mask = torch.zeros(1, 1, 64, keys, dtype=dtype)
    many = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    few = [F.scaled_dot_product_attention(part, k, v, attn_mask=mask[:, :, :rows]) for part in q.split(rows, dim=2)]
    return torch.equal(torch.cat(few, dim=2), many)


def _group(chunks: Iterable[Chunk]) -> list[list[Chunk]]:
    """Group chunks of at most MOST_ROWS tokens by the size of their context. Each longer chunk is a group by itself."""
    short: dict[int, list[Chunk]] = {}
    long: list[list[Chunk]] = []
    for chunk in chunks:
        if chunk.length <= MOST_ROWS:
            short.setdefault(max(chunk.end, SMALLEST_BUCKET).bit_length(), []).append(chunk)
        else:
            long.append([chunk])
    return [*short.values(), *long]


def _padded_keys(length: int) -> int:
    """Round up to a number of keys for which PyTorch adds numbers in the same order as for a longer context."""
    whole, rest = length // KEY_TILE * KEY_TILE, length % KEY_TILE
    return whole + (_round_up(rest, KEY_MULTIPLE) if rest <= KEY_TILE // 2 else KEY_TILE)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
