"""A budget for retries, so that failing engines do not get many times the load of working ones."""

_SHARE = 0.2  # retries that each request earns
_BURST = 10.0  # retries that can be saved, and that a quiet gateway has


class RetryBudget:
    """Allows one retry for every five requests, and ten more in a burst.

    A request needs the budget from its second retry on, and only after faults of engines that still take calls: all
    streams of an engine that died may move.
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
