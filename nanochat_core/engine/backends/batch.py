"""The tokens of one ragged batch as a network reads them."""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np
from torch import Tensor

from nanochat_core.device import to_device
from nanochat_core.engine.backends.base import Awaited
from nanochat_core.engine.scheduler import Chunk
from nanochat_core.engine.sequence import Sequence


class TokenBatch:
    """The tokens of a ragged batch, one after another.

    Attributes:
        rows: (3, tokens) int64: ids, those of the tokens before them, and positions in the sequence.
        ahead: where tokens are whose id is not known yet, and whose they are.
    """

    def __init__(self, chunks: Items[Chunk], no_token: int) -> None:
        ids: list[int] = []
        previous: list[int] = []
        positions: list[int] = []
        self.ahead: list[tuple[int, Sequence]] = []
        for chunk in chunks:
            tokens, start = chunk.seq.tokens, chunk.start
            previous.append(tokens[start - 1] if start else no_token)
            positions.append(start)
            if chunk.runs_ahead:
                self.ahead.append((len(ids), chunk.seq))
                ids.append(0)
            elif chunk.length == 1:
                ids.append(tokens[start])
            else:
                ids += chunk.tokens
                previous += ids[len(previous) - 1 : -1]
                positions += range(start + 1, chunk.end)
        self.rows = np.array([ids, previous, positions], dtype=np.int64)

    def fill_in(self, ids: Tensor, awaited: Awaited | None) -> None:
        """Put the tokens that are not known yet into ``ids`` (tokens,) on the device."""
        if self.ahead and awaited is not None:
            pairs = [[place for place, _ in self.ahead], [awaited.rows[seq] for _, seq in self.ahead]]
            places, rows = to_device(np.array(pairs, dtype=np.int64), ids.device)
            ids.index_copy_(0, places, awaited.tokens.index_select(0, rows).to(ids.dtype))

    @staticmethod
    def sampled_rows(chunks: Items[Chunk]) -> list[int]:
        """Of which of the tokens the next one is sampled."""
        rows: list[int] = []
        end = 0
        for chunk in chunks:
            end += chunk.length
            rows += range(end - chunk.samples, end)
        return rows
