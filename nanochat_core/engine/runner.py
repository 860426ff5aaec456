"""Runs the model on one ragged batch."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from nanochat_core.engine.kv_cache import KVCache, PagedAttention
from nanochat_core.engine.scheduler import Chunk
from nanochat_core.engine.sequence import Sequence
from nanochat_core.model import GPT


class Runner:
    """The model and its cache."""

    def __init__(self, model: GPT, cache: KVCache) -> None:
        """
        Args:
            model: made ready by :func:`nanochat_core.engine.weights.prepare`.
        """
        self._model = model
        self._cache = cache
        self._device = model.cos.device

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
        batch = torch.from_numpy(np.array([ids, previous, positions], dtype=np.int64)).to(self._device)
        hidden = self._model.hidden(batch[0], batch[1], batch[2], attention)
        sampling = [i for i, chunk in enumerate(chunks) if chunk.samples]
        sequences = [chunks[i].seq for i in sampling]
        if not sampling:
            return sequences, hidden.new_empty(0, self._model.config.vocab_size, dtype=torch.float32)
        if len(sampling) < len(ids):
            last = np.cumsum([chunk.length for chunk in chunks]) - 1
            hidden = hidden.index_select(0, torch.from_numpy(last[sampling]).to(self._device))
        return sequences, self._model.logits(hidden)
