"""Speculative decoding by prompt lookup (Saxena 2023): drafts of the next tokens come from the sequence itself.

Texts often repeat themselves. If the last tokens of a sequence also occur earlier in the sequence, the tokens after
that earlier place are a good guess of the next tokens. The model computes this draft in the same step as the last known
token. A step that mostly reads weights hardly takes longer with a draft. Every drafted position is sampled as usual,
and the draft is kept up to the first sample that differs from it. Within a choice, a sample depends on its position and
logits alone, so the result is the tokens that would have been sampled one by one, unless a rounding difference of the
logits on a GPU changes a sample.
"""

# A draft copies the tokens that followed the latest earlier occurrence of the last n tokens. The larger n is tried
# first, because its drafts are right more often.
NGRAMS = (4, 2)
# ``right_share`` is the share of right guesses, an exponential moving average with the decay _DECAY. Drafting pauses
# while ``right_share`` is below _LEAST_RIGHT. Guesses are still made and checked, so drafting resumes when the text
# begins to repeat itself.
_DECAY = 0.85
_LEAST_RIGHT = 0.35
# ``right_share`` of a new sequence. It is high enough that the first few guesses become drafts.
_FIRST_SHARE = 0.6


class PromptLookup:
    """Guesses the next tokens of one sequence. The sequence's list of tokens must only grow."""

    def __init__(self) -> None:
        self._seen = 0
        # For each n-gram, the position after its latest occurrence.
        self._after: dict[tuple[int, ...], int] = {}
        self._guess: int | None = None
        self.right_share = _FIRST_SHARE

    def draft(self, tokens: list[int], most: int) -> list[int]:
        """Guess ``most`` tokens that follow ``tokens``.

        The draft is empty if the last tokens do not occur earlier, or while too few guesses are right.
        """
        place = self._look_up(tokens)
        self._guess = None if place is None else tokens[place]
        if place is None or self.right_share < _LEAST_RIGHT:
            return []
        # The draft assumes that the text from ``place`` on repeats itself.
        period = len(tokens) - place
        return [tokens[place + i % period] for i in range(most)]

    @property
    def is_promising(self) -> bool:
        """Whether the last lookup made a guess, and enough earlier guesses were right."""
        return self._guess is not None and self.right_share >= _LEAST_RIGHT

    def _look_up(self, tokens: list[int]) -> int | None:
        """Record the new tokens; returns the position in ``tokens`` from which a draft is copied, or None."""
        new = tokens[self._seen :]
        if self._guess is not None and new:
            self.right_share = _DECAY * self.right_share + (1 - _DECAY) * (new[0] == self._guess)
        # An n-gram is recorded when the token after it is known, so the n-gram at the end is not recorded yet.
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
