"""Ejects engines that report good health but fail their calls: a circuit breaker with a half-open trial."""

_FAILURES = 3  # number in a row that ejects an engine; a single failure may be the request's fault
_FIRST_SECONDS = 5.0
_LONGEST_SECONDS = 60.0


class Outlier:
    """Decides from the outcomes of an engine's calls whether the engine gets further calls.

    After three failures in a row, the engine is ejected for 5 seconds. Then one call is the trial: its success ends the
    ejection, and its failure begins another ejection that lasts twice as long, up to a minute.

    All times are seconds of one clock that never goes back.
    """

    def __init__(self) -> None:
        self._failures = 0  # since the last success
        self._seconds = 0.0  # length of the latest ejection; 0 while the engine is not ejected
        self._until = 0.0
        self._on_trial = False

    @property
    def ejected(self) -> bool:
        """Whether the engine is ejected or has not passed its trial yet."""
        return self._seconds > 0

    def allows(self, now: float) -> bool:
        """Whether the engine may get a call now."""
        return not self.ejected or (now >= self._until and not self._on_trial)

    def began(self) -> None:
        """Records that the engine gets a call."""
        self._on_trial = self.ejected

    def succeeded(self) -> None:
        """Records that a call produced a part of its answer."""
        self._failures, self._seconds, self._on_trial = 0, 0.0, False

    def failed(self, now: float) -> bool:
        """Records that a call failed through the engine's fault, and returns whether that ejects the engine."""
        self._failures += 1
        ejects = self._on_trial or (not self.ejected and self._failures >= _FAILURES)
        if ejects:
            self._seconds = min(max(2 * self._seconds, _FIRST_SECONDS), _LONGEST_SECONDS)
            self._until = now + self._seconds
        self._on_trial = False
        return ejects

    def undecided(self) -> None:
        """Records that a call ended without success or failure. During an ejection, the next call is a new trial."""
        self._on_trial = False
