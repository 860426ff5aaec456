"""One step: the tokens that a network reads, and the tokens that the device samples after them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Items

import numpy as np
from torch import Tensor

from nanochat_core.device import to_device
from nanochat_core.engine.request import Token
from nanochat_core.engine.sampler import Drawn
from nanochat_core.engine.scheduler import Chunk
from nanochat_core.engine.sequence import Sequence


class TokenBatch:
    """The tokens of all chunks, one after another."""

    def __init__(self, chunks: Items[Chunk], no_token: int) -> None:
        """``no_token`` is the id that represents the missing token before a sequence's first token."""
        ids: list[int] = []
        previous: list[int] = []
        positions: list[int] = []
        # The index in the batch and the sequence of each token that the previous step is still sampling.
        self.unknown: list[tuple[int, Sequence]] = []
        for chunk in chunks:
            tokens, start = chunk.seq.tokens, chunk.start
            previous.append(tokens[start - 1] if start else no_token)
            positions.append(start)
            if chunk.runs_ahead:
                self.unknown.append((len(ids), chunk.seq))
                ids.append(0)
            elif chunk.length == 1:
                ids.append(tokens[start])
            else:
                ids += chunk.tokens
                previous += ids[len(previous) - 1 : -1]
                positions += range(start + 1, chunk.end)
        # An array (3, tokens) of the tokens' ids, the ids of the tokens before them, and the tokens' positions.
        self.rows = np.array([ids, previous, positions], dtype=np.int64)

    def fill_in(self, ids: Tensor, previous: LaunchedStep | None) -> None:
        """Write the tokens that the previous step sampled to their places in ``ids`` (tokens,), on the device."""
        if self.unknown and previous is not None:
            pairs = [[place for place, _ in self.unknown], [previous.rows[seq] for _, seq in self.unknown]]
            places, rows = to_device(np.array(pairs, dtype=np.int64), ids.device)
            ids.index_copy_(0, places, previous.tokens.index_select(0, rows).to(ids.dtype))

    @staticmethod
    def logit_rows(chunks: Items[Chunk]) -> list[int]:
        """Batch indices of the tokens whose logits are needed."""
        rows: list[int] = []
        end = 0
        for chunk in chunks:
            end += chunk.length
            rows += range(end - chunk.logits, end)
        return rows


class LaunchedStep:
    """The chunks of a started step that sample tokens, and the sampled tokens, which may not be ready yet.

    The next step may use ``tokens`` (rows,) int64 on the device before the host reads them.
    """

    def __init__(self, chunks: Items[Chunk], drawn: Drawn) -> None:
        self.chunks, self.tokens = chunks, drawn.tokens
        self._counts = [chunk.samples for chunk in chunks]
        self._drawn = drawn
        ends = itertools.accumulate(self._counts)
        # For each sequence, the row of its next token in ``tokens``.
        self.rows = {chunk.seq: end - 1 for chunk, end in zip(chunks, ends, strict=True)}

    @property
    def can_be_overtaken(self) -> bool:
        """Whether the next step can start before this step's tokens are read.

        The next step must wait if a sequence of this step has a draft, penalties or a constraint.
        """
        return all(chunk.seq.is_memoryless and not chunk.draft for chunk in self.chunks)

    def read(self) -> list[tuple[Chunk, list[Token]]]:
        """Wait for the device; returns the samples of each chunk."""
        samples = iter(self._drawn.read())
        return [(chunk, list(itertools.islice(samples, n))) for chunk, n in zip(self.chunks, self._counts, strict=True)]
