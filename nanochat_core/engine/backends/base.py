"""The interface that every backend implements: a runner computes one ragged batch at a time.

A ragged batch holds chunks of different lengths, one after another, without padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import Tensor

from nanochat_core.engine.scheduler import Chunk
from nanochat_core.engine.sequence import Sequence
from nanochat_core.model import GPT


@dataclasses.dataclass(frozen=True, slots=True)
class PendingTokens:
    """Tokens that the device is still sampling in the previous step.

    Attributes:
        tokens: (rows,) int64 on the device.
        rows: for each sequence the row of its next token.
    """

    tokens: Tensor
    rows: Mapping[Sequence, int]


class Runner(Protocol):
    """A network together with its KV cache."""

    def load(self, model: GPT) -> None:
        """Replace the weights. Keys and values in the cache are still those of the old weights."""

    def warm_up(self) -> None:
        """Prepare everything that the first steps would otherwise have to prepare."""

    def run(self, chunks: Iterable[Chunk], pending: PendingTokens | None = None) -> tuple[list[Chunk], Tensor]:
        """Compute keys and values of every chunk, and the logits that the next tokens are sampled from.

        The method does not wait for the device.

        Args:
            pending: the tokens of those chunks whose token the previous step is still sampling.

        Returns:
            The chunks that sample, and (rows, vocab_size) fp32 logits with ``chunk.samples`` rows for each of them. The
            next run may overwrite the logits.
        """
