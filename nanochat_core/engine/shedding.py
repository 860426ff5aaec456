"""Going on when the device has run out of memory: with a smaller batch, and with fewer requests if that must be."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Items

import torch

from nanochat_core.engine.scheduler import Chunk, Scheduler
from nanochat_core.engine.sequence import Sequence
from nanochat_core.memory import free_memory, is_out_of_memory

log = logging.getLogger(__name__)

# So many steps in a row that were as small as a step can be and did not fit: nothing will.
MOST_FAILURES = 3
# After so many steps that fitted, the batch may be twice as large again: a failure costs the work of one step and the
# recomputation of half a batch, which is little among so many.
STEPS_UNTIL_MORE = 500


class Shed(Exception):
    """The request was given up because the device ran out of memory; it may be sent again later."""


class Shedding:
    """Halves the scheduler's limits when a step does not fit the device's memory, and doubles them after many that did.

    A step's memory grows with its sequences (their logits, the keys gathered for them) and its tokens (their
    activations). The cache does not grow, so taking a sequence's blocks would free nothing: what helps is a smaller
    batch. The youngest half goes back to the queue, which loses nothing, and new requests find the queue full sooner.
    Only a sequence for which there is no memory even alone is given up.
    """

    def __init__(self, scheduler: Scheduler, device: torch.device) -> None:
        self._scheduler = scheduler
        self._device = device
        self._most = scheduler.max_running, scheduler.token_budget
        self._fitted = 0
        self._failures = 0

    def can_go_on(self, error: Exception, chunks: Items[Chunk]) -> bool:
        """Note a step that failed with ``error``; whether to go on from it with :meth:`shrink`."""
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
        """Make the next step smaller than this one, of which nothing was computed; the error must be gone already.

        Returns:
            The sequence to give up, if the step cannot be smaller.
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
            scheduler.resume(seq)  # without blocks that is into the queue
            scheduler.preemptions += 1
        scheduler.max_running = keep
        scheduler.token_budget = max(sum(chunk.length for chunk in chunks) // 2, self._least_budget(keep))
        return None

    def fitted(self) -> None:
        """Note a step that had enough memory."""
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
        """A token for each sequence that runs, and for those that a tool gives back, however many may run.

        Parked ones without blocks come back through the queue.
        """
        return running + sum(bool(seq.block_tables) for seq in self._scheduler.parked)
