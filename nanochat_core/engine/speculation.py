"""Drafts of the next tokens, looked up in what the sequence already says (prompt lookup decoding, Saxena 2023).

A draft is computed in the same pass as the last known token and costs little where a step is bound by reading weights.
Every drafted position is sampled as always, and a sample depends on its position and logits alone, so keeping the draft
as far as it equals the samples gives exactly the tokens that would have come one by one.
"""

from __future__ import annotations

import dataclasses

# Drafts continue the latest earlier occurrence of this many last tokens; longer ones first: they are right more often.
NGRAMS = (4, 2)
# The share of right guesses is a moving mean with this memory, and drafting pauses while it is lower than this. Guesses
# are made and checked during the pause too, so that it ends when the text begins to repeat itself.
_MEMORY = 0.85
_LEAST_RIGHT = 0.35
# A new sequence gets the benefit of the doubt for a few guesses.
_FIRST_SHARE = 0.6


@dataclasses.dataclass(frozen=True)
class Speculation:
    """How much to draft.

    Attributes:
        most: longest draft of one sequence; 0 drafts nothing.
        batch: running sequences and their drafts are together at most so many tokens. A larger batch is bound by
            arithmetic, and drafts cost what they are.
    """

    most: int
    batch: int

    def draft_length(self, running: int) -> int:
        """Longest draft for each of ``running`` sequences."""
        return min(self.most, self.batch // max(running, 1) - 1)


NO_SPECULATION = Speculation(0, 0)


class PromptLookup:
    """Guesses for one sequence; its tokens only ever grow."""

    def __init__(self) -> None:
        self._seen = 0
        # For each n-gram, the position after its latest occurrence.
        self._after: dict[tuple[int, ...], int] = {}
        self._guess: int | None = None
        self.right_share = _FIRST_SHARE

    def draft(self, tokens: list[int], most: int) -> list[int]:
        """At most ``most`` tokens that may follow ``tokens``; none where guesses have not been worth it."""
        place = self._look_up(tokens)
        self._guess = None if place is None else tokens[place]
        if place is None or self.right_share < _LEAST_RIGHT:
            return []
        # What repeats itself since then is taken to go on doing so.
        period = len(tokens) - place
        return [tokens[place + i % period] for i in range(most)]

    @property
    def is_promising(self) -> bool:
        """Whether there was something to draft when it last looked."""
        return self._guess is not None and self.right_share >= _LEAST_RIGHT

    def _look_up(self, tokens: list[int]) -> int | None:
        """Where a draft for the end of ``tokens`` begins; takes up those that are new."""
        new = tokens[self._seen :]
        if self._guess is not None and new:
            self.right_share = _MEMORY * self.right_share + (1 - _MEMORY) * (new[0] == self._guess)
        # The n-gram at the very end has nothing after it yet, so each is entered when the next token is known.
        for end in range(max(self._seen, 1), len(tokens)):
            for length in NGRAMS:
                if end >= length:
                    self._after[tuple(tokens[end - length : end])] = end
        self._seen = len(tokens)
        for length in NGRAMS:
            place = self._after.get(tuple(tokens[-length:]))
            if place is not None:
                return place
        return None
