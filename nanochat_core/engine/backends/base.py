"""The interface of a backend: a runner, which computes one ragged batch at a time.

A ragged batch consists of chunks of different lengths, one after another, without padding.
"""

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
        rows: for each sequence, the row of its next token in ``tokens``.
    """

    tokens: Tensor
    rows: Mapping[Sequence, int]


class Runner(Protocol):
    """A network together with its KV cache."""

    def load(self, model: GPT) -> None:
        """Replace the weights. The cache still contains keys and values that the old weights computed."""

    def warm_up(self) -> None:
        """Do one-time work, such as recording CUDA graphs, that would slow down the first steps."""

    def run(self, chunks: Iterable[Chunk], pending: PendingTokens | None = None) -> tuple[list[Chunk], Tensor]:
        """Compute keys and values of every chunk, and the logits that the next tokens are sampled from.

        The method does not wait for the device.

        Args:
            pending: the tokens that the previous step is still sampling, if a chunk needs them.

        Returns:
            The chunks after which tokens are sampled, and fp32 logits (rows, vocab_size) with ``chunk.samples`` rows
            for each of these chunks. The next run may overwrite the logits.
        """
