"""Runs the model on one ragged batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from nanochat_core.device import to_device
from nanochat_core.engine.scheduler import Chunk
from nanochat_core.engine.sequence import Sequence
from nanochat_core.model import GPT


@dataclasses.dataclass(frozen=True, slots=True)
class Awaited:
    """Tokens that the step before is still drawing.

    Attributes:
        tokens: (rows,) int64 on the device.
        rows: which of them is the next token of each sequence.
    """

    tokens: Tensor
    rows: Mapping[Sequence, int]


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

    def copy(self, chunks: Iterable[Chunk]) -> None: ...
    def attention(self, chunks: Iterable[Chunk]) -> A_co: ...


class Executor(Protocol[A_contra]):
    """A network for such attention; see :class:`~nanochat_core.engine.network.Network`."""

    no_token: int
    device: torch.device

    def load(self, model: GPT) -> None: ...
    def hidden(self, ids: Tensor, previous_ids: Tensor, positions: Tensor, attend: A_contra) -> Tensor: ...
    def logits(self, hidden: Tensor) -> Tensor: ...


class Runner(Protocol):
    """The network and its cache."""

    def load(self, model: GPT) -> None:
        """Go on with other weights; what the cache holds was computed with the old ones."""

    def warm_up(self) -> None:
        """Prepare whatever would otherwise be prepared by the first steps."""

    def run(self, chunks: Iterable[Chunk], awaited: Awaited | None = None) -> tuple[list[Chunk], Tensor]:
        """Compute keys and values of every chunk and the next tokens' logits of those that sample.

        Nothing waits for the device, so the result of an earlier step may still be on its way.

        Args:
            awaited: the tokens of chunks that run ahead.

        Returns:
            The chunks that sample and (rows, vocab_size) fp32 logits, for each of them ``chunk.samples`` rows. They may
            be overwritten by the next run.
        """


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
