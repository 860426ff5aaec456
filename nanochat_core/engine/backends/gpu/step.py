"""What the kernels are told of one step: its tokens and where their keys and values are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Items

import numpy as np
import torch
from torch import Tensor

from nanochat_core.engine.backends.batch import TokenBatch
from nanochat_core.engine.cache_groups import CacheGroup
from nanochat_core.engine.scheduler import Chunk

# Kernels read addresses of this many numbers at once.
_ALIGNMENT = 4
# Row of the block tables for tokens that only fill up a graph: their keys and values go where nobody looks.
_SCRATCH = 0


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Where the sequences of a step of many tokens are in it; tensors of int32.

    Attributes:
        tiles: (tiles, 4) see :func:`~nanochat_core.engine.backends.gpu.kernels.attend_tiles`.
        first_tokens: (sequences + 1,) where each begins, and the end of the last.
        ends: (sequences,) how many tokens of each are known after the step.
        longest: most tokens of one sequence in the step.
    """

    tiles: Tensor
    first_tokens: Tensor
    ends: Tensor
    longest: int

    @property
    def sequences(self) -> int:
        return self.ends.numel()


@dataclasses.dataclass(frozen=True)
class Step:
    """Tensors of int32 on the device, at the same address in every step.

    Attributes:
        ids, previous_ids, positions: (tokens,).
        rows: (tokens,) which row of ``tables`` is the token's.
        slots: for each group of layers (tokens,) block * block_size + offset.
        tables: for each group (sequences + 1, blocks) block ids.
        pieces: None attends token by token.
    """

    ids: Tensor
    previous_ids: Tensor
    positions: Tensor
    rows: Tensor
    slots: list[Tensor]
    tables: list[Tensor]
    pieces: Pieces | None

    @property
    def tokens(self) -> int:
        return self.ids.numel()


class StepInputs:
    """One buffer for all of that, so that a step takes one copy to the device."""

    def __init__(
        self,
        groups: Items[CacheGroup],
        block_size: int,
        context_length: int,
        *,
        tokens: int,
        sequences: int,
        tile_rows: int,
        no_token: int,
        device: torch.device,
    ) -> None:
        """
        Args:
            tokens, sequences: most that a step has.
            tile_rows: most tokens of a tile.
        """
        self._groups, self._block_size, self._tile_rows = groups, block_size, tile_rows
        self._no_token = no_token
        layout = _Layout(
            len(groups),
            tokens=_aligned(tokens),
            tiles=tokens // tile_rows + sequences,
            rows=sequences + 1,
            blocks=_aligned(-(-context_length // block_size)),
        )
        # While the device copies one, the next step is written to the other.
        self._host = [_HostBuffer(layout, groups, pinned=device.type == "cuda") for _ in range(2)]
        self._device = torch.zeros(layout.size, dtype=torch.int32, device=device)
        self._layout = layout
        self._steps: dict[int, Step] = {}

    def fill(self, chunks: Items[Chunk], batch: TokenBatch, tokens: int, *, in_pieces: bool) -> Step:
        """Tell the device of this batch, filled up to ``tokens`` tokens."""
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
        """Tiles of the chunks; see :class:`Pieces`."""
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


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where what is in the buffer.

    By token: ids, previous ids, positions, rows, and slots for each group. Then tiles, first tokens and ends of the
    sequences, and block tables.
    """

    groups: int
    tokens: int
    tiles: int
    rows: int
    blocks: int

    @property
    def tiles_at(self) -> int:
        return (4 + self.groups) * self.tokens

    @property
    def sequences_at(self) -> int:
        return self.tiles_at + 4 * self.tiles

    @property
    def tables_at(self) -> int:
        return self.sequences_at + 2 * _aligned(self.rows)

    @property
    def row_size(self) -> int:
        return self.groups * self.blocks

    @property
    def size(self) -> int:
        return self.tables_at + self.rows * self.row_size

    def split(self, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Views of (4 + groups, tokens), (tiles, 4), (2, rows or some more) and (rows, groups, blocks)."""
        return (
            buffer[: self.tiles_at].view(-1, self.tokens),
            buffer[self.tiles_at : self.sequences_at].view(-1, 4),
            buffer[self.sequences_at : self.tables_at].view(2, -1),
            buffer[self.tables_at :].view(-1, self.groups, self.blocks),
        )


class _HostBuffer:
    """What is copied to the device, and views of it."""

    def __init__(self, layout: _Layout, groups: Items[CacheGroup], *, pinned: bool) -> None:
        self.buffer = torch.zeros(layout.size, dtype=torch.int32, pin_memory=pinned)
        parts = layout.split(self.buffer)
        self.by_token, self.tiles, self.sequences, self.tables = (part.numpy() for part in parts)
        self.tables[_SCRATCH] = np.array([[group.num_blocks] for group in groups])
        # The table that each row shows for each group, and how much of it. A sequence's table only ever grows, and is
        # another list when the sequence starts again.
        self._shown: list[list[tuple[list[int], int]]] = [[([], 0)] * layout.groups for _ in range(layout.rows)]
        self._copied = torch.cuda.Event() if pinned else None

    def wait(self) -> None:
        """Until the device has copied what is here, which it may come to only after the steps before."""
        if self._copied is not None:
            self._copied.synchronize()

    def copy_to(self, device: Tensor, count: int) -> None:
        """Let the device copy the first ``count`` numbers when it comes to this step."""
        device[:count].copy_(self.buffer[:count], non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(device.device))

    def write_tables(self, row: int, tables: list[list[int]]) -> None:
        """Show the block tables of a sequence in this row."""
        shown = self._shown[row]
        for g, table in enumerate(tables):
            length = len(table)
            earlier, there = shown[g]
            if earlier is not table:
                there = 0
            if there < length:
                self.tables[row, g, there:length] = table[there:]
                shown[g] = table, length


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT
