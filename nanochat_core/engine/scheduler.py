"""Decides which tokens are computed next, with one token budget for every kind of work.

Sequences join and leave the batch at every step (continuous batching, Yu et al. 2022). All sequences of a batch wait
until its step ends, so a step with many tokens delays every sequence. The scheduler therefore limits the tokens of a
step (the budget) and shares them among sequences. Long prompts are computed in chunks over several steps (chunked
prefill, Agrawal et al. 2023, arXiv 2308.16369).

Prefill and decoding are the same case: some known tokens of a sequence are computed already, and its other known tokens
must still be computed. The tokens to compute may be a prompt, one sampled token, the output of a tool or, after a
preemption, all tokens.
"""

import bisect
import dataclasses
import itertools
import operator
from collections.abc import Sequence as Items

from nanochat_core.engine.block_manager import BlockManager
from nanochat_core.engine.sequence import Sequence, State

_order = operator.attrgetter("order")


@dataclasses.dataclass(slots=True)
class Chunk:
    """Tokens of one sequence that one step computes: ``known`` tokens from position ``start``, then a draft."""

    seq: Sequence
    start: int
    known: int  # number of tokens before the draft; 1 if the chunk is the token that the previous step still samples
    draft: Items[int] = ()  # guesses of the tokens after the last known token
    # For each cache group, the id of the block to copy before the step. This block contains the tokens that precede
    # ``start`` in the sequence's own block. The list is empty if no block must be copied.
    copied: Items[int] = ()
    length: int = dataclasses.field(init=False)  # number of known and drafted tokens
    # Indices of the prompt tokens that get a log probability from this chunk, each from the logits of the token before.
    scores: range = dataclasses.field(init=False)
    # Number of tokens at the chunk's end whose logits are needed, to score the prompt and to sample.
    logits: int = dataclasses.field(init=False)
    # Number of tokens to sample: one after the sequence's last token, and one after each drafted token; 0 if the chunk
    # does not reach the last token.
    samples: int = dataclasses.field(init=False)
    # Whether the chunk is only the token that the previous step is still sampling.
    runs_ahead: bool = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        tokens = len(self.seq.tokens)
        drafted = len(self.draft)
        self.length = self.known + drafted
        self.runs_ahead = self.start == tokens
        self.samples = drafted + 1 if self.start + self.known == tokens + self.seq.in_flight else 0
        self.scores = range(self.seq.scored, min(self.start + self.known + 1, self.seq.prompt_length))
        self.logits = self.end - self.scores.start + 1 if self.scores else self.samples

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def tokens(self) -> list[int]:
        """Ids of the tokens to compute; empty if the chunk is a token that is still being sampled."""
        return [*self.seq.tokens[self.start : self.start + self.known], *self.draft]


class Scheduler:
    """Shares the token budget of each step among sequences.

    Running sequences come first. Waiting sequences follow while there is token budget, ``max_running`` is not reached
    and cache blocks are free. Running sequences, and likewise waiting sequences, have the order (priority, arrival). If
    the blocks run out, the youngest sequence loses its blocks (preemption). The youngest sequence is the last one in
    this order among the running and parked sequences that have blocks.
    """

    def __init__(
        self,
        blocks: BlockManager,
        token_budget: int,
        max_running: int,
        speculative_tokens: int = 0,
        speculative_batch: int = 0,
    ) -> None:
        """
        Args:
            token_budget: maximum number of tokens computed in one step; at least ``max_running``, so that each running
                sequence gets a token.
            max_running: maximum number of sequences that are running or parked at a time.
            speculative_tokens: maximum length of the draft of one sequence; 0 turns drafts off.
            speculative_batch: drafts are used only if one token of each running sequence and all drafts are at most
                this many tokens together. Drafts are shortened to fit. In a larger batch, arithmetic takes most of the
                time, so each drafted token costs as much as any other token.
        """
        assert token_budget >= max_running
        self.blocks = blocks
        self.speculative_tokens, self.speculative_batch = speculative_tokens, speculative_batch
        self.token_budget = token_budget
        self.max_running = max_running
        # ``waiting`` and ``running`` are sorted by (priority, arrival).
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.parked: list[Sequence] = []
        self.by_state = {State.WAITING: self.waiting, State.RUNNING: self.running, State.PARKED: self.parked}
        self.preemptions = 0

    @property
    def waiting_tokens(self) -> int:
        """Number of tokens of waiting and running sequences that must still be computed.

        A sequence with a single such token does not count, because this token is usually a newly sampled one. Tokens of
        waiting sequences count even if the cache has them. Any thread may call this.
        """
        remaining = (seq.remaining for seq in [*self.waiting, *self.running])
        return sum(tokens for tokens in remaining if tokens > 1)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence that has no blocks."""
        seq.state = State.WAITING
        bisect.insort(self.waiting, seq, key=_order)

    def park(self, seq: Sequence) -> None:
        """Remove a sequence from the batch or the queue until :meth:`resume`. The sequence keeps its blocks."""
        self.by_state[seq.state].remove(seq)
        seq.state = State.PARKED
        self.parked.append(seq)

    def resume(self, seq: Sequence) -> None:
        """Return a parked sequence to the batch, or to the queue if the sequence has lost its blocks."""
        self.parked.remove(seq)
        if seq.block_tables:
            seq.state = State.RUNNING
            bisect.insort(self.running, seq, key=_order)
        else:
            self.add(seq)

    def finish(self, seq: Sequence) -> None:
        """Remove a sequence in any state, and free its blocks."""
        self.by_state[seq.state].remove(seq)
        self.blocks.release(seq)
        seq.state = State.FINISHED

    def schedule(self) -> list[Chunk]:
        """Reserve blocks for the next step and return its chunks; the list is empty if nothing can run."""
        chunks, budget = self._continue_running()
        return chunks + self._admit_waiting(budget)

    def _continue_running(self) -> tuple[list[Chunk], int]:
        """Return the chunks of the running sequences, and the rest of the budget."""
        budget = self.token_budget
        chunks: list[Chunk] = []
        position = 0
        most_drafted = self.draft_length(len(self.running))
        while position < len(self.running):  # preemptions may shorten the list
            seq = self.running[position]
            if seq.length == seq.max_length:  # the token in flight is the last one, so nothing is left to compute
                position += 1
                continue
            # A long prompt leaves one token of the budget to each sequence after it.
            behind = len(self.running) - position - 1
            length = min(seq.remaining, budget - behind)
            if not self._make_room(seq, seq.computed + length):
                break  # the sequence was the youngest one and has been preempted itself
            drafted = most_drafted > 0 and seq.is_memoryless
            most = min(most_drafted, budget - behind - length)
            chunk = Chunk(seq, seq.computed, length, self._draft(seq, length, most) if drafted else ())
            chunks.append(chunk)
            budget -= chunk.length
            position += 1
        return chunks, budget

    def _admit_waiting(self, budget: int) -> list[Chunk]:
        """Admit waiting sequences while there is room for them; returns their first chunks."""
        chunks: list[Chunk] = []
        # If a sequence was preempted with a token in flight, it waits until that token is known.
        for seq in [seq for seq in self.waiting[: 2 * self.max_running] if not seq.in_flight]:
            if budget == 0 or len(self.running) + len(self.parked) >= self.max_running:
                break
            prefix = 0 if seq.is_scoring else self.blocks.find_prefix(seq)
            if prefix is None:
                continue  # another sequence is computing the next block that this sequence needs
            # Keep a spare block for each running sequence. Otherwise the next step might have to preempt a sequence.
            if not self.blocks.can_admit(seq, prefix, spare=len(self.running)):
                break
            self.waiting.remove(seq)
            copied = self.blocks.admit(seq, prefix)
            if seq.admitted_at is None:
                seq.cached_prompt_tokens = min(prefix, seq.prompt_length)
            seq.state = State.RUNNING
            bisect.insort(self.running, seq, key=_order)
            length = min(seq.length - prefix, budget)
            fits = self.blocks.grow(seq, prefix + length)
            assert fits, f"{seq} was admitted without room"
            chunks.append(Chunk(seq, prefix, length, copied=copied))
            budget -= length
        return chunks

    def computed(self, chunks: list[Chunk]) -> None:
        """Record that the keys and values of ``chunks`` are in the cache, or will be after the step.

        Drafted tokens do not count, because it is not known yet whether they are right. Sequences that have finished in
        the meantime are ignored.
        """
        for chunk in chunks:
            if chunk.seq.state is not State.FINISHED:
                chunk.seq.computed = chunk.start + chunk.known
                if chunk.known > 1:
                    chunk.seq.seal_at = 0  # lets seal() publish the partly filled block at a prompt's end
                self.blocks.seal(chunk.seq)

    def draft_length(self, running: int) -> int:
        """Maximum length of each draft if ``running`` sequences run. 0 or less means that nothing is drafted."""
        return min(self.speculative_tokens, self.speculative_batch // max(running, 1) - 1)

    @property
    def drafts(self) -> bool:
        """Whether drafting is worthwhile: few sequences run, and a draft of one of them is likely to be right.

        That sequence has neither penalties nor a constraint.
        """
        few = self.draft_length(len(self.running)) > 0
        return few and any(seq.is_memoryless and seq.lookup.is_promising for seq in self.running)

    def _draft(self, seq: Sequence, length: int, most: int) -> list[int]:
        """Guess up to ``most`` tokens after the next ``length`` tokens, and reserve blocks for the draft.

        The draft is empty if the next ``length`` tokens do not include the sequence's last known token. If the draft
        needs new blocks, it is shortened until one free block is left for each running sequence. If a token is in
        flight (the previous step still samples it), the draft is empty, but the lookup still makes a guess, to measure
        how often its guesses are right.
        """
        if length < seq.remaining:
            return []
        most = 0 if seq.in_flight else min(most, seq.max_length - len(seq.tokens) - 1)
        draft = seq.lookup.draft(seq.tokens, max(most, 0))
        while draft and not self.blocks.grow(seq, seq.computed + length + len(draft), spare=len(self.running)):
            draft = draft[:-1]
        return draft

    def _make_room(self, seq: Sequence, tokens: int) -> bool:
        """Reserve blocks, and preempt the youngest sequences if necessary; False if ``seq`` itself was preempted."""
        while not self.blocks.grow(seq, tokens):
            victim = max((s for s in itertools.chain(self.running, self.parked) if s.block_tables), key=_order)
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Free the blocks of a sequence. The sequence keeps its tokens, which are computed again later."""
        self.preemptions += 1
        self.blocks.release(seq)
        if seq.state is State.RUNNING:
            self.running.remove(seq)
            self.add(seq)
