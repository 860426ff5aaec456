"""Runs a network operation by operation on one ragged batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from nanochat_core.device import to_device
from nanochat_core.engine.backends.base import Awaited, BatchAttention, Cache, Executor
from nanochat_core.engine.backends.batch import TokenBatch
from nanochat_core.engine.scheduler import Chunk
from nanochat_core.model import GPT

A = TypeVar("A", bound=BatchAttention)


class EagerRunner(Generic[A]):
    """:class:`Runner` for any network and cache that fit together."""

    def __init__(self, network: Executor[A], cache: Cache[A]) -> None:
        self._network = network
        self._cache = cache

    def load(self, model: GPT) -> None:
        self._network.load(model)

    def warm_up(self) -> None:
        pass  # the engine's own first steps are enough

    @torch.inference_mode()
    def run(self, chunks: Iterable[Chunk], awaited: Awaited | None = None) -> tuple[list[Chunk], Tensor]:
        chunks = list(chunks)
        self._cache.copy(chunks)
        attention = self._cache.attention(chunks)
        chunks = attention.chunks
        batch = TokenBatch(chunks, self._network.no_token)
        device = self._network.device
        ids, previous, positions = to_device(batch.rows, device)
        batch.fill_in(ids, awaited)
        hidden = self._network.hidden(ids, previous, positions, attention)
        rows = batch.sampled_rows(chunks)
        if len(rows) < len(ids):
            hidden = hidden.index_select(0, to_device(np.array(rows, dtype=np.int64), device))
        return [chunk for chunk in chunks if chunk.samples], self._network.logits(hidden)
