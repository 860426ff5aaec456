"""Continues after the device ran out of memory: with a smaller batch and, if necessary, with fewer requests."""

import logging
from collections.abc import Sequence as Items

import torch

from nanochat_core.device import free_memory
from nanochat_core.engine.scheduler import Chunk, Scheduler
from nanochat_core.engine.sequence import Sequence
from nanochat_core.errors import is_out_of_memory

log = logging.getLogger(__name__)

# The engine gives up after the smallest possible step has failed this many times in a row, because no step will fit.
MOST_FAILURES = 3
# After this many successful steps, the scheduler's limits (running sequences and tokens per step) double. If the larger
# step fails, the engine loses one step and computes half a batch again, which is little work compared to this many
# steps.
STEPS_UNTIL_MORE = 500


class Shed(Exception):
    """The request was dropped because the device ran out of memory. The caller may send it again later."""


class Shedding:
    """Makes batches smaller when a step does not fit into memory, and larger again after many steps that fit.

    The scheduler's limits become half of the sequences and half of the tokens of the step that did not fit. Later, they
    double until they have their configured values.

    A step's memory grows with its number of sequences (logits, gathered keys) and its number of tokens (activations).
    The KV cache is allocated once, so taking blocks from a sequence would free no memory; only a smaller batch helps.
    The youngest half of the batch returns to the queue and keeps its tokens, and the queue accepts fewer new requests.
    A request is dropped only if one of its sequences does not even fit alone.
    """

    def __init__(self, scheduler: Scheduler, device: torch.device) -> None:
        self._scheduler = scheduler
        self._device = device
        self._most = scheduler.max_running, scheduler.token_budget
        self._fitted = 0
        self._failures = 0

    def can_go_on(self, error: Exception, chunks: Items[Chunk]) -> bool:
        """Record that a step failed with ``error``; returns whether the caller should :meth:`shrink` and go on."""
        if not is_out_of_memory(error):
            return False
        self._failures += self._is_smallest(chunks)
        log.warning(
            "out of memory in a step",
            extra={
                "sequences": len(chunks),
                "tokens": sum(chunk.length for chunk in chunks),
                "reason": str(error).partition("\n")[0],
            },
        )
        return self._failures < MOST_FAILURES

    def shrink(self, chunks: Items[Chunk]) -> Sequence | None:
        """Make the next step smaller than the failed one. If that is impossible, return the sequence to drop.

        Call this only after the exception was handled, because until then its traceback keeps the step's tensors in
        memory.
        """
        free_memory(self._device)
        self._fitted = 0
        scheduler = self._scheduler
        if self._is_smallest(chunks):
            return chunks[0].seq
        keep = max(len(chunks) // 2, 1)
        for seq in scheduler.running[keep:]:
            scheduler.blocks.release(seq)
            scheduler.park(seq)
            scheduler.resume(seq)  # queues the sequence, because it has no blocks
            scheduler.preemptions += 1
        scheduler.max_running = keep
        scheduler.token_budget = max(sum(chunk.length for chunk in chunks) // 2, self._least_budget(keep))
        return None

    def fitted(self) -> None:
        """Record that a step had enough memory."""
        self._failures = 0
        scheduler, (most_running, most_tokens) = self._scheduler, self._most
        if (scheduler.max_running, scheduler.token_budget) == self._most:
            return
        self._fitted += 1
        if self._fitted == STEPS_UNTIL_MORE:
            self._fitted = 0
            scheduler.max_running = min(2 * scheduler.max_running, most_running)
            scheduler.token_budget = min(2 * scheduler.token_budget, most_tokens)

    def _is_smallest(self, chunks: Items[Chunk]) -> bool:
        return len(chunks) == 1 and chunks[0].length <= self._least_budget(1)

    def _least_budget(self, running: int) -> int:
        """Smallest possible token budget: one token for each running sequence and each parked sequence with blocks.

        A parked sequence with blocks returns to the batch after its tool call, even if ``max_running`` sequences
        already run.
        """
        return running + sum(bool(seq.block_tables) for seq in self._scheduler.parked)
