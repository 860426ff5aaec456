"""Which tokens are computed next: one loop over one token budget."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Sequence as Items

from nanochat_core.engine.block_manager import BlockManager
from nanochat_core.engine.sequence import Sequence, State
from nanochat_core.engine.speculation import NO_SPECULATION, Speculation


@dataclasses.dataclass(slots=True)
class Chunk:
    """Tokens ``start .. start + known`` of a sequence, and a draft of those after them, computed together in one step.

    Attributes:
        known: how many of the sequence's own; a token in flight is a chunk by itself.
        draft: only behind the last known token.
        copied: for each group of layers the block to copy before the step, for the tokens before ``start`` that are in
            the same block; none where that has them already.
        length: how many tokens that are together.
        samples: how many next tokens can be sampled: those after the last token and after each of the draft.
        runs_ahead: whether this is the token that the step before is still drawing.
    """

    seq: Sequence
    start: int
    known: int
    draft: Items[int] = ()
    copied: Items[int] = ()
    length: int = dataclasses.field(init=False)
    samples: int = dataclasses.field(init=False)
    runs_ahead: bool = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        tokens = len(self.seq.tokens)
        drafted = len(self.draft)
        self.length = self.known + drafted
        self.runs_ahead = self.start == tokens
        self.samples = drafted + 1 if self.start + self.known == tokens + self.seq.in_flight else 0

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def tokens(self) -> list[int]:
        """Ids of the tokens to compute; none for one in flight."""
        return [*self.seq.tokens[self.start : self.start + self.known], *self.draft]


class Scheduler:
    """Shares the token budget of each step among sequences.

    A sequence is tokens known against tokens computed; whether the difference is a prompt, one sampled token, a tool's
    output or everything (after a preemption) makes no difference here.
    """

    def __init__(
        self, blocks: BlockManager, token_budget: int, max_running: int, speculation: Speculation = NO_SPECULATION
    ) -> None:
        """
        Args:
            token_budget: most tokens computed in one step; at least ``max_running``, so that each running sequence
                gets one.
            max_running: most sequences that are running or parked at a time.
        """
        assert token_budget >= max_running
        self.blocks = blocks
        self.speculation = speculation
        self.token_budget = token_budget
        self.max_running = max_running
        # Both sorted by (priority, arrival).
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.parked: list[Sequence] = []
        self.by_state = {State.WAITING: self.waiting, State.RUNNING: self.running, State.PARKED: self.parked}
        self.preemptions = 0

    def add(self, seq: Sequence) -> None:
        """Queue a sequence that holds no blocks."""
        seq.state = State.WAITING
        bisect.insort(self.waiting, seq, key=_order)

    def park(self, seq: Sequence) -> None:
        """Take a sequence out of the batch until :meth:`resume`; it keeps its blocks."""
        self.by_state[seq.state].remove(seq)
        seq.state = State.PARKED
        self.parked.append(seq)

    def resume(self, seq: Sequence) -> None:
        """Put a parked sequence back: into the batch, or into the queue when it has lost its blocks meanwhile."""
        self.parked.remove(seq)
        if seq.block_tables:
            seq.state = State.RUNNING
            bisect.insort(self.running, seq, key=_order)
        else:
            self.add(seq)

    def finish(self, seq: Sequence) -> None:
        """Remove a sequence, whatever it is doing, and free its blocks."""
        self.by_state[seq.state].remove(seq)
        self.blocks.release(seq)
        seq.state = State.FINISHED

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step; room for them is reserved. Empty when nothing can run."""
        budget = self.token_budget
        chunks: list[Chunk] = []
        position = 0
        most_drafted = self.speculation.draft_length(len(self.running))
        while position < len(self.running):
            seq = self.running[position]
            if seq.length == seq.max_length:  # with the token in flight it is complete
                position += 1
                continue
            # A long prompt leaves one token to each sequence behind it.
            behind = len(self.running) - position - 1
            length = min(seq.remaining, budget - behind)
            if not self._make_room(seq, seq.computed + length):
                break  # it was the youngest and has been preempted itself
            drafted = most_drafted > 0 and seq.is_memoryless
            most = min(most_drafted, budget - behind - length)
            chunk = Chunk(seq, seq.computed, length, self._draft(seq, length, most) if drafted else ())
            chunks.append(chunk)
            budget -= chunk.length
            position += 1
        for seq in self._candidates():
            if budget == 0 or len(self.running) + len(self.parked) >= self.max_running:
                break
            prefix = self.blocks.find_prefix(seq)
            if prefix is None:
                continue  # what it starts with is being computed; it will find that in the cache
            # A spare block for each running sequence: filling the cache up would only preempt someone next step.
            if not self.blocks.can_admit(seq, prefix, spare=len(self.running)):
                break
            copied = self._admit(seq, prefix)
            length = min(seq.length - prefix, budget)
            fits = self.blocks.grow(seq, prefix + length)
            assert fits, f"{seq} was admitted without room"
            chunks.append(Chunk(seq, prefix, length, copied=copied))
            budget -= length
        return chunks

    def computed(self, chunks: list[Chunk]) -> None:
        """Record that these chunks' keys and values are in the cache, or will be when the device gets there.

        Whether drafts are right is not known yet. Sequences that have finished meanwhile have no part in it.
        """
        for chunk in chunks:
            if chunk.seq.state is not State.FINISHED:
                chunk.seq.computed = chunk.start + chunk.known
                if chunk.known > 1:
                    chunk.seq.seal_at = 0  # others may begin with these
                self.blocks.seal(chunk.seq)

    @property
    def drafts(self) -> bool:
        """Whether drafts are worth it: so few sequences run, and one of them has had something to draft."""
        few = self.speculation.draft_length(len(self.running)) > 0
        return few and any(seq.is_memoryless and seq.lookup.is_promising for seq in self.running)

    def _draft(self, seq: Sequence, length: int, most: int) -> list[int]:
        """What may follow the next ``length`` tokens: as much as is worth it and leaves each running one a block.

        Behind a token in flight nothing can be drafted, but one can go on guessing.
        """
        if length < seq.remaining:
            return []
        most = 0 if seq.in_flight else min(most, seq.max_length - len(seq.tokens) - 1)
        draft = seq.lookup.draft(seq.tokens, max(most, 0))
        while draft and not self.blocks.grow(seq, seq.computed + length + len(draft), spare=len(self.running)):
            draft = draft[:-1]
        return draft

    def _candidates(self) -> list[Sequence]:
        """Waiting sequences worth looking at in one step, first come first.

        One that was preempted with a token in flight waits until that is known.
        """
        return [seq for seq in self.waiting[: 2 * self.max_running] if not seq.in_flight]

    def _admit(self, seq: Sequence, prefix: int) -> list[int]:
        """Start a sequence after ``prefix`` tokens; the blocks to copy for that."""
        self.waiting.remove(seq)
        copied = self.blocks.admit(seq, prefix)
        if seq.admitted_at is None:
            seq.cached_prompt_tokens = min(prefix, seq.prompt_length)
        seq.state = State.RUNNING
        bisect.insort(self.running, seq, key=_order)
        return copied

    def _make_room(self, seq: Sequence, tokens: int) -> bool:
        """Reserve blocks, preempting the youngest sequences; False when ``seq`` itself had to go."""
        while not self.blocks.grow(seq, tokens):
            victim = max((s for s in itertools.chain(self.running, self.parked) if s.block_tables), key=_order)
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Take a sequence's blocks; it keeps its tokens and is computed again later."""
        self.preemptions += 1
        self.blocks.release(seq)
        if seq.state is State.RUNNING:
            self.running.remove(seq)
            self.add(seq)


def _order(seq: Sequence) -> tuple[int, int]:
    return seq.order
