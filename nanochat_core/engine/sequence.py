"""One continuation in the making: which tokens are known, and for how many of them keys and values are computed."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from nanochat_core.engine.request import Request
from nanochat_core.engine.speculation import PromptLookup

if TYPE_CHECKING:
    from nanochat_core.engine.constraints import Matcher


class State(enum.Enum):
    """Where a sequence is.

    WAITING holds no blocks. RUNNING is in the batch. PARKED waits for a tool; it keeps its blocks unless they are
    needed elsewhere. FINISHED has left the engine.
    """

    WAITING = "waiting"
    RUNNING = "running"
    PARKED = "parked"
    FINISHED = "finished"


class Sequence:
    """Tokens known against tokens computed: prefill, decode, tool output and resumption are all ``remaining > 0``.

    Attributes:
        tokens: every known token id, the prompt first. Grows only at its end.
        in_flight: whether the token after them is being drawn by a step whose result nobody has read yet.
        computed: how many of them have their keys and values in the cache, or will have when the steps that the device
            has been given are done.
        block_tables: for each group of layers its cache blocks in order; token ``i`` lives in
            ``block_tables[group][i // block_size]``. Empty when the sequence holds nothing.
        first_blocks: for each group the first block that the sequence still holds: those before are out of sight.
        block_hashes: content hash of each full block of known tokens, filled in lazily by the block manager.
        awaited: hash of the block that it last found missing at the end of its prefix.
        sealed: how many leading blocks other sequences can find by their hash.
        seal_at: number of computed tokens from which there is something to seal or to give back.
        sample_key: start of this choice's stream of random numbers.
        cached_prompt_tokens: prompt tokens found in the cache at the first admission.
        code_start: index of the first token of code that the model is writing, None outside of code.
        tool_calls: calls made so far.
        lookup: drafts of its next tokens.
        matcher: has followed every sampled token through the request's constraint; None without one.
        arrived_at, admitted_at, last_token_at: monotonic times in seconds; None before it happened.
    """

    def __init__(self, request: Request, choice: int, arrival: int, sample_key: int, max_length: int) -> None:
        """
        Args:
            arrival: a number that grows with every sequence; decides between equal priorities.
            max_length: number of tokens, prompt included, at which the sequence ends.
        """
        self.request = request
        self.choice = choice
        self.sample_key = sample_key
        self.max_length = max_length
        self.tokens = list(request.prompt)
        self.prompt_length = len(request.prompt)
        self.in_flight = False
        self.computed = 0
        self.block_tables: list[list[int]] = []
        self.first_blocks: list[int] = []
        self.block_hashes: list[bytes] = []
        self.awaited: bytes | None = None
        self.sealed = 0
        self.seal_at = 0
        self.state = State.WAITING
        self.order = (request.priority, arrival)
        self.cached_prompt_tokens = 0
        self.code_start: int | None = None
        self.tool_calls = 0
        self.lookup = PromptLookup()
        self.matcher: Matcher | None = None
        self.arrived_at = 0.0
        self.admitted_at: float | None = None
        self.last_token_at: float | None = None

    @property
    def length(self) -> int:
        """Number of tokens, the one in flight included."""
        return len(self.tokens) + self.in_flight

    @property
    def remaining(self) -> int:
        """Tokens that are not computed yet. The next token can be sampled when they are."""
        return self.length - self.computed

    @property
    def is_memoryless(self) -> bool:
        """Whether the distribution of the next token is a function of its logits alone, whatever was said before."""
        return not self.request.sampling.looks_back and self.matcher is None

    @property
    def completion_length(self) -> int:
        return len(self.tokens) - self.prompt_length

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request.id}[{self.choice}], {self.state.value}, "
            f"{self.computed}/{len(self.tokens)} computed, blocks {self.block_tables})"
        )
