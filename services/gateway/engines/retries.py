"""A budget for retries, so that retries do not overload engines that fail."""

_SHARE = 0.2  # retries that each request earns
_BURST = 10.0  # maximum number of retries in the budget, which is full at the start


class RetryBudget:
    """Allows one retry for every five requests, and ten more in a burst.

    The retry after a stream's first failure is free, and so is the retry after the first failure since the stream last
    received a chunk. A retry after further failures needs the budget, but only if the failed engine still accepts
    calls. Therefore all streams of an engine that died may move to other engines without the budget.
    """

    def __init__(self) -> None:
        self._left = _BURST

    def earn(self) -> None:
        """Records a request, which adds a fifth of a retry to the budget."""
        self._left = min(self._left + _SHARE, _BURST)

    def spend(self) -> bool:
        """Removes one retry from the budget. Returns False if the budget was empty."""
        if self._left < 1:
            return False
        self._left -= 1
        return True
