"""Finds stop strings in a text that arrives piece by piece."""

from collections.abc import Sequence


class StopFilter:
    """Passes on the text that precedes the first complete stop string.

    The first complete stop string ends the text and sets ``stopped``. If several stop strings become complete at the
    same character, the longest one counts. So the result depends on the text alone, and not on its division into
    pieces. The filter holds back text that may still become a stop string.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        """No stop string may be empty. Without stop strings, all text passes immediately."""
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.found: str | None = None  # the stop string that ended the text

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self.found is not None

    def push(self, text: str) -> str:
        """Adds the next piece, and returns the text that may be shown now. After a stop string, this text is empty."""
        if self.stopped:
            return ""
        seen = self._held + text
        ends = [(start + len(stop), start) for stop in self._stops if (start := seen.find(stop)) >= 0]
        if ends:
            end, start = min(ends)
            self.found, self._held = seen[start:end], ""
            return seen[:start]
        passed = len(seen) - self._possible_beginning(seen)
        self._held = seen[passed:]
        return seen[:passed]

    def finish(self) -> str:
        """Returns the text that was held back; call it when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """Returns the length of the longest suffix of ``text`` that is a prefix of a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
