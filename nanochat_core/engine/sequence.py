"""The state of one sequence: its known tokens, and the number of tokens that are computed."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from nanochat_core.engine.request import Request, Token
from nanochat_core.engine.speculation import PromptLookup

if TYPE_CHECKING:
    from nanochat_core.engine.constraints import Matcher


class State(enum.Enum):
    """The state of a sequence.

    A WAITING sequence is queued and has no blocks. A RUNNING sequence is in the batch. A PARKED sequence waits for a
    tool; it keeps its blocks unless another sequence needs them. A FINISHED sequence has left the engine.
    """

    WAITING = "waiting"
    RUNNING = "running"
    PARKED = "parked"
    FINISHED = "finished"


class Sequence:
    """One choice of a request.

    Prefill, decoding, tool output and recomputation need no separate states: in each case, ``remaining`` known tokens
    must still be computed.
    """

    def __init__(self, request: Request, choice: int, arrival: int, sample_key: int, max_length: int) -> None:
        """
        Args:
            arrival: a number that grows with every sequence; with equal priority, the lower number goes first.
            sample_key: number from which this choice's random numbers are computed.
            max_length: number of tokens, prompt included, at which the sequence ends.
        """
        self.request, self.choice = request, choice
        self.sample_key, self.max_length = sample_key, max_length
        self.tokens = list(request.prompt)  # all known token ids; the list only grows, at its end
        self.prompt_length = len(request.prompt)
        # Whether the device is sampling the next token, in a step whose result has not been read.
        self.in_flight = False
        # Number of tokens whose keys and values are in the cache, or will be after the steps queued on the device.
        self.computed = 0
        # For each cache group, the blocks in order; token ``i`` is in ``block_tables[group][i // block_size]``. Empty
        # if the sequence has no blocks.
        self.block_tables: list[list[int]] = []
        # For each cache group, the index of the first block that the sequence still uses. No later token sees the
        # blocks before it.
        self.first_blocks: list[int] = []
        self.block_hashes: list[bytes] = []  # hashes of full blocks of known tokens, computed when needed
        self.awaited: bytes | None = None  # hash of the first block that the last search for a prefix did not find
        self.sealed = 0  # number of leading blocks that other sequences can find
        self.seal_at = 0  # number of computed tokens at which the next block can be published or freed
        self.state = State.WAITING
        self.order = (request.priority, arrival)
        self.cached_prompt_tokens = 0  # number of prompt tokens found in the cache at the first admission
        self.code_start: int | None = None  # index of the first token of the code being written; None outside code
        self.tool_calls = 0  # number of tool calls made so far
        self.lookup = PromptLookup()  # makes drafts of the next tokens
        # Index of the first prompt token whose log probability is wanted and not known yet. The first token of the
        # prompt has no log probability, because no token precedes it.
        self.scored = self.prompt_length if request.sampling.prompt_logprobs is None else 1
        self.prompt_scores: list[Token] = []  # log probabilities not reported yet
        self.matcher: Matcher | None = None  # follows the sampled tokens through the request's constraint, if any
        # Times in seconds of the monotonic clock. ``arrived_at`` is set right after this constructor. ``admitted_at``
        # is None until the sequence first runs, and ``last_token_at`` is None until a token is sampled.
        self.arrived_at = 0.0
        self.admitted_at: float | None = None
        self.last_token_at: float | None = None

    @property
    def length(self) -> int:
        """Number of tokens, including a token in flight."""
        return len(self.tokens) + self.in_flight

    @property
    def remaining(self) -> int:
        """Number of tokens that are not computed yet, including a token in flight."""
        return self.length - self.computed

    @property
    def is_memoryless(self) -> bool:
        """Whether the next token's distribution depends on its logits alone: no penalties and no constraint."""
        return not self.request.sampling.looks_back and self.matcher is None

    @property
    def is_scoring(self) -> bool:
        """Whether log probabilities of the prompt must still be computed."""
        return self.scored < self.prompt_length

    def add_scores(self, scores: list[Token]) -> None:
        """Record the log probabilities of the next tokens of the prompt."""
        self.prompt_scores += scores
        self.scored += len(scores)

    @property
    def completion_length(self) -> int:
        return len(self.tokens) - self.prompt_length

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request.id}[{self.choice}], {self.state.value}, "
            f"{self.computed}/{len(self.tokens)} computed, blocks {self.block_tables})"
        )
