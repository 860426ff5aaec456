"""Gives a new revision of a model a share of the requests, until the new revision does worse than the others.

The outcome of an answer is the time to its first token. Each failure of an engine during an answer is a further
outcome, which is infinite. An outcome is *bad* if it is infinite, or larger than 1.5 times the 95th percentile of the
finite outcomes of the model's other revisions. So errors and much too slow answers count alike. By this definition,
some outcomes of the other revisions may be bad, too.

The new revision, called the canary, does worse if, with high confidence, its share of bad outcomes is larger than the
others' share of bad outcomes. With few outcomes, the share alone says little: if the only outcome is bad, the share is
1. Therefore the Wilson score interval (Wilson 1927) bounds both shares. For ``k`` bad outcomes among ``n`` and ``z``
standard deviations, its ends are

    (k + z^2 / 2 ± z * sqrt(k * (n - k) / n + z^2 / 4)) / (n + z^2)

If the lower end of the canary's interval lies above the upper end of the others' interval, the canary loses its share
of the requests. With ``z = 3``, it suffices that the first three answers of a new canary fail after 30 good answers of
the others.
"""

import collections
import math
import random
from collections.abc import Callable, Collection

_WINDOW = 500  # only this many of the canary's latest outcomes count, and as many of the other revisions' outcomes
# The canary is judged only after this many outcomes of the other revisions, because the 95th percentile of fewer
# outcomes means little.
_LEAST_OTHERS = 20
_QUANTILE = 0.95
_SLOWER = 1.5
_DEVIATIONS = 3.0


class Canary:
    """The share of the requests that a new revision on trial gets, and the outcomes of the requests for its model.

    Attributes:
        percent: share of the requests that the revision gets, in percent; 0 after the share was taken back.
        returned: whether the share was taken back.
    """

    def __init__(self, identity: str, percent: float, draw: Callable[[], float] = random.random) -> None:
        """``identity`` is ``model/stage/step_n``; if it is empty, there is no canary.

        ``draw`` returns a random number in [0, 1).
        """
        self.percent = percent if identity else 0.0
        self.returned = False
        self._identity, self._draw = identity, draw
        self._own: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._others: collections.deque[float] = collections.deque(maxlen=_WINDOW)

    def serves(self, identity: str) -> bool:
        """Whether the revision ``model/stage/step_n`` is the canary."""
        return identity == self._identity

    def draws(self) -> bool:
        """Whether the next request goes to the canary."""
        return self._draw() * 100 < self.percent

    def record(self, identity: str, seconds: float) -> str | None:
        """Records an outcome: the seconds from the start of a call to its first token, infinite for a failed call.

        Returns the reason if this outcome takes the share back; otherwise None.
        """
        if self.returned or not self._identity or _model(identity) != _model(self._identity):
            return None
        if not self.serves(identity):
            self._others.append(seconds)
            return None
        self._own.append(seconds)
        if len(self._others) < _LEAST_OTHERS:
            return None
        limit = _limit(self._others)
        own, others = _bad(self._own, limit), _bad(self._others, limit)
        if _wilson(own, len(self._own), -_DEVIATIONS) <= _wilson(others, len(self._others), _DEVIATIONS):
            return None
        self.percent, self.returned = 0.0, True
        return (
            f"{own} of {len(self._own)} requests failed or took more than {limit:.3g} s to the first token, "
            f"but only {others} of {len(self._others)} requests of the other revisions"
        )


def _model(identity: str) -> str:
    return identity.partition("/")[0]


def _limit(outcomes: Collection[float]) -> float:
    """The time, in seconds, above which an outcome is bad."""
    finite = sorted(filter(math.isfinite, outcomes))
    return _SLOWER * finite[math.ceil(_QUANTILE * len(finite)) - 1] if finite else math.inf


def _bad(outcomes: Collection[float], limit: float) -> int:
    return sum(seconds > limit or math.isinf(seconds) for seconds in outcomes)


def _wilson(bad: int, count: int, deviations: float) -> float:
    """One end of the Wilson score interval of a share: the upper end if ``deviations`` is positive."""
    square = deviations**2
    spread = deviations * math.sqrt(bad * (count - bad) / count + square / 4)
    return (bad + square / 2 + spread) / (count + square)
