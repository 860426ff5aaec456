"""Ejects engines that report good health but fail their calls: a circuit breaker with a half-open trial."""

_FAILURES = 3  # this many failures in a row eject an engine; a single failure may be the request's fault
_FIRST_SECONDS = 5.0
_LONGEST_SECONDS = 60.0


class Outlier:
    """Decides from the outcomes of an engine's calls whether the engine gets further calls.

    After three failures in a row, the engine is ejected for 5 seconds. Then the engine gets one call as a trial, and no
    other call until the trial has an outcome. If the trial or an earlier call succeeds, the ejection ends. If the trial
    fails, another ejection begins that lasts twice as long, up to a minute.

    ``call`` is any object that identifies a call. All times are seconds of one clock that never goes back.
    """

    def __init__(self) -> None:
        self._failures = 0  # failures since the last success
        self._seconds = 0.0  # length of the latest ejection; 0 while the engine is not ejected
        self._until = 0.0
        self._trial: object | None = None  # the call that is the trial

    @property
    def ejected(self) -> bool:
        """Whether the engine is ejected or has not passed its trial yet."""
        return self._seconds > 0

    def allows(self, now: float) -> bool:
        """Whether the engine may get a call now."""
        return not self.ejected or (now >= self._until and self._trial is None)

    def began(self, call: object) -> None:
        """Records that the engine gets a call."""
        if self.ejected and self._trial is None:
            self._trial = call

    def succeeded(self) -> None:
        """Records that a call has produced the first part of its answer."""
        self._failures, self._seconds, self._trial = 0, 0.0, None

    def failed(self, call: object, now: float) -> bool:
        """Records that a call failed through the engine's fault, and returns whether that ejects the engine."""
        self._failures += 1
        ejects = call is self._trial or (not self.ejected and self._failures >= _FAILURES)
        if ejects:
            self._seconds = min(max(2 * self._seconds, _FIRST_SECONDS), _LONGEST_SECONDS)
            self._until = now + self._seconds
        self.undecided(call)
        return ejects

    def undecided(self, call: object) -> None:
        """Records that a call ended without success or failure. If it was the trial, the next call is a new trial."""
        if call is self._trial:
            self._trial = None
