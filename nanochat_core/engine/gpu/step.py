"""What the kernels are told of one step: its tokens and where their keys and values are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Items

import numpy as np
import torch
from torch import Tensor

from nanochat_core.engine.block_manager import CacheGroup
from nanochat_core.engine.runner import TokenBatch
from nanochat_core.engine.scheduler import Chunk

# Kernels read addresses of this many numbers at once.
_ALIGNMENT = 4
# Row of the block tables for tokens that only fill up a graph: their keys and values go where nobody looks.
_SCRATCH = 0


@dataclasses.dataclass(frozen=True)
class Step:
    """Tensors of int32 on the device, at the same address in every step.

    Attributes:
        ids, previous_ids, positions: (tokens,).
        rows: (tokens,) which row of ``tables`` is the token's.
        slots: for each group of layers (tokens,) block * block_size + offset.
        tables: for each group (sequences + 1, blocks) block ids.
        tiles: (tiles, 4) see :func:`~nanochat_core.engine.gpu.kernels.attend_tiles`; None attends token by token.
    """

    ids: Tensor
    previous_ids: Tensor
    positions: Tensor
    rows: Tensor
    slots: list[Tensor]
    tables: list[Tensor]
    tiles: Tensor | None

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
        self._tokens = _aligned(tokens)
        self._most_tiles = tokens // tile_rows + sequences
        width = _aligned(-(-context_length // block_size))
        # ids, previous ids, positions, rows, slots of each group; tiles; tables.
        self._tiles_at = (4 + len(groups)) * self._tokens
        self._tables_at = self._tiles_at + 4 * self._most_tiles
        self._row_size = len(groups) * width
        size = self._tables_at + (sequences + 1) * self._row_size
        # While the device copies one, the next step is written to the other. A third cannot be under way.
        self._host = [torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda") for _ in range(2)]
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        self._turn = 0

    def fill(self, chunks: Items[Chunk], batch: TokenBatch, tokens: int, *, tiled: bool) -> Step:
        """Tell the device of this batch, filled up to ``tokens`` tokens."""
        self._turn = 1 - self._turn
        host, count = self._host[self._turn], batch.rows.shape[1]
        assert count <= tokens <= self._tokens
        numbers = host.numpy()
        by_token = numbers[: self._tiles_at].reshape(-1, self._tokens)
        by_token[:, count:tokens] = 0
        by_token[1, count:tokens] = self._no_token
        by_token[:3, :count] = batch.rows
        lengths = [chunk.length for chunk in chunks]
        rows = np.repeat(np.arange(1, len(chunks) + 1, dtype=np.int32), lengths)
        by_token[3, :count] = rows
        tables = numbers[self._tables_at :].reshape(-1, len(self._groups), self._row_size // len(self._groups))
        blocks, offsets = np.divmod(batch.rows[2], self._block_size)
        for g, group in enumerate(self._groups):
            tables[_SCRATCH, g] = group.num_blocks
            for row, chunk in enumerate(chunks, 1):
                table = chunk.seq.block_tables[g]
                tables[row, g, : len(table)] = table
            by_token[4 + g, count:tokens] = group.num_blocks * self._block_size
            by_token[4 + g, :count] = tables[rows, g, blocks] * self._block_size + offsets
        tiles = 0
        if tiled:
            cut = np.array(self._cut(chunks), np.int32)
            tiles = len(cut)
            numbers[self._tiles_at :][: 4 * tiles] = cut.reshape(-1)
        used = self._tables_at + (len(chunks) + 1) * self._row_size
        self._device[:used].copy_(host[:used], non_blocking=True)
        return self._view(tokens, tiles)

    def _cut(self, chunks: Items[Chunk]) -> list[tuple[int, int, int, int]]:
        """Tiles of the chunks; see :class:`Step`."""
        tiles = []
        first = 0
        for row, chunk in enumerate(chunks, 1):
            for at in range(0, chunk.length, self._tile_rows):
                tiles.append((first + at, min(self._tile_rows, chunk.length - at), chunk.start + at, row))
            first += chunk.length
        return tiles

    def _view(self, tokens: int, tiles: int) -> Step:
        by_token = self._device[: self._tiles_at].view(-1, self._tokens)[:, :tokens]
        tables = self._device[self._tables_at :].view(-1, len(self._groups), self._row_size // len(self._groups))
        groups = range(len(self._groups))
        ids, previous_ids, positions, rows = by_token[:4]
        return Step(
            ids,
            previous_ids,
            positions,
            rows,
            slots=[by_token[4 + g] for g in groups],
            tables=[tables[:, g] for g in groups],
            tiles=self._device[self._tiles_at :][: 4 * tiles].view(-1, 4) if tiles else None,
        )


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT
