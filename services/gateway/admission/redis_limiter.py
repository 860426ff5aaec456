"""A limiter that keeps its counts in Redis, where all gateways share them."""

import itertools
from collections.abc import Callable, Iterable

from services.gateway.admission.keys import Limits
from services.gateway.admission.limiter import LEASE_SECONDS, Cost, Kind, Limiter, Verdict
from services.gateway.admission.redis_link import RedisLink

_LEASE_MICROSECONDS = int(LEASE_SECONDS * 1_000_000)


class RedisLimiter(Limiter):
    """Keeps the counts in Redis. Gateways that use the same Redis share the counts."""

    def __init__(self, link: RedisLink, clock: Callable[[], int] = lambda: -1) -> None:
        """``clock`` returns microseconds, or -1 for Redis's own clock, which gives all gateways the same time."""
        self._link = link
        self._clock = clock

    async def take(self, caller: str, limits: Limits, cost: Cost) -> Verdict:
        taken = (limits.requests, cost.requests, limits.tokens, cost.tokens, limits.answers, cost.answer)
        refused, *numbers = await self._link.run("take", _names(caller), [self._clock(), *taken, _LEASE_MICROSECONDS])
        return Verdict(Kind(refused) if refused else None, *map(int, numbers))

    async def settle(self, caller: str, limits: Limits, tokens: int, answer: str) -> None:
        await self._link.run("settle", _names(caller), [self._clock(), limits.tokens, tokens, answer])

    async def renew(self, answers: Iterable[tuple[str, str]]) -> None:
        for caller, group in itertools.groupby(sorted(answers), key=lambda answer: answer[0]):
            ids = [answer for _, answer in group]
            await self._link.run("renew", _names(caller)[1:], [self._clock(), _LEASE_MICROSECONDS, *ids])


def _names(caller: str) -> list[str]:
    # The braces keep both names on one node of a Redis cluster, because a script can use the names of one node only.
    return [f"nanochat:limits:{{{caller}}}", f"nanochat:answers:{{{caller}}}"]
