"""A step that the device is computing, or has computed."""

import itertools
from collections.abc import Sequence as Items

from nanochat_core.engine.backends.base import PendingTokens
from nanochat_core.engine.sampler import Drawn, Sample
from nanochat_core.engine.scheduler import Chunk


class LaunchedStep:
    """The chunks of a step after which tokens are sampled, and these tokens, which the device may still be computing.

    Attributes:
        pending: the sampled tokens as input of the next step.
    """

    def __init__(self, chunks: Items[Chunk], drawn: Drawn) -> None:
        self.chunks = chunks
        self._counts = [chunk.samples for chunk in chunks]
        self._drawn = drawn
        ends = itertools.accumulate(self._counts)
        last_rows = {chunk.seq: end - 1 for chunk, end in zip(chunks, ends, strict=True)}
        self.pending = PendingTokens(drawn.tokens, last_rows)

    @property
    def can_be_overtaken(self) -> bool:
        """Whether the next step can start before these tokens are read: no draft, no penalty and no constraint."""
        return all(chunk.seq.is_memoryless and not chunk.draft for chunk in self.chunks)

    def read(self) -> list[tuple[Chunk, list[Sample]]]:
        """Wait for the device; returns the samples of each chunk."""
        samples = iter(self._drawn.read())
        return [(chunk, list(itertools.islice(samples, n))) for chunk, n in zip(self.chunks, self._counts, strict=True)]
