"""Runs the model on one ragged batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from nanochat_core.engine.scheduler import Chunk
from nanochat_core.model import GPT


class BatchAttention(Protocol):
    """Attention of one ragged batch, over a cache.

    Attributes:
        chunks: its chunks, in the order in which the batch must have their tokens.
    """

    chunks: list[Chunk]


A = TypeVar("A", bound=BatchAttention)
A_co = TypeVar("A_co", bound=BatchAttention, covariant=True)
A_contra = TypeVar("A_contra", bound=BatchAttention, contravariant=True)


class Cache(Protocol[A_co]):
    """Keys and values of earlier tokens."""

    def attention(self, chunks: Iterable[Chunk]) -> A_co: ...


class Executor(Protocol[A_contra]):
    """A network for such attention; see :class:`~nanochat_core.engine.network.Network`."""

    no_token: int
    device: torch.device

    def load(self, model: GPT) -> None: ...
    def hidden(self, ids: Tensor, previous_ids: Tensor, positions: Tensor, attend: A_contra) -> Tensor: ...
    def logits(self, hidden: Tensor) -> Tensor: ...


class Runner(Generic[A]):
    """The network and its cache."""

    def __init__(self, network: Executor[A], cache: Cache[A]) -> None:
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
        attention = self._cache.attention(chunks)
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
