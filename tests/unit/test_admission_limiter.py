"""The limiters of the gateway against a slow, obvious reference, with a clock that the test moves."""

import asyncio
import dataclasses
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.gateway.admission import limiter as limiter_module
from services.gateway.admission.keys import Limits
from services.gateway.admission.limiter import Cost, Kind, Limiter, LocalLimiter
from services.gateway.admission.redis_limiter import RedisLimiter
from services.gateway.admission.redis_link import RedisLink
from services.gateway.settings import MAX_LIMIT
from tests.support.redis_server import RedisServer, needs_redis

SECOND = 1_000_000  # microseconds
START = 1_800_000_000 * SECOND


@dataclasses.dataclass
class Reference:
    """Records everything that each caller took. Each decision adds up all records again, in exact fractions."""

    taken: list[tuple[int, str, str, int]] = dataclasses.field(default_factory=list)  # time, caller, kind, amount
    running: set[tuple[str, str]] = dataclasses.field(default_factory=set)

    def spent(self, now: int, caller: str, kind: str, per_minute: int) -> Fraction:
        """Number of requests or tokens that the caller has spent and not regained yet."""
        spent, before = Fraction(0), 0
        for at, who, what, amount in [*self.taken, (now, caller, kind, 0)]:
            if (who, what) == (caller, kind):
                regained = Fraction(per_minute, 60) * Fraction(at - before, SECOND)
                spent = max(Fraction(0), max(Fraction(0), spent - regained) + amount)
                before = at
        return spent

    def refused_by(self, now: int, caller: str, limits: Limits, cost: Cost) -> Kind | None:
        for kind, limit, amount in (
            (Kind.REQUESTS, limits.requests, cost.requests),
            (Kind.TOKENS, limits.tokens, cost.tokens),
        ):
            if limit and self.spent(now, caller, kind, limit) + amount > limit:
                return kind
        count = sum(who == caller for who, _ in self.running)
        return Kind.ANSWERS if limits.answers and cost.answer and count >= limits.answers else None

    def take(self, now: int, caller: str, cost: Cost) -> None:
        self.taken += [(now, caller, Kind.REQUESTS, cost.requests), (now, caller, Kind.TOKENS, cost.tokens)]
        if cost.answer:
            self.running.add((caller, cost.answer))


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> int:
        return self.now


@dataclasses.dataclass
class Step:
    wait: int  # microseconds before the step
    caller: str
    cost: Cost | None  # None if the step ends an answer and corrects its cost
    tokens: int = 0  # number of used tokens minus number of reserved tokens
    answer: str = ""


WAITS = st.one_of(
    st.just(0),
    st.integers(1, 999),
    st.integers(1, 3 * SECOND),
    st.sampled_from([SECOND, 6 * SECOND, 12 * SECOND, 59_999_999, 60 * SECOND, 60_000_001, 600 * SECOND]),
)
CALLERS = st.sampled_from(["key:a", "address:127.0.0.1"])
COSTS = st.builds(Cost, st.integers(0, 2), st.integers(0, 40), st.sampled_from(["", "", "1", "2", "3", "4"]))
TAKES = st.builds(Step, WAITS, CALLERS, COSTS)
SETTLES = st.builds(Step, WAITS, CALLERS, st.none(), st.integers(-30, 60), st.sampled_from(["", "1", "2", "3", "4"]))
LIMITS = st.builds(
    Limits, st.sampled_from([0, 1, 5, 7, 60]), st.sampled_from([0, 10, 77, 1000]), st.sampled_from([0, 1, 2])
)
LARGE = st.builds(Limits, st.just(MAX_LIMIT), st.just(MAX_LIMIT - 1), st.just(0))


async def play(limiter: Limiter, clock: Clock, limits: Limits, steps: list[Step]) -> None:
    """Runs the steps, and compares each verdict with the reference's."""
    reference = Reference()
    for step in steps:
        clock.now += step.wait
        await limiter.renew(reference.running)  # gateways do this for their running answers
        if step.cost is None:
            await limiter.settle(step.caller, limits, step.tokens, step.answer)
            reference.taken.append((clock.now, step.caller, Kind.TOKENS, step.tokens))
            reference.running.discard((step.caller, step.answer))
            continue
        verdict = await limiter.take(step.caller, limits, step.cost)
        expected = reference.refused_by(clock.now, step.caller, limits, step.cost)
        assert verdict.refused_by == expected, step
        if expected is None:
            reference.take(clock.now, step.caller, step.cost)
        for kind, limit, left, reset in (
            (Kind.REQUESTS, limits.requests, verdict.requests_left, verdict.requests_reset_us),
            (Kind.TOKENS, limits.tokens, verdict.tokens_left, verdict.tokens_reset_us),
        ):
            if limit:
                spent = reference.spent(clock.now, step.caller, kind, limit)
                assert left == max(0, (limit - spent) // 1)
                assert reset == -(-spent * 60 * SECOND // limit)
        if expected in (Kind.REQUESTS, Kind.TOKENS):
            amount, limit = (
                (step.cost.requests, limits.requests)
                if expected is Kind.REQUESTS
                else (step.cost.tokens, limits.tokens)
            )
            if amount <= limit:
                missing = reference.spent(clock.now, step.caller, expected, limit) + amount - limit
                assert verdict.retry_us == -(-missing * 60 * SECOND // limit)


@given(LIMITS | LARGE, st.lists(TAKES | SETTLES, max_size=40))
@settings(max_examples=200, deadline=None)
def test_the_local_limiter_decides_as_the_reference(limits: Limits, steps: list[Step]) -> None:
    clock = Clock()
    asyncio.run(play(LocalLimiter(clock), clock, limits, steps))


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@needs_redis
@given(limits=LIMITS | LARGE, steps=st.lists(TAKES | SETTLES, max_size=40))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_limiter_in_redis_decides_as_the_reference(redis: RedisServer, limits: Limits, steps: list[Step]) -> None:
    async def run() -> None:
        link = RedisLink(redis.url, 5.0)
        clock = Clock()
        try:
            await link.call(lambda client: client.flushall())
            await play(RedisLimiter(link, clock), clock, limits, steps)
        finally:
            await link.aclose()

    asyncio.run(run())


async def test_a_minute_lets_the_limit_through_and_not_one_more() -> None:
    clock = Clock()
    limiter, limits, passed = LocalLimiter(clock), Limits(requests=60), 0
    for _ in range(60_000):  # a request every millisecond
        clock.now += 1000
        passed += (await limiter.take("key:a", limits, Cost(requests=1))).refused_by is None
    assert passed == 60 + 59  # the whole bucket, and one each second from the first request on


async def test_a_caller_in_debt_waits_until_it_has_leaked() -> None:
    clock = Clock()
    limiter, limits = LocalLimiter(clock), Limits(tokens=600)
    await limiter.take("key:a", limits, Cost(tokens=600))
    await limiter.settle("key:a", limits, 300, "")
    refused = await limiter.take("key:a", limits, Cost(requests=1))
    assert (refused.refused_by, refused.retry_us) == (Kind.TOKENS, 30 * SECOND)
    clock.now += refused.retry_us
    assert (await limiter.take("key:a", limits, Cost(requests=1))).refused_by is None


async def test_the_local_limiter_forgets_callers_that_have_nothing_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limiter_module, "_KEPT_CALLERS", 10)
    clock = Clock()
    limiter, limits = LocalLimiter(clock), Limits(requests=60, answers=1)
    await limiter.take("key:busy", limits, Cost(requests=1, answer="runs"))
    for address in range(1000):
        clock.now += SECOND
        await limiter.take(f"address:{address}", limits, Cost(requests=1))
    assert len(limiter._callers) < 40
    assert (await limiter.take("key:busy", limits, Cost(requests=1, answer="another"))).refused_by is Kind.ANSWERS


@needs_redis
async def test_answers_of_a_dead_gateway_are_forgotten_and_those_of_a_living_one_are_not(redis: RedisServer) -> None:
    link, clock, limits = RedisLink(redis.url, 5.0), Clock(), Limits(answers=2)
    limiter = RedisLimiter(link, clock)

    async def begin(answer: str) -> Any:
        return (await limiter.take("key:lease", limits, Cost(answer=answer))).refused_by

    assert [await begin("dead"), await begin("alive"), await begin("third")] == [None, None, Kind.ANSWERS]
    for _ in range(3):
        clock.now += 20 * SECOND
        await limiter.renew([("key:lease", "alive")])
    assert [await begin("third"), await begin("fourth")] == [None, Kind.ANSWERS]
    # After Redis has lost all data, renew() stores the running answers again.
    await link.call(lambda client: client.flushall())
    await limiter.renew([("key:lease", "alive"), ("key:lease", "third")])
    assert await begin("fourth") is Kind.ANSWERS
    await link.aclose()
