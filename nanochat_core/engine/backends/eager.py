"""Runs a network operation by operation. The CPU kernels and PyTorch's operators use this runner."""

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nanochat_core.device import to_device
from nanochat_core.engine.backends.base import PendingTokens
from nanochat_core.engine.backends.batch import TokenBatch
from nanochat_core.engine.scheduler import Chunk
from nanochat_core.model import GPT


class Network(Protocol):
    """A network that reads keys and values from one kind of cache."""

    no_token: int
    device: torch.device

    def load(self, model: GPT) -> None: ...
    def hidden(self, ids: Tensor, previous_ids: Tensor, positions: Tensor, attend: Any) -> Tensor: ...
    def logits(self, hidden: Tensor) -> Tensor: ...


class Cache(Protocol):
    """The KV cache that a :class:`Network` reads."""

    def copy(self, chunks: Iterable[Chunk]) -> None: ...

    def attention(self, chunks: Iterable[Chunk]) -> Any:
        """Prepare attention for one batch. The batch must have the chunks in the order of the result's ``chunks``."""


class EagerRunner:
    """The :class:`~nanochat_core.engine.backends.base.Runner` for a network and the kind of cache that it reads."""

    def __init__(self, network: Network, cache: Cache) -> None:
        self.network = network
        self._cache = cache

    def load(self, model: GPT) -> None:
        self.network.load(model)

    def warm_up(self) -> None:
        pass  # Engine.warm_up then runs two steps, which prepare everything

    @torch.inference_mode()
    def run(self, chunks: Iterable[Chunk], pending: PendingTokens | None = None) -> tuple[list[Chunk], Tensor]:
        given = list(chunks)
        self._cache.copy(given)
        attention = self._cache.attention(given)
        ordered: list[Chunk] = attention.chunks
        batch = TokenBatch(ordered, self.network.no_token)
        device = self.network.device
        ids, previous, positions = to_device(batch.rows, device)
        batch.fill_in(ids, pending)
        hidden = self.network.hidden(ids, previous, positions, attention)
        rows = batch.sampled_rows(ordered)
        if len(rows) < len(ids):
            hidden = hidden.index_select(0, to_device(np.array(rows, dtype=np.int64), device))
        return [chunk for chunk in ordered if chunk.samples], self.network.logits(hidden)
