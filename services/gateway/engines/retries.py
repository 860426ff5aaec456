"""A budget for retries, so that retries do not overload engines that fail."""

_SHARE = 0.2  # retries that each request earns
_BURST = 10.0  # most retries that can be saved; also the number at the start


class RetryBudget:
    """Allows one retry for every five requests, and ten more in a burst.

    A request needs the budget from its second retry on, and only if the engine that failed still takes calls. All
    streams of a dead engine may move without it.
    """

    def __init__(self) -> None:
        self._left = _BURST

    def earn(self) -> None:
        """Records a request."""
        self._left = min(self._left + _SHARE, _BURST)

    def spend(self) -> bool:
        """Takes one retry from the budget and returns whether there was one left."""
        if self._left < 1:
            return False
        self._left -= 1
        return True
