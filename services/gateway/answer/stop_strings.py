"""Stop strings in text that arrives piece by piece."""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Passes text on until a stop string is complete, and never a character of the stop string itself.

    The stop string that is complete first ends the text; of several complete at the same character the longest
    counts. So the result depends on the text alone and not on how it was cut into pieces. Text that may still
    turn out to begin a stop string is held back.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        """
        Args:
            stops: non-empty strings; none at all passes everything on at once.
        """
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What may be shown now that ``text`` has come; nothing more after a stop string."""
        if self.stopped:
            return ""
        if not self._stops:
            return text
        seen = self._held + text
        ends = [(start + len(stop), start) for stop in self._stops if (start := seen.find(stop)) >= 0]
        if ends:
            self.stopped = True
            self._held = ""
            return seen[: min(ends)[1]]
        keep = self._possible_beginning(seen)
        self._held = seen[len(seen) - keep :]
        return seen[: len(seen) - keep]

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
