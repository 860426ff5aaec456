"""Counts the requests, tokens and answers of callers, and refuses requests that exceed a limit.

Requests and tokens fill a bucket that leaks at a constant rate (``buckets.py``). In Redis, a running answer has a
lease: the answer counts until it ends, or until its gateway no longer renews the lease.
"""

import abc
import dataclasses
import enum
import time
from collections.abc import Callable, Iterable

from services.gateway.admission.buckets import Bucket
from services.gateway.admission.keys import Limits

LEASE_SECONDS = 30.0
"""A running answer counts for this long after its lease was renewed, so the answers of a dead gateway stop counting."""

# With this number of callers in memory, the limiter begins to look for callers that it can forget.
_KEPT_CALLERS = 1000


class Kind(enum.StrEnum):
    """The limits that can refuse a request."""

    REQUESTS = "requests"
    TOKENS = "tokens"
    ANSWERS = "answers"


@dataclasses.dataclass(frozen=True)
class Cost:
    """The amounts that a request adds to the counts of its caller.

    Attributes:
        requests: number of requests.
        tokens: number of tokens.
        answer: id of the answer that begins with the request; empty if no answer begins.
    """

    requests: int = 0
    tokens: int = 0
    answer: str = ""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A limiter's decision on a request.

    The amounts and times describe the state after the request. They are 0 for a limit that is not set.

    Attributes:
        refused_by: the limit that has no room. None if the request may pass and the limiter has counted its cost.
        retry_us: microseconds until the refusing limit has room; 0 for the limit on answers, which has room when
            another answer ends.
        requests_left, tokens_left: how many requests and tokens may pass now.
        requests_reset_us, tokens_reset_us: microseconds until the whole limit is available.
    """

    refused_by: Kind | None = None
    retry_us: int = 0
    requests_left: int = 0
    requests_reset_us: int = 0
    tokens_left: int = 0
    tokens_reset_us: int = 0


class Limiter(abc.ABC):
    """Counts the requests, tokens and running answers of each caller.

    Each method raises Away if the store of the counts does not answer.
    """

    @abc.abstractmethod
    async def take(self, caller: str, limits: Limits, cost: Cost) -> Verdict:
        """Counts the whole ``cost`` of a request, or nothing if one of the caller's limits has no room for it.

        A limit of 0 means no limit, and nothing is counted for it.
        """

    @abc.abstractmethod
    async def settle(self, caller: str, limits: Limits, tokens: int, answer: str) -> None:
        """Corrects the tokens of a finished request and ends its answer.

        Args:
            tokens: used minus reserved tokens. A caller that used more than the limit is in debt until the excess has
                leaked from the bucket.
            answer: id of the answer that has ended; empty if there was none.
        """

    @abc.abstractmethod
    async def renew(self, answers: Iterable[tuple[str, str]]) -> None:
        """Extends the leases of running answers. Each of ``answers`` is a pair: a caller's id and an answer's id."""


@dataclasses.dataclass
class _Caller:
    limits: Limits
    requests: Bucket = dataclasses.field(default_factory=Bucket)
    tokens: Bucket = dataclasses.field(default_factory=Bucket)
    answers: set[str] = dataclasses.field(default_factory=set)

    def idle(self, now: int) -> bool:
        """Whether the limiter may forget the caller: its buckets are empty, and none of its answers is running."""
        requests, tokens = self.requests.leaked(self.limits.requests, now), self.tokens.leaked(self.limits.tokens, now)
        return not (requests.spent or tokens.spent or self.answers)


class LocalLimiter(Limiter):
    """Keeps the counts in this process. Running answers need no lease, because they end with the process."""

    def __init__(self, clock: Callable[[], int] = lambda: time.monotonic_ns() // 1000) -> None:
        """``clock`` returns microseconds."""
        self._clock = clock
        self._callers: dict[str, _Caller] = {}
        self._forget_at = _KEPT_CALLERS

    async def take(self, caller: str, limits: Limits, cost: Cost) -> Verdict:
        now = self._clock()
        state = self._callers.get(caller) or _Caller(limits)
        requests, tokens = state.requests.leaked(limits.requests, now), state.tokens.leaked(limits.tokens, now)
        refused, retry = None, 0
        if not requests.has_room(limits.requests, cost.requests):
            refused, retry = Kind.REQUESTS, requests.room_in(limits.requests, cost.requests)
        elif not tokens.has_room(limits.tokens, cost.tokens):
            refused, retry = Kind.TOKENS, tokens.room_in(limits.tokens, cost.tokens)
        elif limits.answers and cost.answer and len(state.answers) >= limits.answers:
            refused = Kind.ANSWERS
        else:
            requests, tokens = requests.plus(limits.requests, cost.requests), tokens.plus(limits.tokens, cost.tokens)
            answers = {*state.answers, cost.answer} if limits.answers and cost.answer else state.answers
            self._remember(caller, _Caller(limits, requests, tokens, answers), now)
        return Verdict(
            refused,
            retry,
            requests.remaining(limits.requests),
            requests.empty_in(limits.requests),
            tokens.remaining(limits.tokens),
            tokens.empty_in(limits.tokens),
        )

    async def settle(self, caller: str, limits: Limits, tokens: int, answer: str) -> None:
        now = self._clock()
        state = self._callers.get(caller) or _Caller(limits)
        if limits.tokens and tokens:
            state.tokens = state.tokens.leaked(limits.tokens, now).plus(limits.tokens, tokens)
            self._remember(caller, state, now)
        state.answers.discard(answer)

    async def renew(self, answers: Iterable[tuple[str, str]]) -> None:
        pass

    def _remember(self, caller: str, state: _Caller, now: int) -> None:
        self._callers[caller] = state
        if len(self._callers) >= self._forget_at:
            self._callers = {name: kept for name, kept in self._callers.items() if not kept.idle(now)}
            self._forget_at = 2 * len(self._callers) + _KEPT_CALLERS
