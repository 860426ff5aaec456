"""Runs the model on one ragged batch."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from nanochat_core.engine.kv_cache import KVCache, PagedAttention
from nanochat_core.engine.network import Network
from nanochat_core.engine.scheduler import Chunk
from nanochat_core.engine.sequence import Sequence


class Runner:
    """The network and its cache."""

    def __init__(self, network: Network, cache: KVCache) -> None:
        self._network = network
        self._cache = cache

    @torch.inference_mode()
    def run(self, chunks: Iterable[Chunk]) -> tuple[list[Sequence], Tensor]:
        """Compute keys and values of every chunk and the next token's logits of those that sample.

        Returns:
            The sequences that sample and their (sequences, vocab_size) fp32 logits.
        """
        attention = PagedAttention(self._cache, chunks)
        chunks = attention.chunks
        ids: list[int] = []
        previous: list[int] = []
        positions: list[int] = []
        for chunk in chunks:
            tokens, start, end = chunk.seq.tokens, chunk.start, chunk.end
            ids += tokens[start:end]
            previous += tokens[start - 1 : end - 1] if start else [-1, *tokens[: end - 1]]
            positions += range(start, end)
        batch = torch.from_numpy(np.array([ids, previous, positions], dtype=np.int64)).to(self._network.device)
        hidden = self._network.hidden(batch[0], batch[1], batch[2], attention)
        sampling = [i for i, chunk in enumerate(chunks) if chunk.samples]
        sequences = [chunks[i].seq for i in sampling]
        if not sampling:
            return sequences, hidden.new_empty(0, self._network.config.vocab_size, dtype=torch.float32)
        if len(sampling) < len(ids):
            last = np.cumsum([chunk.length for chunk in chunks]) - 1
            hidden = hidden.index_select(0, torch.from_numpy(last[sampling]).to(self._network.device))
        return sequences, self._network.logits(hidden)
