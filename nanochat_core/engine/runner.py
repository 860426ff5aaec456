"""Runs the model on one ragged batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from nanochat_core.engine.kv_cache import KVCache, PagedAttention
from nanochat_core.engine.network import Network
from nanochat_core.engine.scheduler import Chunk
from nanochat_core.model import GPT


class Runner:
    """The network and its cache."""

    def __init__(self, network: Network, cache: KVCache) -> None:
        self._network = network
        self._cache = cache

    def load(self, model: GPT) -> None:
        """Go on with other weights; what the cache holds was computed with the old ones."""
        self._network.load(model)

    @torch.inference_mode()
    def run(self, chunks: Iterable[Chunk]) -> tuple[list[Chunk], Tensor]:
        """Compute keys and values of every chunk and the next tokens' logits of those that sample.

        Returns:
            The chunks that sample and (rows, vocab_size) fp32 logits, for each of them ``chunk.samples`` rows.
        """
        attention = PagedAttention(self._cache, chunks)
        chunks = attention.chunks
        ids: list[int] = []
        previous: list[int] = []
        positions: list[int] = []
        for chunk in chunks:
            ids += chunk.tokens
            previous.append(chunk.seq.tokens[chunk.start - 1] if chunk.start else self._network.no_token)
            previous += ids[len(previous) - 1 : -1]
            positions += range(chunk.start, chunk.end)
        batch = torch.from_numpy(np.array([ids, previous, positions], dtype=np.int64)).to(self._network.device)
        hidden = self._network.hidden(batch[0], batch[1], batch[2], attention)
        sampling = [chunk for chunk in chunks if chunk.samples]
        rows = [
            row
            for chunk, end in zip(chunks, itertools.accumulate(chunk.length for chunk in chunks), strict=True)
            for row in range(end - chunk.samples, end)
        ]
        if len(rows) < len(ids):
            hidden = hidden.index_select(0, torch.tensor(rows, dtype=torch.int64, device=self._network.device))
        return sampling, self._network.logits(hidden)
