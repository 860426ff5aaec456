"""The inputs of one step for the GPU kernels: the tokens, and the places of their keys and values in the cache."""

import dataclasses
from collections.abc import Sequence as Items

import numpy as np
import torch
from torch import Tensor

from nanochat_core.engine.cache_groups import CacheGroup
from nanochat_core.engine.kv_cache import BlockMemory
from nanochat_core.engine.scheduler import Chunk
from nanochat_core.engine.step import TokenBatch

# Kernels load this many numbers together, so each array begins at an index that is a multiple of this number.
_ALIGNMENT = 4
# Padding tokens use this row of the block tables. The row names one extra block of each group, to which only padding
# tokens write.
_PADDING_ROW = 0


@dataclasses.dataclass(frozen=True)
class Pieces:
    """How a large step is divided into sequences and into tiles of up to ``tile_rows`` tokens. Tensors are int32."""

    tiles: Tensor  # (tiles, 4), see :func:`~nanochat_core.engine.backends.gpu.kernels.attend_tiles`
    first_tokens: Tensor  # (sequences + 1,) index of each sequence's first token, followed by the number of tokens
    ends: Tensor  # (sequences,) for each sequence, the number of its tokens in the cache after the step
    longest: int  # largest number of tokens that one sequence has in the step

    @property
    def sequences(self) -> int:
        return self.ends.numel()


@dataclasses.dataclass(frozen=True)
class Step:
    """Inputs of a step: int32 tensors on the device.

    Steps of the same size use the same addresses, because CUDA graphs read fixed addresses.
    """

    ids: Tensor  # (tokens,); the three following arrays have this shape too
    previous_ids: Tensor
    positions: Tensor
    rows: Tensor  # row of each token's sequence in ``tables``
    slots: list[Tensor]  # for each cache group, (tokens,) block * block_size + offset
    tables: list[Tensor]  # for each cache group, (sequences + 1, blocks) block ids
    pieces: Pieces | None  # sequences and tiles of a large step; if None, attention is computed token by token

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    def only(self, wanted: Tensor) -> "Step":
        """The step reduced to the tokens with the indices ``wanted`` (int64). Attention is computed token by token."""
        return dataclasses.replace(
            self,
            ids=self.ids.index_select(0, wanted),
            previous_ids=self.previous_ids.index_select(0, wanted),
            positions=self.positions.index_select(0, wanted),
            rows=self.rows.index_select(0, wanted),
            slots=[each.index_select(0, wanted) for each in self.slots],
            pieces=None,
        )


class StepInputs:
    """Packs the tokens and the cache places of a step into one buffer, so that one copy brings them to the device."""

    def __init__(self, cache: BlockMemory, *, tokens: int, sequences: int, tile_rows: int, no_token: int) -> None:
        """A step has at most ``tokens`` tokens and ``sequences`` sequences, and a tile at most ``tile_rows`` tokens."""
        self._groups, self._block_size, self._tile_rows = cache.groups, cache.block_size, tile_rows
        self._no_token = no_token
        layout = _Layout(
            len(cache.groups),
            tokens=_aligned(tokens),
            tiles=tokens // tile_rows + sequences,
            rows=sequences + 1,
            blocks=_aligned(-(-cache.config.context_length // cache.block_size)),
        )
        # While the device copies one buffer, the next step is written to the other buffer.
        self._host = [_HostBuffer(layout, cache.groups, pinned=cache.device.type == "cuda") for _ in range(2)]
        self._device = torch.zeros(layout.size, dtype=torch.int32, device=cache.device)
        self._layout = layout
        self._steps: dict[int, Step] = {}

    def fill(self, chunks: Items[Chunk], batch: TokenBatch, tokens: int, *, in_pieces: bool) -> Step:
        """Copy ``batch``, the tokens of ``chunks``, to the device, padded to ``tokens`` tokens.

        If ``in_pieces`` is set, ``Step.pieces`` is filled too, and attention then processes successive tokens together.
        """
        self._host.reverse()
        host, count = self._host[0], batch.rows.shape[1]
        assert count <= tokens <= self._layout.tokens
        host.wait()
        by_token, tables = host.by_token, host.tables
        for row, chunk in enumerate(chunks, 1):
            host.write_tables(row, chunk.seq.block_tables)
        rows = np.arange(1, len(chunks) + 1)
        if count > len(chunks):
            rows = rows.repeat([chunk.length for chunk in chunks])
        by_token[:3, :count] = batch.rows
        by_token[3, :count] = rows
        blocks, offsets = np.divmod(batch.rows[2], self._block_size)
        for g in range(len(self._groups)):
            by_token[4 + g, :count] = tables[rows, g, blocks] * self._block_size + offsets
        if count < tokens:
            by_token[:, count:tokens] = 0
            by_token[1, count:tokens] = self._no_token
            for g, group in enumerate(self._groups):
                by_token[4 + g, count:tokens] = group.num_blocks * self._block_size
        tiles = self._cut(chunks) if in_pieces else []
        if tiles:
            host.tiles[: len(tiles)] = tiles
            host.sequences[0, 1 : len(chunks) + 1] = np.cumsum([chunk.length for chunk in chunks])
            host.sequences[1, : len(chunks)] = [chunk.end for chunk in chunks]
        used = self._layout.tables_at + (len(chunks) + 1) * self._layout.row_size
        host.copy_to(self._device, used)
        step = self._step(tokens)
        if not tiles:
            return step
        _, tiled, sequences, _ = self._layout.split(self._device)
        longest = max(chunk.length for chunk in chunks)
        pieces = Pieces(tiled[: len(tiles)], sequences[0, : len(chunks) + 1], sequences[1, : len(chunks)], longest)
        return dataclasses.replace(step, pieces=pieces)

    def _cut(self, chunks: Items[Chunk]) -> list[tuple[int, int, int, int]]:
        """Divide the chunks into tiles; see :class:`Pieces`."""
        tiles = []
        first = 0
        for row, chunk in enumerate(chunks, 1):
            for at in range(0, chunk.length, self._tile_rows):
                tiles.append((first + at, min(self._tile_rows, chunk.length - at), chunk.start + at, row))
            first += chunk.length
        return tiles

    def _step(self, tokens: int) -> Step:
        if tokens not in self._steps:
            by_token, _, _, tables = self._layout.split(self._device)
            ids, previous_ids, positions, rows, *slots = by_token[:, :tokens]
            by_group = [tables[:, g] for g in range(len(self._groups))]
            self._steps[tokens] = Step(ids, previous_ids, positions, rows, slots, by_group, pieces=None)
        return self._steps[tokens]


class _Layout:
    """Sizes of the arrays in the packed step buffer.

    The buffer has four parts: the arrays with one number per token (ids, previous ids, positions, rows, and slots of
    each group), the tiles, the arrays with one number per sequence (first tokens and ends), and the block tables.
    """

    def __init__(self, groups: int, *, tokens: int, tiles: int, rows: int, blocks: int) -> None:
        self.groups, self.tokens, self.blocks = groups, tokens, blocks
        self.row_size = groups * blocks
        self._sizes = [(4 + groups) * tokens, 4 * tiles, 2 * _aligned(rows), rows * self.row_size]
        self.tables_at = sum(self._sizes[:3])
        self.size = sum(self._sizes)
        self.rows = rows

    def split(self, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Views of the four parts.

        Their shapes are (4 + groups, tokens) for the numbers per token, (tiles, 4) for the tiles, (2, rows rounded up)
        for the numbers per sequence, and (rows, groups, blocks) for the block tables.
        """
        by_token, tiles, sequences, tables = buffer.split(self._sizes)
        shape = (-1, self.groups, self.blocks)
        return by_token.view(-1, self.tokens), tiles.view(-1, 4), sequences.view(2, -1), tables.view(shape)


class _HostBuffer:
    """A step buffer in host memory, and views of its arrays. The buffer is copied to the device."""

    def __init__(self, layout: _Layout, groups: Items[CacheGroup], *, pinned: bool) -> None:
        self.buffer = torch.zeros(layout.size, dtype=torch.int32, pin_memory=pinned)
        parts = layout.split(self.buffer)
        self.by_token, self.tiles, self.sequences, self.tables = (part.numpy() for part in parts)
        self.tables[_PADDING_ROW] = np.array([[group.num_blocks] for group in groups])
        # For each row and group: the block table (a list) that was last written there, and how many of its entries were
        # written. If the same list is written again, only its new entries must be copied, because a table only grows. A
        # sequence that is admitted again gets a new list.
        self._written: list[list[tuple[list[int], int]]] = [[([], 0)] * layout.groups for _ in range(layout.rows)]
        self._copied = torch.cuda.Event() if pinned else None

    def wait(self) -> None:
        """Wait until the device has copied this buffer. The device first finishes earlier steps."""
        if self._copied is not None:
            self._copied.synchronize()

    def copy_to(self, device: Tensor, count: int) -> None:
        """Queue a copy of the first ``count`` numbers to the device."""
        device[:count].copy_(self.buffer[:count], non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(device.device))

    def write_tables(self, row: int, tables: list[list[int]]) -> None:
        """Write the block tables of a sequence to the row ``row`` of this buffer. Only new entries are written."""
        written = self._written[row]
        for g, table in enumerate(tables):
            length = len(table)
            earlier, there = written[g]
            if earlier is not table:
                there = 0
            if there < length:
                self.tables[row, g, there:length] = table[there:]
                written[g] = table, length


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT
