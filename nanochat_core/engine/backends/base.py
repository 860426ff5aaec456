"""What every backend implements: a network and its cache, which compute one ragged batch at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor

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


A_co = TypeVar("A_co", bound=BatchAttention, covariant=True)
A_contra = TypeVar("A_contra", bound=BatchAttention, contravariant=True)


class Cache(Protocol[A_co]):
    """Keys and values of earlier tokens."""

    def copy(self, chunks: Iterable[Chunk]) -> None: ...
    def attention(self, chunks: Iterable[Chunk]) -> A_co: ...


class Executor(Protocol[A_contra]):
    """A network for such attention; see :class:`~nanochat_core.engine.backends.torch.network.Network`."""

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
